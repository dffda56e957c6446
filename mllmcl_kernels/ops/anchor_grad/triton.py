"""`anchor_grad_` in Triton: one launch over all tensors that share their four dtypes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...device_tables import chunk_table, masked_by_dtypes
from ...triton_tools import CHUNK, chunk_constants, chunk_mask, chunk_of, dtypes_reason, launch, lives_there
from . import anchor_grad_op

__all__: list[str] = []

BLOCK = 1024


@triton.jit
def _anchor_grad_kernel(
    g_like_ptr, p_like_ptr, anchor_like_ptr, f_like_ptr, rows_ptr, chunks_ptr, strength_ptr, strength,
    THERE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad += strength importance (param - anchor) on one chunk; the `like` pointers give the dtypes."""
    if THERE:
        strength = tl.load(strength_ptr).to(tl.float32)
    row_ptr, first, end = chunk_of(rows_ptr, chunks_ptr, WIDTH, CHUNK)
    g_ptr = tl.load(row_ptr).to(g_like_ptr.dtype)
    p_ptr = tl.load(row_ptr + 1).to(p_like_ptr.dtype)
    anchor_ptr = tl.load(row_ptr + 2).to(anchor_like_ptr.dtype)
    f_ptr = tl.load(row_ptr + 3).to(f_like_ptr.dtype)
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        keep = chunk_mask(row_ptr, entries, entries < end, WIDTH, WIDE)
        moved = tl.load(p_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        moved -= tl.load(anchor_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + entries, mask=keep, other=0.0).to(tl.float32) + strength * (f * moved)
        tl.store(g_ptr + entries, g.to(g_like_ptr.dtype.element_ty), mask=keep)


def _supports(grads, params, anchors, importances, *_rest) -> str | None:
    return dtypes_reason(grads, params, anchors, importances)


@anchor_grad_op.provider("triton", supports=_supports)
def anchor_grad_triton(grads, params, anchors, importances, masks, kinds, actives, strength: torch.Tensor):
    """One launch for each combination of dtypes; no host wait for a strength that lives on the device."""
    there = lives_there(strength, grads[0].device)
    value = 0.0 if there else float(strength)
    for flat, columns in masked_by_dtypes((grads, params, anchors, importances), (0,), masks, kinds, actives):
        table = chunk_table(flat, *columns, CHUNK)
        launch(
            _anchor_grad_kernel, (len(table.chunks),), *(tensors[0] for tensors in flat), table.rows, table.chunks,
            strength if there else table.rows, value, THERE=there, **chunk_constants(table), BLOCK=BLOCK, warps=4,
        )  # fmt: skip
