"""`importance_update_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch.library import Library

from . import importance_update_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "importance_update(Tensor(a!)[] importances, Tensor[] grads, Tensor(b!)[] owners, Tensor[] masks, int[] kinds, "
    "int[] actives, int power, bool larger, Tensor count, int task) -> ()"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(importances, grads, owners, *_rest) -> str | None:
    for tensor in (*importances, *grads):
        if tensor.dtype not in DTYPES:
            return f"computes in float32, got {tensor.dtype}"
    for tensor in (*importances, *owners):
        if not tensor.is_contiguous():
            return "importances and owners have to be contiguous"
    return None


@importance_update_op.provider("cpp", supports=_supports)
def importance_update_cpp(importances, grads, owners, masks, kinds, actives, power, larger, count, task):
    lists = (importances, [grad.contiguous() for grad in grads], owners, masks, kinds, actives)
    torch.ops.mllmcl_cpu.importance_update(*lists, power, larger, count.to(torch.float64), task)
