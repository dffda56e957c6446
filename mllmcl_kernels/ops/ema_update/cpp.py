"""`ema_update_` in C++: a tensor that fits the cache is summed up and updated in one go, larger ones in two loops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...checks import list_reason
from . import ema_update_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "ema_update(Tensor(a!)[] averages, Tensor[] params, Tensor[] grads, Tensor[] previous_grads, "
    "Tensor[] squared_grads, Tensor[] masks, int[] kinds, int[] actives, int rule, float weight, float factor, "
    "int[] groups, int[] ranks) -> ()"
)


def _supports(averages, params, grads, previous_grads, squared_grads, *_rest) -> str | None:
    return list_reason((averages, params, grads, previous_grads, squared_grads), "averages", averages)


@ema_update_op.provider("cpp", supports=_supports)
def ema_update_cpp(averages, params, grads, previous_grads, squared_grads, *options):
    read = (list(map(Tensor.contiguous, tensors)) for tensors in (params, grads, previous_grads, squared_grads))
    torch.ops.mllmcl_cpu.ema_update(averages, *read, *options)
