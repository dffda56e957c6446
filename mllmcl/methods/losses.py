"""Losses on answer tokens that start from hidden states and the head's weight."""

# n answer tokens, D width, V vocabulary, k entries kept of a teacher's logits

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["topk_distillation"]


def _logits(hidden_nD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """Logits `[n, V]` in float32 or better."""
    logits_nV = F.linear(hidden_nD, head_weight_VD)
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


def topk_distillation(
    hidden: Tensor, head_weight: Tensor, values: Tensor, indices: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Mean divergence of the student from a teacher of which the k largest logits are known.

        p = softmax(values / T) over the k,   q = softmax(hidden head_weight^T / T) over the vocabulary
        loss_i = T^2 sum_j p_ij (log p_ij - log q_i,indices_ij)

    Args:
        hidden: `[n, D]`. head_weight: `[V, D]`. values: the teacher's logits `[n, k]`. indices: their tokens `[n, k]`.
    """
    z_nV = _logits(hidden, head_weight) / temperature
    log_q_nk = z_nV.gather(1, indices.long()) - z_nV.logsumexp(1, keepdim=True)
    log_p_nk = (values.to(z_nV.dtype) / temperature).log_softmax(1)
    return temperature**2 * (log_p_nk.exp() * (log_p_nk - log_q_nk)).sum(1).mean()
