"""`sampled_product_l1` in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sampled_product_l1_backward_reference", "sampled_product_l1_reference"]

# P columns of all A, Q rows of all B, r rank, n sampled entries of all layers


def _entries(columns: Tensor, rows_of_b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The chosen entries of B A, `[n]` in float32 or better."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    return (rows_of_b.index_select(0, rows).to(wide) * columns.index_select(0, cols).to(wide)).sum(1)


def sampled_product_l1_reference(
    columns: Tensor, rows_of_b: Tensor, rows: Tensor, cols: Tensor, weights: Tensor
) -> Tensor:
    """Sum of weight |<b_row, a_col>| with columns `[P, r]`, rows_of_b `[Q, r]`, places and weights `[n]`."""
    entries_n = _entries(columns, rows_of_b, rows, cols)
    return (entries_n.abs() * weights.to(entries_n.dtype)).sum()


def sampled_product_l1_backward_reference(
    d_loss: Tensor,
    columns: Tensor,
    rows_of_b: Tensor,
    rows: Tensor,
    cols: Tensor,
    weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Scatter d weight sign(entry) b_row to the columns of A, and a_col to the rows of B; empty where not needed."""
    entries_n = _entries(columns, rows_of_b, rows, cols)
    wide = entries_n.dtype
    slope_n1 = (d_loss.to(wide) * weights.to(wide) * entries_n.sign())[:, None]

    def scattered(like: Tensor, places: Tensor, other: Tensor, others: Tensor) -> Tensor:
        # index_put_ sorts the places where it runs in parallel, so that sums keep their order
        total = torch.zeros_like(like, dtype=wide)
        total.index_put_((places,), slope_n1 * other.index_select(0, others).to(wide), accumulate=True)
        return total.to(like.dtype)

    d_columns = scattered(columns, cols, rows_of_b, rows) if needs[0] else columns.new_empty(0)
    d_rows = scattered(rows_of_b, rows, columns, cols) if needs[1] else rows_of_b.new_empty(0)
    return d_columns, d_rows
