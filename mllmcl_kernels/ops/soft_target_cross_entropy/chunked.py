"""`soft_target_cross_entropy` in plain torch, a chunk of logits at a time."""

from __future__ import annotations

import functools

from torch import Tensor

from ..linear_loss import linear_loss, wide_dtype, write_gradient
from . import soft_target_cross_entropy_op
from .reference import token_factors

__all__ = ["soft_target_cross_entropy_chunked"]


def _rows(logits: Tensor, factor: Tensor, labels: Tensor, alpha: float, gradient: bool) -> Tensor:
    """Losses `[C]` from the closed form; every pass over the chunk is in place.

    With z = logits - max: loss = log sum exp z - (1 - alpha) z_label - alpha / (V - 1) * sum of the other z.
    """
    z, label = logits.to(factor.dtype), labels[:, None]
    other = alpha / (z.shape[1] - 1)
    z.sub_(z.amax(-1, keepdim=True))
    chosen = z.gather(1, label)
    rest = 0.0
    if alpha:
        # the label's place is empty during the sum: no difference of large numbers
        rest = z.scatter_(1, label, 0.0).sum(-1, keepdim=True)
        z.scatter_(1, label, chosen)
    mass = z.exp_().sum(-1, keepdim=True)
    losses = mass.log() - (1.0 - alpha) * chosen - other * rest
    if gradient:
        z.mul_(factor[:, None] / mass)
        hit = factor[:, None] * (chosen.exp() / mass - (1.0 - alpha))
        if alpha:
            z.sub_(factor[:, None] * other)
        write_gradient(z.scatter_(1, label, hit), logits, factor)
    return losses[:, 0]


@soft_target_cross_entropy_op.provider("chunked")
def soft_target_cross_entropy_chunked(
    hidden, head_weight, head_bias, weights, labels, alpha, ignore_index, chunk, needs
):  # fmt: skip
    counted, factor, safe = token_factors(labels, weights, ignore_index, head_weight.shape[0], wide_dtype(hidden.dtype))
    rows = functools.partial(_rows, alpha=alpha)
    return linear_loss(rows, hidden, head_weight, head_bias, counted, factor, (safe,), chunk, needs)
