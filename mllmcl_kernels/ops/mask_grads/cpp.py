"""`mask_grads_` in C++: clears what the masks do not let through, in one parallel loop."""

from __future__ import annotations

import torch
from torch.library import Library

from . import mask_grads_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("mask_grads(Tensor(a!)[] grads, Tensor[] masks, int[] kinds, int[] actives) -> ()")


def _supports(grads, masks, *_rest) -> str | None:
    for grad in grads:
        if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"clears float32, bfloat16 and float16, got {grad.dtype}"
        if not grad.is_contiguous():
            return "gradients have to be contiguous"
    return None


@mask_grads_op.provider("cpp", supports=_supports)
def mask_grads_cpp(grads, masks, kinds, actives):
    torch.ops.mllmcl_cpu.mask_grads(grads, masks, kinds, actives)
