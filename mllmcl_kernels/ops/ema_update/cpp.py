"""`ema_update_` in C++: a tensor that fits the cache is summed up and updated in one go, larger ones in two loops."""

from __future__ import annotations

from itertools import chain

import torch
from torch.library import Library

from ...cpu_tables import list_reason, list_table, look, number_table
from ...layouts import slices
from . import ema_update_op
from .reference import CONSTANT, DEMA, PEMA

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("ema_update(Tensor table, Tensor groups, int rule, float weight, float factor, int[] ranks) -> ()")


def _supports(averages, params, grads, previous_grads, squared_grads, *_rest) -> str | None:
    return list_reason((averages, params, grads, previous_grads, squared_grads), "averages", averages)


def _at_once(lists, masks, weight) -> bool:
    """The constant rule on averages and parameters."""
    table = look(lists, masks)
    if table is None:
        return False
    torch.ops.mllmcl_cpu.ema_update.default(table, table, CONSTANT, weight, 1.0, [])
    return True


@ema_update_op.provider("cpp", supports=_supports, at_once=_at_once)
def ema_update_cpp(
    averages, params, grads, previous_grads, squared_grads, masks, kinds, actives, rule, weight, factor, groups, ranks
):
    more = {CONSTANT: (), DEMA: (grads, previous_grads), PEMA: (squared_grads,)}[rule]
    table, _held = list_table((averages,), (params, *more), masks, kinds, actives)
    shared = [] if rule == CONSTANT else [*groups, *chain(*slices(averages, groups))]
    torch.ops.mllmcl_cpu.ema_update(table, number_table(shared), rule, weight, factor, ranks)
