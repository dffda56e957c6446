"""Sums of a routing's tables over blocks of rows, and their gradient, in plain PyTorch; the truth of every test."""

# T tokens, E experts, k chosen experts, P planes
# logits_TE, probs_TE, gates_TE, indices_Tk, token_mask_T

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

__all__ = ["PLANE_ROWS", "routing_planes_backward_reference", "routing_planes_reference"]

#: rows that one plane adds up; every tile of a Triton kernel that makes planes is a multiple of it
PLANE_ROWS = 16


def _counted(tensor: Tensor, token_mask: Tensor | None) -> Tensor:
    """Zero for tokens that do not count: selected, not multiplied, since padding may hold NaN."""
    if token_mask is None:
        return tensor
    return torch.where(token_mask[:, None], tensor, torch.zeros_like(tensor))


def _choices(indices: Tensor, like: Tensor) -> Tensor:
    """How often each row chose each expert [T, E], slots without a choice left out."""
    experts = like.shape[1]
    slots = torch.where(indices < 0, experts, indices).to(torch.int64)
    total = like.new_zeros(like.shape[0], experts + 1)
    return total.scatter_add(1, slots, torch.ones_like(slots, dtype=like.dtype))[:, :experts]


def _normalised(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = p / sum p [T, E], log q, and the sum [T, 1], 1 for a row where nothing is allowed."""
    total = probs.sum(-1, keepdim=True)
    total = torch.where(total == 0, torch.ones_like(total), total)
    q = probs / total
    return q, torch.log(q.clamp_min(torch.finfo(q.dtype).tiny)), total


def routing_planes_reference(
    logits: Tensor, probs: Tensor, gates: Tensor, indices: Tensor, token_mask: Optional[Tensor]
) -> Tensor:
    """planes [P, 3 E + 3]: of each expert the choices, gates and probabilities; then lse^2, entropy and tokens."""
    tokens = gates.shape[0]
    # padding is left out before anything is computed with it, so that its gradient is zero
    logits, probs, gates = (_counted(table, token_mask) for table in (logits, probs, gates))
    lse = torch.logsumexp(logits, -1, keepdim=True)
    q, log_q, _ = _normalised(probs)
    entropy = -(q * log_q).sum(-1, keepdim=True)
    ones = gates.new_ones(tokens, 1)
    choices, square, ones = (_counted(table, token_mask) for table in (_choices(indices, gates), lse.square(), ones))
    columns = torch.cat([choices, gates, probs, square, entropy, ones], 1)
    planes = -(-tokens // PLANE_ROWS)
    behind = columns.new_zeros(planes * PLANE_ROWS - tokens, columns.shape[1])
    return torch.cat([columns, behind]).unflatten(0, (planes, PLANE_ROWS)).sum(1)


def routing_planes_backward_reference(
    d_planes: Tensor, logits: Tensor, probs: Tensor, token_mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, probs and gates [T, E]; a gradient of zero passes nothing on, not even to infinities."""
    tokens, experts = probs.shape
    rows = d_planes.repeat_interleave(PLANE_ROWS, 0)[:tokens]
    _, d_gates, d_probs, d_square, d_entropy, _ = rows.split([experts, experts, experts, 1, 1, 1], 1)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    zero = torch.zeros_like(probs)
    d_logits = torch.where(d_square == 0, zero, 2.0 * d_square * lse * torch.exp(logits - lse))
    q, log_q, total = _normalised(probs)
    # a q below the clamp passes no gradient through its logarithm
    slope = log_q + (q >= torch.finfo(q.dtype).tiny).to(q.dtype)
    through = d_entropy * (slope - (q * slope).sum(-1, keepdim=True)) / total
    d_probs = d_probs - torch.where(d_entropy == 0, zero, through)
    d_logits, d_probs, d_gates = (_counted(table, token_mask) for table in (d_logits, d_probs, d_gates))
    return d_logits, d_probs, d_gates.contiguous()
