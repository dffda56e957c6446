"""`mask_grads_` in CUDA C++: one launch over all gradients of a dtype."""

from __future__ import annotations

import torch
from torch.library import Library

from ...cuda_launch import CHUNK, DTYPE_CODE
from ...device_tables import chunk_table, masked_by_dtypes
from ...layouts import lie_alike
from ...masks import NONE
from . import mask_grads_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cuda", "FRAGMENT")
LIBRARY.define("mask_grads(Tensor entries, Tensor chunks, int chunk_size, int dtype) -> ()")


def _supports(grads, *_rest) -> str | None:
    for grad in grads:
        if grad.dtype not in DTYPE_CODE:
            return f"clears float32, bfloat16 and float16, got {grad.dtype}"
    return None if lie_alike(grads) else "gradients must lie in memory without gaps"


@mask_grads_op.provider("cuda", supports=_supports)
def mask_grads_cuda(grads, masks, kinds, actives):
    masked = [place for place, kind in enumerate(kinds) if kind != NONE]
    chosen, *flags = ([values[place] for place in masked] for values in (grads, masks, kinds, actives))
    for (flat,), columns in masked_by_dtypes([chosen], (), *flags):
        # the kernel's rows are AdamW's, of which it reads the gradient's address
        table = chunk_table([flat] * 4, *columns, CHUNK)
        torch.ops.mllmcl_cuda.mask_grads(table.rows, table.chunks, CHUNK, DTYPE_CODE[flat[0].dtype])
