"""Tables of numbers that let one C++ call work on a whole list of tensors.

A call brings hundreds of tensors: handing each over takes longer than looking up its address and size here, once.
"""

# n tensors

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from .checks import DTYPE, are_contiguous, dtypes_in, shapes_of
from .masks import NONE

__all__ = ["addresses", "list_table", "number_table", "slices"]

#: torch's own numbers of the dtypes
DTYPE_CODE = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def number_table(rows: Sequence[Iterable[int]]) -> Tensor:
    """int64 `[len(rows), n]`."""
    numbers = array("q", chain(*rows))
    if not numbers:
        return torch.empty(len(rows), 0, dtype=torch.int64)
    return torch.frombuffer(numbers, dtype=torch.int64).view(len(rows), -1)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's numbers begin."""
    return list(map(Tensor.data_ptr, tensors))


def _codes(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(DTYPE_CODE.__getitem__, map(DTYPE, tensors)))


@functools.lru_cache(maxsize=4096)
def _slice(shape: torch.Size, dim: int) -> tuple[int, int]:
    return (shape[dim], math.prod(shape[dim + 1 :])) if dim >= 0 else (1, 1)


def slices(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[tuple[int, int]]:
    """Of each tensor how many slices its dimension has, and how many consecutive numbers each; (1, 1) below 0."""
    return list(map(_slice, shapes_of(tensors), dims))


def list_table(
    streams: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int]
) -> Tensor:
    """int64 `[2 k + 6, n]` of k lists that an elementwise update goes through together, and their masks.

    Of each list all addresses and all dtypes; then sizes, addresses of masks, kinds, actives, and of row masks the
    number of slices and the length of one. The caller holds every tensor until the call is done.

    Raises:
        ValueError: what memory safety needs does not hold: C++ trusts the table.
    """
    count = len(streams[0])
    sizes = list(map(Tensor.numel, streams[0]))
    alike = all(len(tensors) == count and list(map(Tensor.numel, tensors)) == sizes for tensors in streams[1:])
    if not (alike and are_contiguous(*streams)):
        raise ValueError("mllmcl_cpu: tensors must be contiguous and of one size at each place of the lists")
    rows: list[Iterable[int]] = [row for tensors in streams for row in (addresses(tensors), _codes(tensors))]
    if kinds.count(NONE) == count:
        return number_table([*rows, sizes, [0] * count, [NONE] * count, [0] * count, [1] * count, [1] * count])
    lengths, inner = map(list, zip(*slices(streams[0], kinds), strict=True))
    wanted = [length if kind >= 0 else size for kind, length, size in zip(kinds, lengths, sizes, strict=True)]
    found = map(Tensor.numel, masks)
    fit = all(n == want or kind == NONE for n, want, kind in zip(found, wanted, kinds, strict=True))
    if not (fit and are_contiguous(masks) and dtypes_in(masks) == {torch.uint8}):
        raise ValueError("mllmcl_cpu: masks must be contiguous uint8 and fit their tensors")
    return number_table([*rows, sizes, addresses(masks), kinds, actives, lengths, inner])
