"""`ema_update_` in C++: a tensor that fits the cache is summed up and updated in one go, larger ones in two loops."""

from __future__ import annotations

import torch
from torch.library import Library

from . import ema_update_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "ema_update(Tensor(a!)[] averages, Tensor[] params, Tensor[] grads, Tensor[] previous_grads, "
    "Tensor[] squared_grads, Tensor[] masks, int[] kinds, int[] actives, int rule, float weight, float factor, "
    "int[] groups, int[] ranks) -> ()"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(averages, params, grads, previous_grads, squared_grads, *_rest) -> str | None:
    for tensors in (averages, params, grads, previous_grads, squared_grads):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                return f"computes in float32, got {tensor.dtype}"
    for average in averages:
        if not average.is_contiguous():
            return "averages have to be contiguous"
    return None


@ema_update_op.provider("cpp", supports=_supports)
def ema_update_cpp(averages, params, grads, previous_grads, squared_grads, *options):
    read = ([tensor.contiguous() for tensor in tensors] for tensors in (params, grads, previous_grads, squared_grads))
    torch.ops.mllmcl_cpu.ema_update(averages, *read, *options)
