"""`mask_grads_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import NONE, broadcast_mask

__all__ = ["mask_grads_reference"]


def mask_grads_reference(grads: list[Tensor], masks: list[Tensor], kinds: list[int], actives: list[int]) -> None:
    """grad = mask ? grad : 0, where a masked-out NaN becomes 0 too."""
    for grad, mask, kind, active in zip(grads, masks, kinds, actives, strict=True):
        if kind != NONE:
            keep = broadcast_mask(mask, kind, active, grad.dim())
            grad.copy_(torch.where(keep, grad, torch.zeros_like(grad)))
