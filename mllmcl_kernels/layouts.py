"""How tensors lie in memory: an update of entries goes through them as they lie, whatever the order of dimensions.

A tensor without gaps lies row by row or, a matrix alone, column by column: B `[N, R]` that lies by columns has each
expert in one piece.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import DTYPE, are_contiguous, shapes_of
from .masks import ELEMENTS, NONE, OWNER

__all__ = [
    "COLUMNS",
    "ROWS",
    "addresses",
    "by_columns",
    "dense_rows",
    "laid_like",
    "laid_masks",
    "lie_alike",
    "lies",
    "mask_bytes",
    "seen",
    "seen_as",
    "slices",
]

ROWS, COLUMNS = 0, 1


@functools.lru_cache(maxsize=4096)
def _lies(shape: torch.Size, stride: tuple[int, ...]) -> int | None:
    if math.prod(shape) == 0:
        return ROWS
    # where a dimension has one entry its stride says nothing
    inner = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if all(size == 1 or step == whole for size, step, whole in zip(shape, stride, inner, strict=True)):
        return ROWS
    return COLUMNS if len(shape) == 2 and stride == (1, shape[0]) else None


def lies(tensor: Tensor) -> int | None:
    """ROWS, COLUMNS, or None for a tensor with gaps or another order."""
    return _lies(tensor.shape, tensor.stride())


def by_columns(matrix: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in a column, gaps or not: how torch lays what is made like it."""
    return matrix.stride(0) < matrix.stride(1)


def dense_rows(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where neighbours in a row are not neighbours in memory; its rows may lie apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes without gaps, None where there is none."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _strides(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return list(map(Tensor.stride, tensors))


def _orders(tensors: Sequence[Tensor]) -> list[int | None]:
    return list(map(_lies, shapes_of(tensors), _strides(tensors)))


def lie_alike(heads: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether the first list's tensors are without gaps and those of the others, if any, lie as they do."""
    if are_contiguous(heads, *others):
        return True
    strides, orders = _strides(heads), _orders(heads)
    return None not in orders and all(
        _strides(tensors) == strides or _orders(tensors) == orders for tensors in others if tensors
    )


def laid_like(heads: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those that do not lie as the heads do copied; where a head has gaps, row by row."""
    if are_contiguous(heads, tensors):
        return list(tensors)
    strides = _strides(heads)
    if _strides(tensors) == strides and None not in map(_lies, shapes_of(heads), strides):
        return list(tensors)
    return list(map(_like, heads, tensors))


def _like(head: Tensor, tensor: Tensor) -> Tensor:
    order = lies(head)
    if order is not None and lies(tensor) == order:
        return tensor
    return tensor.t().contiguous().t() if order == COLUMNS else tensor.contiguous()


def laid_masks(heads: Sequence[Tensor], masks: Sequence[Tensor], kinds: Sequence[int]) -> list[Tensor]:
    """Masks as `flatten_masks` gives them, those of single entries laid as the heads are."""
    by_entry = {ELEMENTS, OWNER}
    if are_contiguous(masks) and (by_entry.isdisjoint(kinds) or are_contiguous(heads)):
        return list(masks)
    return [
        _like(head, mask) if kind in by_entry else mask.contiguous()
        for head, mask, kind in zip(heads, masks, kinds, strict=True)
    ]


@functools.lru_cache(maxsize=4096)
def _slice(shape: torch.Size, stride: tuple[int, ...] | None, dim: int) -> tuple[int, int]:
    if dim >= 0:
        by_columns = stride is not None and _lies(shape, stride) == COLUMNS
        return shape[dim], math.prod(shape[:dim] if by_columns else shape[dim + 1 :])
    return (0 if dim == NONE else math.prod(shape)), 1


def slices(tensors: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each tensor how many slices its dimension has, and how many consecutive numbers each, as they lie.

    Below 0 a slice is one number, and there are none for NONE.
    """
    strides = itertools.repeat(None) if are_contiguous(tensors) else _strides(tensors)
    found = map(_slice, shapes_of(tensors), strides, dims)
    numbers, inner = zip(*found, strict=True) if tensors else ((), ())
    return list(numbers), list(inner)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's numbers begin."""
    return list(map(Tensor.data_ptr, tensors))


def seen(lists: Sequence[Sequence[Tensor]]) -> list:
    """Where the tensors of the lists are, and what they are taken for there."""
    return [(addresses(tensors), seen_as(tensors)) for tensors in lists]


def seen_as(tensors: Sequence[Tensor]) -> tuple:
    """What the bytes of the tensors are taken for, wherever they are."""
    return list(map(Tensor.numel, tensors)), _strides(tensors), list(map(DTYPE, tensors))
