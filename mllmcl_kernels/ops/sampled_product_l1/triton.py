"""`sampled_product_l1` in Triton: a program for each row of B, or column of A, of all layers in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_tools import dtype_reason, launch, power_of_two
from . import sampled_product_l1_backward_op, sampled_product_l1_op

__all__: list[str] = []

#: numbers of the sources that a program holds at a time
TILE = 4096


@triton.jit
def _gathered(
    own_ptr, source_ptr, places_ptr, start, end, R, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """The sources of entries `start` to `start + BLOCK_N` [BLOCK_N, BLOCK_R] and the entries [BLOCK_N] in float32."""
    ranks = tl.arange(0, BLOCK_R)
    own = tl.load(own_ptr + tl.program_id(0).to(tl.int64) * R + ranks, mask=ranks < R, other=0.0).to(tl.float32)
    ns = start + tl.arange(0, BLOCK_N)
    places = tl.load(places_ptr + ns, mask=ns < end, other=0).to(tl.int64)
    inside = (ns < end)[:, None] & (ranks < R)[None, :]
    source = tl.load(source_ptr + places[:, None] * R + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    return source, tl.where(ns < end, tl.sum(source * own[None, :], 1), 0.0)


@triton.jit
def _sampled_product_sum_kernel(
    out_ptr, own_ptr, source_ptr, starts_ptr, places_ptr, weight_ptr, R,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight times the sum of |entry| of one row of B."""
    pid = tl.program_id(0).to(tl.int64)
    end = tl.load(starts_ptr + pid + 1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.load(starts_ptr + pid), end, BLOCK_N):
        _, entries = _gathered(own_ptr, source_ptr, places_ptr, start, end, R, BLOCK_N, BLOCK_R)
        total += tl.abs(entries)
    tl.store(out_ptr + pid, tl.sum(total, 0) * tl.load(weight_ptr + pid))


@triton.jit
def _sampled_product_slope_kernel(
    grad_ptr, own_ptr, source_ptr, starts_ptr, places_ptr, weight_ptr, d_loss_ptr, R,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d weight times the sum of sign(entry) source of one row of B or one column of A."""
    pid = tl.program_id(0).to(tl.int64)
    end = tl.load(starts_ptr + pid + 1)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(tl.load(starts_ptr + pid), end, BLOCK_N):
        source, entries = _gathered(own_ptr, source_ptr, places_ptr, start, end, R, BLOCK_N, BLOCK_R)
        sign = tl.where(entries > 0.0, 1.0, tl.where(entries < 0.0, -1.0, 0.0))
        total += tl.sum(sign[:, None] * source, 0)
    total *= tl.load(weight_ptr + pid).to(tl.float32) * tl.load(d_loss_ptr).to(tl.float32)
    ranks = tl.arange(0, BLOCK_R)
    tl.store(grad_ptr + pid * R + ranks, total.to(grad_ptr.dtype.element_ty), mask=ranks < R)


def _reason(columns: Tensor, rows_of_b: Tensor) -> str | None:
    if columns.shape[1] > TILE:
        return f"triton holds a rank of at most {TILE}, got {columns.shape[1]}"
    return dtype_reason(columns, rows_of_b)


def _tile(rank: int) -> dict[str, int]:
    ranks = power_of_two(rank, 1)
    return {"BLOCK_R": ranks, "BLOCK_N": max(1, min(64, TILE // ranks)), "warps": 4}


def _slope(d_loss, own: Tensor, source: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    grad = torch.empty_like(own)
    launch(
        _sampled_product_slope_kernel, (own.shape[0],), grad, own, source, starts.contiguous(), places.contiguous(),
        weights.contiguous(), d_loss, own.shape[1], **_tile(own.shape[1]),
    )  # fmt: skip
    return grad


@sampled_product_l1_op.provider("triton", supports=lambda columns, rows_of_b, *_rest: _reason(columns, rows_of_b))
def sampled_product_l1_triton(columns, rows_of_b, row_starts, cols, row_weights, col_starts, rows, col_weights):
    """One launch over all layers; the sums of the rows are added up in their order."""
    columns, rows_of_b = columns.contiguous(), rows_of_b.contiguous()
    sums = rows_of_b.new_empty(rows_of_b.shape[0], dtype=torch.float32)
    launch(
        _sampled_product_sum_kernel, (rows_of_b.shape[0],), sums, rows_of_b, columns, row_starts.contiguous(),
        cols.contiguous(), row_weights.contiguous(), columns.shape[1], **_tile(columns.shape[1]),
    )  # fmt: skip
    return sums.sum()


@sampled_product_l1_backward_op.provider(
    "triton", supports=lambda d_loss, columns, rows_of_b, *_rest: _reason(columns, rows_of_b)
)
def sampled_product_l1_backward_triton(
    d_loss, columns, rows_of_b, row_starts, cols, row_weights, col_starts, rows, col_weights, needs
):  # fmt: skip
    """One launch for each side, which writes every gradient once."""
    columns, rows_of_b = columns.contiguous(), rows_of_b.contiguous()
    empty = columns.new_empty(0)
    d_columns = _slope(d_loss, columns, rows_of_b, col_starts, rows, col_weights) if needs[0] else empty
    d_rows = _slope(d_loss, rows_of_b, columns, row_starts, cols, row_weights) if needs[1] else empty.clone()
    return d_columns, d_rows
