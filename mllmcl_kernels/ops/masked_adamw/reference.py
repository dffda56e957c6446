"""`masked_adamw_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import broadcast_mask

__all__ = ["masked_adamw_reference"]


def masked_adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masks: list[Tensor],
    kinds: list[int],
    actives: list[int],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on the entries that the masks allow."""
    for p, g, m, v, mask, kind, active in zip(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, strict=True):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        count, rate, scale = (value.to(p.device, wide) for value in (step, lr, grad_scale))
        g_wide = g.to(wide) * scale
        m_new = m.to(wide) * beta1 + g_wide * (1.0 - beta1)
        v_new = v.to(wide) * beta2 + g_wide * g_wide * (1.0 - beta2)
        size = rate / (1.0 - beta1**count)
        denominator = v_new.sqrt() / (1.0 - beta2**count).sqrt() + eps
        p_new = p.to(wide) * (1.0 - rate * weight_decay) - size * m_new / denominator
        keep = broadcast_mask(mask, kind, active, p.dim())
        for old, new in ((p, p_new), (m, m_new), (v, v_new)):
            old.copy_(torch.where(keep, new.to(old.dtype), old))
