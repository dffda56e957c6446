"""The statistics of a routing and their gradient in plain PyTorch; runs in float64 and is the truth of every test."""

# T tokens, E experts, k chosen experts
# logits_TE, probs_TE, gates_TE, indices_Tk, token_mask_T

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

__all__ = ["routing_statistics_backward_reference", "routing_statistics_reference"]


def _counted(tensor: Tensor, token_mask: Tensor | None) -> Tensor:
    """Zero for tokens that do not count: selected, not multiplied, since padding may hold NaN."""
    if token_mask is None:
        return tensor
    mask = token_mask.view(-1, *([1] * (tensor.dim() - 1)))
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def _load(indices: Tensor, token_mask: Tensor | None, like: Tensor) -> Tensor:
    """How many counted tokens chose each expert [E], those without a choice left out."""
    experts = like.shape[1]
    ones = _counted(torch.ones_like(indices, dtype=like.dtype), token_mask)
    total = torch.zeros(experts + 1, dtype=like.dtype, device=like.device)
    slots = torch.where(indices < 0, experts, indices).to(torch.int64)
    return total.index_add(0, slots.reshape(-1), ones.reshape(-1))[:experts].clone()


def _normalised(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = p / sum p [T, E], log q, and the sum [T, 1], 1 for a row where nothing is allowed."""
    total = probs.sum(-1, keepdim=True)
    total = torch.where(total == 0, torch.ones_like(total), total)
    q = probs / total
    return q, torch.log(q.clamp_min(torch.finfo(q.dtype).tiny)), total


def routing_statistics_reference(
    logits: Tensor, probs: Tensor, gates: Tensor, indices: Tensor, token_mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """load [E], importance [E], then without dimensions balance, z, entropy, and the tokens counted, at least 1."""
    tokens, experts = gates.shape
    count = gates.new_full((), max(tokens, 1)) if token_mask is None else token_mask.sum().to(gates.dtype).clamp_min(1)
    # padding is left out before anything is computed with it, so that its gradient is zero
    logits, probs, gates = (_counted(table, token_mask) for table in (logits, probs, gates))
    load = _load(indices, token_mask, gates.detach())
    share = load / load.sum().clamp_min(1.0)
    balance = experts * (share * (probs.sum(0) / count)).sum()
    z = _counted(torch.logsumexp(logits, -1).square(), token_mask).sum() / count
    q, log_q, _ = _normalised(probs)
    entropy = -(q * log_q).sum() / count
    return load, gates.sum(0), balance, z, entropy, count


def routing_statistics_backward_reference(
    d_importance: Optional[Tensor],
    d_balance: Optional[Tensor],
    d_z: Optional[Tensor],
    d_entropy: Optional[Tensor],
    logits: Tensor,
    probs: Tensor,
    token_mask: Optional[Tensor],
    load: Tensor,
    count: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, probs and gates [T, E]; an empty tensor where `needs` says no, zero from what is None."""
    d_logits, d_probs, d_gates = (torch.zeros_like(probs) if need else probs.new_empty(0) for need in needs)
    if needs[0] and d_z is not None:
        lse = torch.logsumexp(logits, -1, keepdim=True)
        d_logits = _counted(2.0 * d_z / count * lse * torch.exp(logits - lse), token_mask)
    if needs[1] and d_balance is not None:
        slope = d_balance * probs.shape[1] / count * load / load.sum().clamp_min(1.0)
        d_probs = d_probs + slope
    if needs[1] and d_entropy is not None:
        q, log_q, total = _normalised(probs)
        # a q below the clamp passes no gradient through its logarithm
        slope = -d_entropy / count * (log_q + (q >= torch.finfo(q.dtype).tiny).to(q.dtype))
        d_probs = d_probs + (slope - (q * slope).sum(-1, keepdim=True)) / total
    if needs[1]:
        d_probs = _counted(d_probs, token_mask)
    if needs[2] and d_importance is not None:
        d_gates = _counted(d_gates + d_importance, token_mask)
    return d_logits, d_probs, d_gates
