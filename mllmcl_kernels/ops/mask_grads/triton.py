"""`mask_grads_` in Triton: one launch over all gradients of a dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from ...device_tables import chunk_table, masked_by_dtypes
from ...masks import NONE
from ...triton_tools import CHUNK, chunk_constants, chunk_mask, chunk_of, dtype_reason, launch
from . import mask_grads_op

__all__: list[str] = []

BLOCK = 1024


@triton.jit
def _mask_grads_kernel(
    like_ptr, rows_ptr, chunks_ptr, WIDTH: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero what the masks forbid, in one chunk; `like_ptr` gives the dtype."""
    row_ptr, first, end = chunk_of(rows_ptr, chunks_ptr, WIDTH, CHUNK)
    grad_ptr = tl.load(row_ptr).to(like_ptr.dtype)
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        inside = entries < end
        # only zeros are written: an entry that is kept is neither read nor written
        forbidden = inside & (chunk_mask(row_ptr, entries, inside, WIDTH, WIDE) == 0)
        tl.store(grad_ptr + entries, tl.zeros((BLOCK,), like_ptr.dtype.element_ty), mask=forbidden)


def _supports(grads, *_rest) -> str | None:
    return next((reason for reason in map(dtype_reason, grads) if reason), None)


@mask_grads_op.provider("triton", supports=_supports)
def mask_grads_triton(grads, masks, kinds, actives):
    """Write zeros where the masks forbid, and touch nothing else."""
    masked = [index for index, kind in enumerate(kinds) if kind != NONE]
    chosen, *flags = ([column[index] for index in masked] for column in (grads, masks, kinds, actives))
    for flat, columns in masked_by_dtypes([chosen], (0,), *flags):
        table = chunk_table(flat, *columns, CHUNK)
        launch(
            _mask_grads_kernel, (len(table.chunks),), flat[0][0], table.rows, table.chunks,
            **chunk_constants(table), BLOCK=BLOCK, warps=4,
        )  # fmt: skip
