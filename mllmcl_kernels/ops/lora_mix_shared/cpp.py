"""`lora_mix_shared` on the CPU: the ranks of all linears side by side, one product over x, one pass for all gates."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dropout import threshold
from ...products import add_product_nt, has_few_rows, product_nt
from ..lora_mix.cpp import OPS, by_rank, dropped, float_path, lora_gradients, lora_mix_cpp, mixed_ranks, rank_tables
from . import lora_mix_shared_backward_op, lora_mix_shared_op
from .reference import cut

__all__: list[str] = []


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(x, *weight, *bias, *lora_a, *lora_b, gates)


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(*dy, x, *weight, *lora_a, *lora_b, gates)


@lora_mix_shared_op.provider("cpp", supports=_supports)
def lora_mix_shared_cpp(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    count = len(weight)
    biases = bias or [None] * count
    if has_few_rows(x):
        each = zip(weight, biases, lora_a, lora_b, cut(gates, count), strict=True)
        pairs = [lora_mix_cpp(x, *layer, seed, ranks, scaling, trainable, dropout) for layer in each]
        return [torch.cat([s for _, s in pairs], 1), *(y for y, _ in pairs)]
    x = x.contiguous()
    s = product_nt(dropped(x, seed, dropout), torch.cat(lora_a))
    found = [product_nt(x, *layer) for layer in zip(weight, biases, strict=True)]
    plain = gates is None and len(set(scaling)) == 1
    mixed = (
        s if plain else mixed_ranks(s, None if gates is None else gates.contiguous(), ranks * count, scaling * count)
    )
    for y, one, b in zip(found, cut(mixed, count), lora_b, strict=True):
        y.addmm_(one, b.t(), alpha=scaling[0] if plain else 1.0)
    return [s, *found]


@lora_mix_shared_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_shared_backward_cpp(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    """u of all linears side by side, one pass in rank space, one product each for dx's and A's share of the ranks."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    count = len(weight)
    dy, x, s = [one.contiguous() for one in dy], x.contiguous(), s.contiguous()
    gates = None if gates is None else gates.contiguous()
    u = torch.empty_like(s)
    for one, d, b in zip(cut(u, count), dy, lora_b, strict=True):
        torch.mm(d, b, out=one)
    ds, mixed = torch.empty_like(u), torch.empty_like(u)
    dgates = torch.empty_like(gates) if needs_gates else x.new_empty(0)
    OPS.rank_gate_backward(u, s, gates, *rank_tables(ranks * count, scaling * count), ds, mixed, dgates)
    dx = _input_gradient(dy, weight, ds, torch.cat(lora_a), seed, dropout) if needs_x else x.new_empty(0)
    da = x.new_empty(0)
    if needs_a:
        da = by_rank(ds, dropped(x, seed, dropout), ranks * count, trainable * count)
    found = [product_nt(d.t(), x.t()) if needs_weight else x.new_empty(0) for d in dy]
    found += [d.sum(0) if needs_bias else x.new_empty(0) for d in dy]
    for d, one, b in zip(dy, cut(mixed, count), lora_b, strict=True):
        found.append(lora_gradients(d, x, one, one, b, ranks, trainable, False, needs_b)[1])
    return [dx, dgates, da, *found]


def _input_gradient(
    dy: list[Tensor], weight, ds: Tensor, lora_a: Tensor, seed: Tensor | None, dropout: float
) -> Tensor:
    """sum_l dy_l W_l + drop'(ds A): `[T, K]`."""
    dx = product_nt(dy[0], weight[0].t())
    for d, one in zip(dy[1:], weight[1:], strict=True):
        add_product_nt(dx, d, one.t())
    if dropout == 0.0:
        dx.addmm_(ds, lora_a)
    else:
        OPS.dropout(torch.mm(ds, lora_a), seed, threshold(dropout), 1.0 / (1.0 - dropout), True, dx)
    return dx
