"""`mask_grads_` in CUDA C++: one launch over all gradients of a dtype."""

from __future__ import annotations

import torch
from torch.library import Library

from ...cuda_tables import CHUNK, DTYPE_CODE, entry, tables
from ...layouts import laid_masks, lie_alike
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
    # held until the launch is queued: a copy must not be freed before
    masks = laid_masks(grads, masks, kinds)
    by_dtype: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for grad, mask, kind, active in zip(grads, masks, kinds, actives, strict=True):
        if kind != NONE:
            pointers = (0, grad.data_ptr(), 0, 0)
            by_dtype.setdefault(grad.dtype, []).append(entry(grad, pointers, mask, kind, active))
    for dtype, entries in by_dtype.items():
        table = tables(tuple(entries), grads[0].device)
        torch.ops.mllmcl_cuda.mask_grads(*table, CHUNK, DTYPE_CODE[dtype])
