"""`anchor_grad_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import broadcast_mask

__all__ = ["anchor_grad_reference"]


def anchor_grad_reference(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    masks: list[Tensor],
    kinds: list[int],
    actives: list[int],
    strength: Tensor,
) -> None:
    """grad += strength importance (param - anchor) on the entries that the masks allow."""
    lists = (grads, params, anchors, importances, masks, kinds, actives)
    for grad, param, anchor, importance, mask, kind, active in zip(*lists, strict=True):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        pull = importance.to(wide) * (param.to(wide) - anchor.to(wide))
        new = grad.to(wide) + strength.to(grad.device, wide) * pull
        keep = broadcast_mask(mask, kind, active, grad.dim())
        grad.copy_(torch.where(keep, new.to(grad.dtype), grad))
