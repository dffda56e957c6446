"""`importance_update_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...checks import dtypes_in
from ...cpu_tables import list_reason, list_table, number_table
from ...layouts import addresses, lie_alike
from . import importance_update_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("importance_update(Tensor table, Tensor owners, int power, bool larger, Tensor count, int task) -> ()")


def _supports(importances, grads, owners, *_rest) -> str | None:
    return list_reason((importances, grads), "importances and owners", importances, owners)


@importance_update_op.provider("cpp", supports=_supports)
def importance_update_cpp(importances, grads, owners, masks, kinds, actives, power, larger, count, task):
    sizes = list(map(Tensor.numel, importances))
    if owners and not (
        list(map(Tensor.numel, owners)) == sizes
        and dtypes_in(owners) == {torch.uint8}
        and lie_alike(importances, owners)
    ):
        raise ValueError("mllmcl_cpu: owners must be uint8 of the importances' sizes")
    table, _held = list_table((importances,), (grads,), masks, kinds, actives)
    maps = number_table(addresses(owners))
    torch.ops.mllmcl_cpu.importance_update(table, maps, power, larger, count.to(torch.float64), task)
