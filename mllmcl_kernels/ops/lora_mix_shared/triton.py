"""`lora_mix_shared` in Triton: the kernels of `lora_mix` over the ranks of all linears side by side.

Forward: one pass over x gives s and s * G of all linears, then the product of each. Backward: one pass over each dy in
rank space, one product that writes dx with the ranks of all linears in it, onto which the other base products are
added, and one product for all A.
"""

# T tokens, K in, N out, L linears, E experts and R ranks of each

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...triton_expand import add_product
from ...triton_tools import Gating, dtype_reason
from ..lora_mix.triton import adapter_gradients, input_gradient, rank_gradients, shrink
from . import lora_mix_shared_backward_op, lora_mix_shared_op
from .reference import cut

__all__: list[str] = []


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(x, *weight, *bias, *lora_a, *lora_b)


@lora_mix_shared_op.provider("triton", supports=_supports)
def lora_mix_shared_triton(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    count = len(weight)
    by = Gating.of(_wide(gates), ranks * count, scaling * count, x)
    s, mixed = shrink(x, torch.cat(lora_a), seed, dropout, by)
    each = zip(weight, bias or [None] * count, cut(mixed, count), lora_b, strict=True)
    return [s, *(add_product(x, *layer) for layer in each)]


def _wide(gates: Tensor | None) -> Tensor | None:
    return None if gates is None else gates.float()


def gatings(
    gates: Tensor | None, ranks: Sequence[int], scaling: Sequence[float], count: int, x: Tensor
) -> list[Gating]:
    """The gating of each linear from gates `[G, L * E]`."""
    return [Gating.of(one, ranks, scaling, x) for one in cut(_wide(gates), count)]


def sum_of_base(dx: Tensor, dy: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    """dx plus sum_l dy_l W_l, in place."""
    for d, one in zip(dy, weight, strict=True):
        dx.addmm_(d, one)
    return dx


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, seed, s, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(*dy, x, *weight, *lora_a, *lora_b, s)


@lora_mix_shared_backward_op.provider("triton", supports=_supports_backward)
def lora_mix_shared_backward_triton(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    count, tokens = len(weight), x.shape[0]
    every = gatings(gates, ranks, scaling, count, x)
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    mixed, dgates = [], []
    for d, b, one, part, by in zip(dy, lora_b, cut(s, count), cut(ds, count), every, strict=True):
        found = rank_gradients(d, b, one, part, ranks, by, None, needs_b, needs_gates)
        mixed.append(found[0])
        dgates.append(found[1])
    dx, da, dgates_GE = (x.new_empty(0) for _ in range(3))
    stacked = torch.cat(lora_a)
    if needs_x:
        dx = sum_of_base(input_gradient(dy[0], weight[0], ds, stacked, seed, dropout), dy[1:], weight[1:])
    given = (ranks * count, trainable * count, every[0], None)
    if needs_a:
        da, _ = adapter_gradients(dy[0], x, ds, ds, stacked.t(), seed, dropout, *given, True, False)
    dbs = [
        adapter_gradients(d, x, one, one, b, seed, dropout, ranks, trainable, every[0], None, False, needs_b)[1]
        for d, one, b in zip(dy, mixed, lora_b, strict=True)
    ]
    if needs_gates:
        rows = gates.shape[0]
        by_token = torch.cat(dgates, 1)
        dgates_GE = by_token.view(rows, tokens // max(rows, 1), by_token.shape[1]).sum(1).to(gates.dtype)
    dweights = [d.t() @ x if needs_weight else x.new_empty(0) for d in dy]
    dbiases = [d.sum(0) if needs_bias else x.new_empty(0) for d in dy]
    return [dx, dgates_GE, da, *dweights, *dbiases, *dbs]
