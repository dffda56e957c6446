"""Loss terms that several methods share: on answer tokens from hidden states and the head, and on adapters."""

# n answer tokens, D width, V vocabulary, k entries kept of a teacher's logits
# G layers of one width, r rank of the current expert, Q ranks of the old experts, K in

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["orthogonality_loss", "soft_target_cross_entropy", "topk_distillation"]


def _logits(hidden_nD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """Logits `[n, V]` in float32 or better."""
    logits_nV = F.linear(hidden_nD, head_weight_VD)
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


def soft_target_cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, alpha: float) -> Tensor:
    """Mean cross entropy to the target 1 - alpha on the label and alpha / (V - 1) on every other token.

        z = hidden head_weight^T
        loss_i = logsumexp_v z_iv - (1 - alpha) z_i,label - alpha / (V - 1) (sum_v z_iv - z_i,label)

    Args:
        hidden: `[n, D]`. head_weight: `[V, D]`. labels: int64 `[n]`. alpha: in [0, 1).
    """
    z_nV = _logits(hidden, head_weight)
    label_n = z_nV.gather(1, labels[:, None])[:, 0]
    rest_n = (z_nV.sum(1) - label_n) / (z_nV.shape[1] - 1)
    return (z_nV.logsumexp(1) - (1.0 - alpha) * label_n - alpha * rest_n).mean()


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


def orthogonality_loss(lora_a: Sequence[Tensor], previous_a: Sequence[Tensor]) -> Tensor:
    """Sum over the layers of the absolute entries of A_t A_old^T; the old side gets no gradient.

    Layers of one shape share a product, whatever the number of old experts.

    Args:
        lora_a: A of the current expert in every layer, `[r, K]`. previous_a: A of all old experts in the same layers,
            stacked, `[Q, K]`.

    Returns:
        A scalar, float32 or wider.

    Source: O-LoRA (arXiv:2310.14152).
    """
    alike: dict[tuple, list[int]] = {}
    for place, (new, old) in enumerate(zip(lora_a, previous_a, strict=True)):
        alike.setdefault((new.shape, old.shape), []).append(place)
    parts = []
    with torch.autocast(lora_a[0].device.type, enabled=False):
        for places in alike.values():
            new_GrK = torch.stack([lora_a[place] for place in places])
            old_GQK = torch.stack([previous_a[place].detach() for place in places])
            parts.append(torch.bmm(new_GrK, old_GQK.mT).abs().sum())
    return torch.stack(parts).sum()
