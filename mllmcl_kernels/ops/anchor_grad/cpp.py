"""`anchor_grad_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch.library import Library

from . import anchor_grad_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "anchor_grad(Tensor(a!)[] grads, Tensor[] params, Tensor[] anchors, Tensor[] importances, Tensor[] masks, "
    "int[] kinds, int[] actives, Tensor strength) -> ()"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(grads, params, anchors, importances, *_rest) -> str | None:
    for tensors in (grads, params, anchors, importances):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                return f"computes in float32, got {tensor.dtype}"
    for grad in grads:
        if not grad.is_contiguous():
            return "gradients have to be contiguous"
    return None


@anchor_grad_op.provider("cpp", supports=_supports)
def anchor_grad_cpp(grads, params, anchors, importances, masks, kinds, actives, strength):
    read = ([tensor.contiguous() for tensor in tensors] for tensors in (params, anchors, importances))
    torch.ops.mllmcl_cpu.anchor_grad(grads, *read, masks, kinds, actives, strength.to(torch.float64))
