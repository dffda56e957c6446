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

__all__ = [
    "add_mixed",
    "layer_gradients",
    "lora_mix_shared_triton",
    "rank_gradients_of_all",
    "stacked_gradient",
    "sum_of_base",
]


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(x, *weight, *bias, *lora_a, *lora_b)


@lora_mix_shared_op.provider("triton", supports=_supports)
def lora_mix_shared_triton(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    count = len(weight)
    by = Gating.of(_wide(gates), ranks * count, scaling * count, x)
    mixed = x.new_empty(x.shape[0], count * lora_a[0].shape[0])
    s = shrink(x, torch.cat(lora_a), seed, dropout, by, mixed)
    return [s, *add_mixed(x, weight, bias, mixed, lora_b)]


def add_mixed(x: Tensor, weight, bias, mixed: Tensor, lora_b) -> list[Tensor]:
    """x W_l^T + b_l + mixed_l B_l^T of every linear."""
    count = len(weight)
    each = zip(weight, bias or [None] * count, cut(mixed, count), lora_b, strict=True)
    return [add_product(x, *layer) for layer in each]


def _wide(gates: Tensor | None) -> Tensor | None:
    return None if gates is None else gates.float()


def rank_gradients_of_all(
    dy: Sequence[Tensor], lora_b, s: Tensor, ds: Tensor, gates: Tensor | None, ranks, scaling, needs_mixed: bool,
    needs_gates: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Write ds = (dy B) * G of all linears into `ds` [T, L * R]; give each s * G, and the gates' gradient by token."""
    count, mixed, dgates = len(dy), [], []
    parts = zip(dy, lora_b, cut(s, count), cut(ds, count), cut(_wide(gates), count), strict=True)
    for d, b, own_s, own_ds, own_gates in parts:
        by = Gating.of(own_gates, ranks, scaling, d)
        found = rank_gradients(d, b, own_s, own_ds, ranks, by, None, needs_mixed, needs_gates)
        mixed.append(found[0])
        dgates.append(found[1])
    return mixed, torch.cat(dgates, 1) if needs_gates else s.new_empty(0)


def sum_of_base(dx: Tensor, dy: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    """dx plus sum_l dy_l W_l, in place."""
    for d, one in zip(dy, weight, strict=True):
        dx.addmm_(d, one)
    return dx


def stacked_gradient(
    x: Tensor, ds: Tensor, lora_a: Tensor, seed: Tensor | None, ranks, trainable, dropout: float, count: int
) -> Tensor:
    """ds^T drop(x) [L * R, K]: of all A, zero outside the ranks that train."""
    every = (ranks * count, trainable * count)
    return adapter_gradients(ds, x, ds, ds, lora_a.t(), seed, dropout, *every, None, None, True, False)[0]


def layer_gradients(
    dy: Sequence[Tensor], x: Tensor, mixed: Sequence[Tensor], lora_b, ranks, trainable, needs_weight: bool,
    needs_bias: bool, needs_b: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of weight, bias and B of every linear; empty where not asked for."""
    found = [d.t() @ x if needs_weight else x.new_empty(0) for d in dy]
    found += [d.sum(0) if needs_bias else x.new_empty(0) for d in dy]
    for d, one, b in zip(dy, mixed, lora_b, strict=True):
        given = (d, x, one, one, b, None, 0.0, ranks, trainable, None, None)
        found.append(adapter_gradients(*given, False, needs_b)[1])
    return found


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, seed, s, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(*dy, x, *weight, *lora_a, *lora_b, s)


@lora_mix_shared_backward_op.provider("triton", supports=_supports_backward)
def lora_mix_shared_backward_triton(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    mixed, by_token = rank_gradients_of_all(dy, lora_b, s, ds, gates, ranks, scaling, needs_b, needs_gates)
    dx, da, dgates = (x.new_empty(0) for _ in range(3))
    stacked = torch.cat(lora_a)
    if needs_x:
        dx = sum_of_base(input_gradient(dy[0], weight[0], ds, stacked, seed, dropout), dy[1:], weight[1:])
    if needs_a:
        da = stacked_gradient(x, ds, stacked, seed, ranks, trainable, dropout, len(weight))
    if needs_gates:
        rows, experts = gates.shape
        dgates = by_token.view(rows, x.shape[0] // max(rows, 1), experts).sum(1).to(gates.dtype)
    rest = layer_gradients(dy, x, mixed, lora_b, ranks, trainable, needs_weight, needs_bias, needs_b)
    return [dx, dgates, da, *rest]
