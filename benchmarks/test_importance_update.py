"""`importance_update_` beside torch._foreach and a loop over tensors: means of squares, maxima with owners."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mllmcl_kernels import importance_update_

from .cases import ListCase
from .lists import draw, masks_of, race_lists

COUNT, TASK = 8, 3


def foreach_mean(importances: list[Tensor], grads: list[Tensor]) -> None:
    torch._foreach_lerp_(importances, torch._foreach_mul(grads, grads), 1 / COUNT)


def loop_mean(importances: list[Tensor], grads: list[Tensor]) -> None:
    for importance, grad in zip(importances, grads, strict=True):
        importance.mul_(1 - 1 / COUNT).addcmul_(grad, grad, value=1 / COUNT)


def foreach_larger(importances: list[Tensor], grads: list[Tensor], owners: list[Tensor]) -> None:
    """There is no foreach comparison or fill: owners go tensor by tensor."""
    values = torch._foreach_abs(grads)
    for value, importance, owner in zip(values, importances, owners, strict=True):
        owner.masked_fill_(value > importance, TASK)
    torch._foreach_maximum_(importances, values)


def loop_larger(importances: list[Tensor], grads: list[Tensor], owners: list[Tensor]) -> None:
    for importance, grad, owner in zip(importances, grads, owners, strict=True):
        value = grad.abs()
        owner.masked_fill_(value > importance, TASK)
        torch.maximum(importance, value, out=importance)


def test_importance_update(benchmark, importance_case: ListCase, device, rounds):
    case = importance_case
    generator = torch.Generator(device).manual_seed(0)
    lists = {"importances": [tensor.abs() for tensor in draw(case, generator)], "grads": draw(case, generator)}
    written = ["importances"]
    if case.work == "mean of squares":
        options = {"count": COUNT}
        peers = {"torch foreach": foreach_mean, "loop": loop_mean}
    else:
        options = {"power": 1, "reduce": "max", "task": TASK}
        lists["owners"] = [torch.zeros_like(tensor, dtype=torch.uint8) for tensor in lists["grads"]]
        written.append("owners")
        peers = {"torch foreach": foreach_larger, "loop": loop_larger}
    call = functools.wraps(importance_update_)(functools.partial(importance_update_, **options))
    race_lists(benchmark, case, call, lists, written, peers, masks_of(case, generator), device, rounds)
