"""`importance_update_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import broadcast_mask

__all__ = ["importance_update_reference"]


def importance_update_reference(
    importances: list[Tensor],
    grads: list[Tensor],
    owners: list[Tensor],
    masks: list[Tensor],
    kinds: list[int],
    actives: list[int],
    power: int,
    larger: bool,
    count: Tensor,
    task: int,
) -> None:
    """A running mean or maximum of |grad|^power on the entries that the masks allow."""
    for index, (importance, grad) in enumerate(zip(importances, grads, strict=True)):
        wide = torch.float64 if importance.dtype == torch.float64 else torch.float32
        keep = broadcast_mask(masks[index], kinds[index], actives[index], importance.dim())
        value = grad.to(wide).square() if power == 2 else grad.to(wide).abs()
        if larger:
            value = value.to(importance.dtype)
            taken = keep & ((value > importance) | (value.isnan() & ~importance.isnan()))
            importance.copy_(torch.where(taken, value, importance))
            if owners:
                owners[index].masked_fill_(taken, task)
        else:
            old = importance.to(wide)
            mean = old + (value - old) / count.to(importance.device, wide)
            importance.copy_(torch.where(keep, mean.to(importance.dtype), importance))
