"""`importance_update_` in Triton: one launch over all tensors that share their dtypes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...device_tables import chunk_table, masked_by_dtypes
from ...triton_tools import CHUNK, chunk_constants, chunk_mask, chunk_of, dtypes_reason, launch, lives_there
from . import importance_update_op

__all__: list[str] = []

BLOCK = 1024


@triton.jit
def _importance_update_kernel(
    f_like_ptr, g_like_ptr, rows_ptr, chunks_ptr, count_ptr, share, task,
    POWER: tl.constexpr, LARGER: tl.constexpr, OWNED: tl.constexpr, THERE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A running mean or maximum of |grad|^POWER on one chunk; the `like` pointers give the dtypes."""
    if THERE:
        share = tl.div_rn(1.0, tl.load(count_ptr).to(tl.float32))
    row_ptr, first, end = chunk_of(rows_ptr, chunks_ptr, WIDTH, CHUNK)
    f_ptr = tl.load(row_ptr).to(f_like_ptr.dtype)
    g_ptr = tl.load(row_ptr + 1).to(g_like_ptr.dtype)
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        keep = chunk_mask(row_ptr, entries, entries < end, WIDTH, WIDE)
        old = tl.load(f_ptr + entries, mask=keep, other=0.0)
        g = tl.load(g_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        value = g * g if POWER == 2 else tl.abs(g)
        if LARGER:
            # compared as it would be stored, so that an equal one changes no owner
            new = value.to(f_like_ptr.dtype.element_ty)
            before, after = old.to(tl.float32), new.to(tl.float32)
            taken = keep & ((after > before) | ((after != after) & (before == before)))
            tl.store(f_ptr + entries, new, mask=taken)
            if OWNED:
                owner_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.uint8))
                tl.store(owner_ptr + entries, (tl.zeros((BLOCK,), tl.int32) + task).to(tl.uint8), mask=taken)
        else:
            mean = old.to(tl.float32) + (value - old.to(tl.float32)) * share
            tl.store(f_ptr + entries, mean.to(f_like_ptr.dtype.element_ty), mask=keep)


def _supports(importances, grads, *_rest) -> str | None:
    return dtypes_reason(importances, grads)


@importance_update_op.provider("triton", supports=_supports)
def importance_update_triton(
    importances, grads, owners, masks, kinds, actives, power: int, larger: bool, count: torch.Tensor, task: int
):  # fmt: skip
    """One launch for each combination of dtypes; no host wait for a count that lives on the device."""
    there = lives_there(count, importances[0].device)
    share = 0.0 if there else 1.0 / float(count)
    lists = (importances, grads, owners) if owners else (importances, grads)
    for flat, columns in masked_by_dtypes(lists, (0, 2) if owners else (0,), masks, kinds, actives):
        table = chunk_table(flat, *columns, CHUNK)
        launch(
            _importance_update_kernel, (len(table.chunks),), flat[0][0], flat[1][0], table.rows, table.chunks,
            count if there else table.rows, share, task, POWER=power, LARGER=larger, OWNED=bool(owners), THERE=there,
            **chunk_constants(table), BLOCK=BLOCK, warps=4,
        )  # fmt: skip
