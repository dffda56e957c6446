"""`sampled_product_l1` in C++: a row of B, or a column of A, at a time with all its entries; nothing of size [n, r]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from . import sampled_product_l1_backward_op, sampled_product_l1_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
FACTORS = "Tensor own, Tensor sources, Tensor starts, Tensor places"
LIBRARY.define(f"sampled_product_sums({FACTORS}, Tensor(a!) sums) -> ()")
LIBRARY.define(f"sampled_product_slope({FACTORS}, Tensor weights, Tensor(a!) grad) -> ()")
OPS = torch.ops.mllmcl_cpu
LANES = 8


def _float_path(columns: Tensor, rows_of_b: Tensor) -> str | None:
    for tensor in (columns, rows_of_b):
        if tensor.dtype == torch.float64:
            return f"computes in float32, got {tensor.dtype}"
    return "there is no rank" if columns.shape[1] == 0 else None


def _widened(factor: Tensor) -> Tensor:
    """float32 with a rank of whole vectors; added ranks are zero."""
    return torch.nn.functional.pad(factor.float(), (0, -factor.shape[1] % LANES)).contiguous()


def _slope(own: Tensor, sources: Tensor, starts: Tensor, places: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    grad = torch.empty_like(own)
    OPS.sampled_product_slope(own, sources, starts, places, weights, grad)
    return grad[:, : like.shape[1]].to(like.dtype).contiguous()


@sampled_product_l1_op.provider("cpp", supports=lambda columns, rows_of_b, *_rest: _float_path(columns, rows_of_b))
def sampled_product_l1_cpp(columns, rows_of_b, row_starts, cols, row_weights, col_starts, rows, col_weights):
    sums = torch.empty_like(row_weights)
    lists = (row_starts.contiguous(), cols.contiguous())
    OPS.sampled_product_sums(_widened(rows_of_b), _widened(columns), *lists, sums)
    return torch.dot(sums, row_weights)


@sampled_product_l1_backward_op.provider(
    "cpp", supports=lambda d_loss, columns, rows_of_b, *_rest: _float_path(columns, rows_of_b)
)
def sampled_product_l1_backward_cpp(
    d_loss, columns, rows_of_b, row_starts, cols, row_weights, col_starts, rows, col_weights, needs
):  # fmt: skip
    wide_columns, wide_rows = _widened(columns), _widened(rows_of_b)
    by_col = (col_starts.contiguous(), rows.contiguous(), d_loss * col_weights)
    by_row = (row_starts.contiguous(), cols.contiguous(), d_loss * row_weights)
    d_columns = _slope(wide_columns, wide_rows, *by_col, columns) if needs[0] else columns.new_empty(0)
    d_rows = _slope(wide_rows, wide_columns, *by_row, rows_of_b) if needs[1] else rows_of_b.new_empty(0)
    return d_columns, d_rows
