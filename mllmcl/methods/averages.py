"""Moving averages of parameters whose weight is that of the old average, as the optimal balance weight has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllmcl_kernels import Mask, ema_update_

__all__ = ["hold_average_"]


@torch.no_grad()
def hold_average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    base_weight: float,
    masks: Sequence[Mask | None] | None = None,
    **rule,
) -> None:
    """average <- beta average + (1 - beta) param on the entries that the masks allow, in place.

    beta is the weight that `ema_update_` gives by a rule, with 1 - base_weight as its base. It makes L(average) -
    L(param) + average - average_before stationary to second order, which gives beta = (L' + 1) / (d L'') for
    d = param - average_before: where much has moved along directions of high curvature, the new value is taken over.

    Args:
        averages, params: lists of equal length. rule: further arguments of `ema_update_`.
        base_weight: weight of the parameter where the rule falls back, in (0, 1).
    """
    # the rule sees |d| alone, so the average may take the place of the parameter
    fresh = [param.detach().clone() for param in params]
    ema_update_(fresh, averages, base_weight=1.0 - base_weight, masks=masks, **rule)
    ema_update_(averages, fresh, decay=0.0, masks=masks)
