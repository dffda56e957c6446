"""The formula of `soft_target_cross_entropy` in plain PyTorch; runs in float64 and is the truth of every test."""

# T tokens, D width of hidden, V vocabulary
# hidden_TD, head_weight_VD, head_bias_V, weights_T, labels_T, logits_TV, target_TV, losses_T

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..linear_loss import may_look, wide_logits

__all__ = ["soft_target_cross_entropy_reference", "token_factors"]


def token_factors(
    labels: Tensor, weights: Tensor | None, ignore_index: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count, those of weight 0 do not; the factor of each; the labels with 0 where they are none.

    The factor is NaN for a label out of range. On the CPU, and with MLLMCL_DEBUG=1 everywhere, that is an error which
    names the first.
    """
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    if may_look(labels.device) and bool(wrong.any()):
        where = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"soft_target_cross_entropy: labels must be in 0..{vocabulary - 1} or ignore_index = {ignore_index}, "
            f"got {int(labels[where])} at position {where}"
        )
    factor = torch.ones(labels.shape, dtype=dtype, device=labels.device) if weights is None else weights.to(dtype)
    counted = counted & (factor != 0)
    return counted, torch.where(wrong, float("nan"), factor), torch.where(counted & ~wrong, labels, 0)


def soft_target_cross_entropy_reference(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Optional[Tensor],
    weights: Optional[Tensor],
    labels: Tensor,
    alpha: float,
    ignore_index: int,
    chunk: Optional[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total = sum of weights * losses, losses [T], and the gradients of total that `needs` asks for.

    p = softmax(hidden W^T + b);  q = 1 - alpha on the label, alpha / (V - 1) elsewhere
    loss = - sum over v of q log p, 0 where the label is ignored or the weight is 0;  dlogits = weight * (p - q)
    dhidden = dlogits W;  dW = dlogits^T hidden;  db = sum over tokens of dlogits
    """
    logits = wide_logits(hidden, head_weight, head_bias)
    vocabulary = head_weight.shape[0]
    counted, factor, safe = token_factors(labels, weights, ignore_index, vocabulary, logits.dtype)
    target = torch.full_like(logits, alpha / (vocabulary - 1)).scatter(1, safe[:, None], 1.0 - alpha)
    log_p = torch.log_softmax(logits, -1)
    # nothing is nothing where log p is minus infinity
    losses = -torch.where(target == 0, torch.zeros_like(log_p), target * log_p).sum(-1)
    losses = torch.where(counted, losses, 0.0).masked_fill(counted & factor.isnan(), float("nan"))
    total = (losses * torch.where(counted, factor, 0.0)).sum()
    dlogits = torch.where(counted[:, None], (log_p.exp() - target) * factor[:, None], 0.0).to(hidden.dtype)
    known = torch.where(counted[:, None], hidden, torch.zeros_like(hidden))
    return (
        total,
        losses,
        dlogits @ head_weight if needs[0] else hidden.new_empty(0),
        dlogits.t() @ known if needs[1] else hidden.new_empty(0),
        dlogits.sum(0) if needs[2] else hidden.new_empty(0),
    )
