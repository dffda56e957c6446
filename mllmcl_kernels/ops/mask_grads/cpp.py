"""`mask_grads_` in C++: clears what the masks do not let through, in one parallel loop."""

from __future__ import annotations

import torch
from torch.library import Library

from ...cpu_tables import list_reason, list_table
from . import mask_grads_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("mask_grads(Tensor table) -> ()")


def _supports(grads, masks, *_rest) -> str | None:
    return list_reason((grads,), "gradients", grads)


@mask_grads_op.provider("cpp", supports=_supports)
def mask_grads_cpp(grads, masks, kinds, actives):
    table, _held = list_table((grads,), (), masks, kinds, actives)
    torch.ops.mllmcl_cpu.mask_grads(table)
