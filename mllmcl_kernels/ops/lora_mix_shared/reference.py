"""The formula of `lora_mix_shared`: `lora_mix` of each linear, the gradients of x added up."""

# T tokens, K in, N out, L linears, E experts and R ranks of each, G rows of gates

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..lora_mix.reference import lora_mix_backward_reference, lora_mix_reference

__all__ = ["cut", "lora_mix_shared_backward_reference", "lora_mix_shared_reference"]


def cut(by_linear: Tensor | None, count: int) -> list[Tensor | None]:
    """`[T, L * D]` as L views `[T, D]`."""
    return [None] * count if by_linear is None else list(by_linear.unflatten(1, (count, -1)).unbind(1))


def lora_mix_shared_reference(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gates: Optional[Tensor],
    seed: Optional[Tensor],
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
) -> list[Tensor]:
    """s [T, L * R], then y [T, N] of each linear; gates are [G, L * E], `bias` may be empty."""
    count = len(weight)
    each = zip(weight, bias or [None] * count, lora_a, lora_b, cut(gates, count), strict=True)
    pairs = [lora_mix_reference(x, *layer, seed, ranks, scaling, trainable, dropout) for layer in each]
    return [torch.cat([s for _, s in pairs], 1), *(y for y, _ in pairs)]


def lora_mix_shared_backward_reference(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gates: Optional[Tensor],
    seed: Optional[Tensor],
    s: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, gates, all A stacked `[L * R, K]`, then each linear's weight, bias, B; empty if not needed."""
    count = len(weight)
    each = zip(dy, weight, lora_a, lora_b, cut(gates, count), cut(s, count), strict=True)
    found = [
        lora_mix_backward_reference(
            d, x, w, a, b, None if g is None else g.contiguous(), seed, s_TR, ranks, scaling, trainable, dropout, needs
        )
        for d, w, a, b, g, s_TR in each
    ]
    dx, dweight, dbias, da, db, dgates = zip(*found, strict=True)
    dx_TK = sum(dx[1:], start=dx[0]) if needs[0] else x.new_empty(0)
    dgates_GE = torch.cat(dgates, 1) if needs[5] else x.new_empty(0)
    return [dx_TK, dgates_GE, torch.cat(da), *dweight, *dbias, *db]
