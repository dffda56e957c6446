"""`ema_update_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import ELEMENTS, NONE, broadcast_mask

__all__ = ["CONSTANT", "DEMA", "PEMA", "ema_update_reference"]

CONSTANT, DEMA, PEMA = 0, 1, 2


def _group_sums(values: Tensor, group: int, ranks: list[int]) -> Tensor:
    """Of each entry the sum over its group, broadcastable to the values."""
    if group == ELEMENTS:
        return values
    if group == NONE:
        return values.sum()
    rest = [dim for dim in range(values.dim()) if dim != group]
    sums = values.sum(rest, keepdim=True) if rest else values
    if not ranks:
        return sums
    experts = [expert for expert, rank in enumerate(ranks) for _ in range(rank)]
    owner = torch.tensor(experts, device=values.device)
    same = owner[:, None] == owner
    return torch.where(same, sums.flatten(), 0.0).sum(1).view(sums.shape)


def _dema(d: Tensor, g: Tensor, before: Tensor, total, factor: float, fallback: float) -> Tensor:
    weight = factor * (1.0 + total(g.abs())) / (total(d.abs()) * total((g - before).abs()))
    return torch.where((weight > 0.0) & (weight < 1.0), weight, fallback)


def _pema(d: Tensor, square: Tensor, total, whole, base: float) -> Tensor:
    one = torch.ones_like(d)
    of_group = [total(value) / total(one) for value in (d.abs(), square)]
    of_tensor = [whole(value) / whole(one) for value in (d.abs(), square)]
    weight = base * (of_tensor[0] / of_group[0]) * (of_tensor[1] / of_group[1])
    return torch.where(weight.isnan(), base, weight.clamp(0.1 * base, 1.0))


def ema_update_reference(
    averages: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    squared_grads: list[Tensor],
    masks: list[Tensor],
    kinds: list[int],
    actives: list[int],
    rule: int,
    weight: float,
    factor: float,
    groups: list[int],
    ranks: list[int],
) -> None:
    """average += w (param - average) on the entries that the masks allow, w as the rule says."""
    for index, (average, param) in enumerate(zip(averages, params, strict=True)):
        wide = torch.float64 if average.dtype == torch.float64 else torch.float32
        keep = broadcast_mask(masks[index], kinds[index], actives[index], average.dim())

        def total(values: Tensor, group: int = groups[index], keep: Tensor = keep) -> Tensor:
            return _group_sums(torch.where(keep, values, 0.0), group, ranks)

        def whole(values: Tensor, total=total) -> Tensor:
            return total(values, NONE)

        old = average.to(wide)
        d = param.to(wide) - old
        w = weight
        if rule == DEMA:
            w = _dema(d, grads[index].to(wide), previous_grads[index].to(wide), total, factor, weight)
        elif rule == PEMA:
            w = _pema(d, squared_grads[index].to(wide), total, whole, weight)
        average.copy_(torch.where(keep, (old + w * d).to(average.dtype), average))
