"""`sampled_product_l1` in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sampled_product_l1_backward_reference", "sampled_product_l1_reference"]

# P columns of all A, Q rows of all B, r rank, n sampled entries of all layers


def _owners(starts: Tensor, count: int) -> Tensor:
    """Of each of the n entries the row of B, or the column of A, in whose list it stands."""
    return torch.repeat_interleave(
        torch.arange(len(starts) - 1, device=starts.device), starts.diff(), output_size=count
    )


def _entries(own: Tensor, other: Tensor, owners: Tensor, places: Tensor) -> Tensor:
    """The chosen entries of B A, `[n]` in float32 or better."""
    wide = torch.promote_types(own.dtype, torch.float32)
    return (own.index_select(0, owners).to(wide) * other.index_select(0, places).to(wide)).sum(1)


def sampled_product_l1_reference(
    columns: Tensor,
    rows_of_b: Tensor,
    row_starts: Tensor,
    cols: Tensor,
    row_weights: Tensor,
    col_starts: Tensor,
    rows: Tensor,
    col_weights: Tensor,
) -> Tensor:
    """Sum of weight |<b_row, a_col>| with columns `[P, r]` and rows_of_b `[Q, r]`.

    Entries are listed twice: row by row (the entries of row q are `cols[row_starts[q] : row_starts[q + 1]]`) and column
    by column (`rows`, `col_starts`); this reads the first, the backward both. Weights are those of the layer.
    """
    owners = _owners(row_starts, len(cols))
    entries_n = _entries(rows_of_b, columns, owners, cols)
    return (entries_n.abs() * row_weights.to(entries_n.dtype).index_select(0, owners)).sum()


def _slope(own: Tensor, other: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """weight sum of sign(<own, other>) other over the entries of each row of `own`."""
    owners = _owners(starts, len(places))
    entries_n = _entries(own, other, owners, places)
    wide = entries_n.dtype
    slope_n1 = (weights.to(wide).index_select(0, owners) * entries_n.sign())[:, None]
    total = own.new_zeros(own.shape, dtype=wide)
    # index_put_ sorts the places where it runs in parallel, so that sums keep their order
    total.index_put_((owners,), slope_n1 * other.index_select(0, places).to(wide), accumulate=True)
    return total.to(own.dtype)


def sampled_product_l1_backward_reference(
    d_loss: Tensor,
    columns: Tensor,
    rows_of_b: Tensor,
    row_starts: Tensor,
    cols: Tensor,
    row_weights: Tensor,
    col_starts: Tensor,
    rows: Tensor,
    col_weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """d weight sign(entry) b_row for the columns of A, and a_col for the rows of B; empty where not needed."""
    empty = columns.new_empty(0)
    d_columns = _slope(columns, rows_of_b, col_starts, rows, col_weights * d_loss) if needs[0] else empty
    d_rows = _slope(rows_of_b, columns, row_starts, cols, row_weights * d_loss) if needs[1] else empty.clone()
    return d_columns, d_rows
