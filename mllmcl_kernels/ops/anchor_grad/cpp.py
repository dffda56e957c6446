"""`anchor_grad_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch.library import Library

from ...cpu_tables import list_reason, list_table
from . import anchor_grad_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("anchor_grad(Tensor table, Tensor strength) -> ()")


def _supports(grads, params, anchors, importances, *_rest) -> str | None:
    return list_reason((grads, params, anchors, importances), "gradients", grads)


@anchor_grad_op.provider("cpp", supports=_supports)
def anchor_grad_cpp(grads, params, anchors, importances, masks, kinds, actives, strength):
    table, _held = list_table((grads,), (params, anchors, importances), masks, kinds, actives)
    torch.ops.mllmcl_cpu.anchor_grad(table, strength.to(torch.float64))
