"""Layouts in which x W^T and (s * G) B^T are one product, [x | s * G] [W | B]^T: no copy, and the result written once.

W and B that lie side by side are told by where they lie, since they are only read. Whether what lies behind the rows of
x may be overwritten is told by no stride: the columns behind a slice belong to somebody. It is noted on the storage by
`rows_with_room`, and found again through views, reshapes and `detach`, never through a copy.
"""

# T tokens, K in, N out, R sum of ranks, P numbers from one row to the next

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import expect, expect_floating, expect_shape, expect_tensor

__all__ = ["are_side_by_side", "joined_rows", "joined_weights", "room_behind", "rows_with_room", "side_by_side"]

#: rows begin at multiples of so many numbers, 128 bytes in half precision
ALIGNMENT = 64
#: the attribute of a storage that `rows_with_room` made
NOTE = "_mllmcl_rows"


@dataclass(frozen=True)
class _Rows:
    """Rows of `width` numbers, each with room up to the next one, `pitch` numbers on."""

    dtype: torch.dtype
    width: int
    pitch: int


def _pitch(numbers: int) -> int:
    return -(-numbers // ALIGNMENT) * ALIGNMENT


def side_by_side(weight: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of W and B in one buffer, row by row beside each other, which lets `lora_mix` take one product for both.

        layer.weight.data, layer.lora_b.data = side_by_side(layer.weight, layer.lora_b)

    Args:
        weight, lora_b: `[d_out, d_in]` and `[d_out, R]` of one floating dtype and device.

    Returns:
        weight and lora_b, views of one buffer `[d_out, P]`, P the multiple of 64 from d_in + R on, zeros behind both.
        Neither requires grad. Gradients of lora_b lie row by row without gaps. Files that refuse tensors which share
        memory (safetensors) take `contiguous()` copies.

    Raises:
        TypeError, ValueError: no matrices, another number of rows, dtype or device.

    >>> weight, lora_b = side_by_side(torch.ones(5, 100), torch.ones(5, 8))
    >>> weight.stride(), lora_b.storage_offset()
    ((128, 1), 100)
    """
    op = "side_by_side"
    for name, value in (("weight", weight), ("lora_b", lora_b)):
        expect_tensor(op, name, value)
        expect_floating(op, name, value)
        expect(value.dim() == 2, op, name, "a matrix", list(value.shape))
    expect(lora_b.device == weight.device, op, "lora_b", f"on {weight.device} like weight", lora_b.device)
    expect(lora_b.dtype == weight.dtype, op, "lora_b", f"of weight's dtype {weight.dtype}", lora_b.dtype, TypeError)
    (out, width), rank = weight.shape, lora_b.shape[1]
    expect_shape(op, "lora_b", lora_b, "[d_out, R]", (out, rank))
    buffer = weight.detach().new_zeros(out, _pitch(width + rank))
    # .data, so that a change of one is no change of the other to autograd
    views = buffer[:, :width].data, buffer[:, width : width + rank].data
    for view, tensor in zip(views, (weight, lora_b), strict=True):
        view.copy_(tensor.detach())
    return views


def rows_with_room(
    shape: Sequence[int], rank: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """An empty tensor `[..., d_in]` with room for `rank` more numbers behind each row, which `lora_mix` may fill.

    What writes its result there (a norm, `out=`, `copy_`) spares `lora_mix` the copy of x in the one product with W and
    B `side_by_side`. The numbers behind the rows belong to the layers that read them, on one stream at a time; whatever
    they hold is ignored. Made inside of a compiled graph it is a tensor like any other, and x is copied.

    Args:
        shape: of the tensor, d_in last.
        rank: the most ranks R of the layers that read it.
        dtype, device: as for `torch.empty`.

    Raises:
        ValueError: no dimension, or a negative rank.

    >>> x = rows_with_room((2, 3, 100), 8).copy_(torch.ones(2, 3, 100))
    >>> x.shape, x.stride()
    (torch.Size([2, 3, 100]), (384, 128, 1))
    """
    op = "rows_with_room"
    expect(len(shape) >= 1, op, "shape", "of one dimension or more", list(shape))
    expect(rank >= 0, op, "rank", "0 or more", rank)
    *lead, width = shape
    pitch = _pitch(width + rank)
    buffer = torch.empty((math.prod(lead), pitch), dtype=dtype, device=device)
    rows = buffer.view(*lead, pitch)[..., :width]
    # a compiler notes nothing on storages
    if torch.compiler.is_compiling():
        return rows
    setattr(buffer.untyped_storage(), NOTE, _Rows(buffer.dtype, width, pitch))
    # .data is no view to autograd, which would keep track of what lies behind the rows
    return rows.data


def room_behind(x: Tensor, rank: int) -> Tensor | None:
    """The `rank` numbers behind each row of x [T, K] as [T, R], where they are known to be free, else None.

    Writing there is no change of x to autograd.
    """
    rows = getattr(x.untyped_storage(), NOTE, None)
    if rows is None or x.dtype != rows.dtype or x.stride(1) != 1:
        return None
    step, start, width = x.stride(0), x.storage_offset() % rows.pitch, x.shape[1]
    # x may be some rows, or the last columns of all
    at_end = start + width == rows.width and rows.width + rank <= rows.pitch
    if not at_end or step < rows.pitch or step % rows.pitch != 0:
        return None
    return x.data.as_strided((x.shape[0], rank), (step, 1), x.storage_offset() + width)


def are_side_by_side(weight: Tensor, lora_b: Tensor) -> bool:
    """Whether the rows of B [N, R] begin where those of W [N, K] end, so that both are one matrix in memory."""
    step, width, rank = weight.stride(0), weight.shape[1], lora_b.shape[1]
    # first what tells almost all other tensors apart
    return (
        lora_b.storage_offset() == weight.storage_offset() + width
        and weight.dtype == lora_b.dtype
        and rank > 0
        and weight.stride() == lora_b.stride() == (step, 1)
        and step >= width + rank
        and weight.untyped_storage().data_ptr() == lora_b.untyped_storage().data_ptr()
    )


def joined_weights(weight: Tensor, lora_b: Tensor) -> Tensor:
    """[W | B] [N, K + R] where they lie."""
    return weight.as_strided((weight.shape[0], weight.shape[1] + lora_b.shape[1]), weight.stride())


def joined_rows(x: Tensor, mixed: Tensor) -> Tensor:
    """[x | s * G] [T, K + R]: where x lies if there is room behind its rows, else a copy."""
    (tokens, width), rank = x.shape, mixed.shape[1]
    behind = room_behind(x, rank)
    if behind is None:
        rows = x.new_empty(tokens, _pitch(width + rank))[:, : width + rank]
        rows[:, :width].copy_(x)
        rows[:, width:].copy_(mixed)
        return rows
    if (mixed.data_ptr(), mixed.stride()) != (behind.data_ptr(), behind.stride()):
        behind.copy_(mixed)
    return x.data.as_strided((tokens, width + rank), x.stride())
