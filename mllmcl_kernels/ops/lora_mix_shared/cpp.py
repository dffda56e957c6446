"""`lora_mix_shared` on the CPU: the ranks of all linears side by side, one product over x, one pass for all gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dropout import threshold
from ...products import add_product_nt, has_few_rows, product_nt
from ..lora_mix.cpp import OPS, by_rank, dropped, float_path, lora_gradients, lora_mix_cpp, mixed_ranks, rank_tables
from . import lora_mix_shared_backward_op, lora_mix_shared_op
from .reference import cut

__all__ = [
    "add_mixed",
    "input_gradient",
    "layer_gradients",
    "lora_mix_shared_cpp",
    "rank_gradients",
    "stacked_gradient",
]


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(x, *weight, *bias, *lora_a, *lora_b, gates)


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(*dy, x, *weight, *lora_a, *lora_b, gates)


@lora_mix_shared_op.provider("cpp", supports=_supports)
def lora_mix_shared_cpp(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    count = len(weight)
    if has_few_rows(x):
        each = zip(weight, bias or [None] * count, lora_a, lora_b, cut(gates, count), strict=True)
        pairs = [lora_mix_cpp(x, *layer, seed, ranks, scaling, trainable, dropout) for layer in each]
        return [torch.cat([s for _, s in pairs], 1), *(y for y, _ in pairs)]
    x = x.contiguous()
    s = product_nt(dropped(x, seed, dropout), torch.cat(lora_a))
    if gates is None and len(set(scaling)) == 1:
        return [s, *add_mixed(x, weight, bias, s, lora_b, scaling[0])]
    gates = None if gates is None else gates.contiguous()
    mixed = mixed_ranks(s, gates, ranks * count, scaling * count)
    return [s, *add_mixed(x, weight, bias, mixed, lora_b, 1.0)]


def add_mixed(x: Tensor, weight, bias, mixed: Tensor, lora_b, alpha: float) -> list[Tensor]:
    """x W_l^T + b_l + alpha mixed_l B_l^T of every linear."""
    found = []
    for w, b, one, up in zip(weight, bias or [None] * len(weight), cut(mixed, len(weight)), lora_b, strict=True):
        found.append(product_nt(x, w, b).addmm_(one, up.t(), alpha=alpha))
    return found


@lora_mix_shared_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_shared_backward_cpp(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    """One pass in rank space for all linears, one product each for the ranks' share of dx and for all A."""
    needs_x, *needs_layers, needs_gates = needs
    dy, x = [one.contiguous() for one in dy], x.contiguous()
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    mixed, dgates = rank_gradients(dy, lora_b, s, gates, ranks, scaling, needs_gates, ds)
    dx = input_gradient(dy, weight, ds, torch.cat(lora_a), seed, dropout) if needs_x else x.new_empty(0)
    da = stacked_gradient(ds, x, seed, ranks, trainable, dropout) if needs_layers[2] else x.new_empty(0)
    return [dx, dgates, da, *layer_gradients(dy, x, mixed, lora_b, ranks, trainable, needs_layers)]


def rank_gradients(
    dy: Sequence[Tensor], lora_b, s: Tensor, gates: Tensor | None, ranks, scaling, needs_gates: bool, ds: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ds `[T, L * R]`, whose rows may lie apart; give s * G and the gradient of the gates `[G, L * E]`."""
    count, u = len(dy), torch.empty_like(s, memory_format=torch.contiguous_format)
    for one, d, b in zip(cut(u, count), dy, lora_b, strict=True):
        torch.mm(d, b, out=one)
    mixed, gates = torch.empty_like(u), None if gates is None else gates.contiguous()
    dgates = torch.empty_like(gates) if needs_gates else s.new_empty(0)
    tables = rank_tables(ranks * count, scaling * count)
    OPS.rank_gate_backward(u, s.contiguous(), gates, *tables, ds, mixed, dgates)
    return mixed, dgates


def input_gradient(
    dy: Sequence[Tensor], weight, ds: Tensor, lora_a: Tensor, seed: Tensor | None, dropout: float
) -> Tensor:
    """sum_l dy_l W_l + drop'(ds A): `[T, K]`."""
    dx = product_nt(dy[0], weight[0].t())
    for d, one in zip(dy[1:], weight[1:], strict=True):
        add_product_nt(dx, d, one.t())
    if dropout == 0.0:
        add_product_nt(dx, ds, lora_a.t())
    else:
        OPS.dropout(product_nt(ds, lora_a.t()), seed, threshold(dropout), 1.0 / (1.0 - dropout), True, dx)
    return dx


def stacked_gradient(ds: Tensor, x: Tensor, seed: Tensor | None, ranks, trainable, dropout: float) -> Tensor:
    """ds^T drop(x) `[L * R, K]`: of all A, zero where an expert does not train."""
    count = ds.shape[1] // sum(ranks)
    return by_rank(ds, dropped(x, seed, dropout), ranks * count, trainable * count)


def layer_gradients(
    dy: Sequence[Tensor], x: Tensor, mixed: Tensor, lora_b, ranks, trainable, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of weight, bias and B of every linear; empty where not asked for."""
    needs_weight, needs_bias, _, needs_b = needs
    found = [product_nt(d.t(), x.t()) if needs_weight else x.new_empty(0) for d in dy]
    found += [d.sum(0) if needs_bias else x.new_empty(0) for d in dy]
    for d, one, b in zip(dy, cut(mixed, len(dy)), lora_b, strict=True):
        found.append(lora_gradients(d, x, one, one, b, ranks, trainable, False, needs_b)[1])
    return found
