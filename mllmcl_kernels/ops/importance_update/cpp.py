"""`importance_update_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...checks import list_reason
from . import importance_update_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "importance_update(Tensor(a!)[] importances, Tensor[] grads, Tensor(b!)[] owners, Tensor[] masks, int[] kinds, "
    "int[] actives, int power, bool larger, Tensor count, int task) -> ()"
)


def _supports(importances, grads, owners, *_rest) -> str | None:
    return list_reason((importances, grads), "importances and owners", importances, owners)


@importance_update_op.provider("cpp", supports=_supports)
def importance_update_cpp(importances, grads, owners, masks, kinds, actives, power, larger, count, task):
    lists = (importances, list(map(Tensor.contiguous, grads)), owners, masks, kinds, actives)
    torch.ops.mllmcl_cpu.importance_update(*lists, power, larger, count.to(torch.float64), task)
