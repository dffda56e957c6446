"""Tables of numbers that let one C++ call work on a whole list of tensors.

A call brings hundreds of tensors: handing each over takes longer than looking up its address and size here, once.
"""

# n tensors, k lists

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import DTYPE, are_contiguous, dtypes_in, shapes_of
from .masks import NONE

__all__ = ["addresses", "list_table", "number_table", "slices"]

#: torch's own numbers of the dtypes
DTYPE_CODE = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def number_table(numbers: Sequence[int]) -> Tensor:
    """int64 `[len(numbers)]`."""
    if not numbers:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(struct.pack(f"{len(numbers)}q", *numbers)), dtype=torch.int64)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's numbers begin."""
    return list(map(Tensor.data_ptr, tensors))


@functools.lru_cache(maxsize=4096)
def _slice(shape: torch.Size, dim: int) -> tuple[int, int]:
    if dim >= 0:
        return shape[dim], math.prod(shape[dim + 1 :])
    return (0 if dim == NONE else math.prod(shape)), 1


def slices(tensors: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each tensor how many slices its dimension has, and how many consecutive numbers each.

    Below 0 a slice is one number, and there are none for NONE.
    """
    numbers, inner = zip(*map(_slice, shapes_of(tensors), dims), strict=True)
    return list(numbers), list(inner)


def list_table(
    streams: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int]
) -> Tensor:
    """What C++ has to know of k lists of contiguous tensors, which an update goes through together, and their masks.

    int64: n, whether there are masks, and of each list its dtype, or -1 where it has several; then sizes `[n]`, of each
    list addresses `[n]` and, where there are several, dtypes `[n]`; with masks their addresses, kinds, actives, numbers
    of slices and lengths of one, `[n]` each. The caller holds every tensor until the call is done.

    Raises:
        ValueError: what memory safety needs does not hold: C++ trusts the table.
    """
    sizes = list(map(Tensor.numel, streams[0]))
    if any(list(map(Tensor.numel, tensors)) != sizes for tensors in streams[1:]):
        raise ValueError("mllmcl_cpu: tensors must be of one size at each place of the lists")
    masked = kinds.count(NONE) < len(kinds)
    head, body = [len(sizes), int(masked)], sizes
    for tensors in streams:
        body += addresses(tensors)
        if len(found := dtypes_in(tensors)) == 1:
            head.append(DTYPE_CODE[found.pop()])
        else:
            head.append(-1)
            body += map(DTYPE_CODE.__getitem__, map(DTYPE, tensors))
    if masked:
        numbers, inner = slices(streams[0], kinds)
        if list(map(Tensor.numel, masks)) != numbers or dtypes_in(masks) != {torch.uint8} or not are_contiguous(masks):
            raise ValueError("mllmcl_cpu: masks must be contiguous uint8 and fit their tensors")
        body += [*addresses(masks), *kinds, *actives, *numbers, *inner]
    return number_table(head + body)
