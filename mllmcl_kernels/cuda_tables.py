"""Tables on the device that let one CUDA launch work on a whole list of tensors."""

# n tensors, c chunks

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import NONE

__all__ = ["CHUNK", "DTYPE_CODE", "chunk_starts", "entry", "tables"]

#: numbers of one block of threads; a multiple of four
CHUNK = 4096
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def entry(tensor: Tensor, pointers: Sequence[int], mask: Tensor, kind: int, active: int) -> tuple[int, ...]:
    """One row of the tensor table: param, grad, mean, square, mask, numel, kind, active, rows, inner."""
    rows, inner = 1, 1
    if kind >= 0:
        rows = tensor.shape[kind]
        for size in tensor.shape[kind + 1 :]:
            inner *= size
    pointer = 0 if kind == NONE else mask.data_ptr()
    return (*pointers, pointer, tensor.numel(), kind, active, max(rows, 1), max(inner, 1))


def chunk_starts(sizes: Sequence[int], chunk: int = CHUNK) -> list[tuple[int, int]]:
    """(tensor, first number) of every block's work; tensors without numbers have none."""
    return [(index, start) for index, size in enumerate(sizes) for start in range(0, size, chunk)]


@functools.lru_cache(maxsize=32)
def tables(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables as int64 on the device: `[n, 10]` and `[c, 2]`.

    Copied from pinned memory without a host wait, and kept while addresses, sizes and masks stay what they are.
    """
    starts = chunk_starts([row[5] for row in entries])
    made = []
    for values, width in ((entries, 10), (starts, 2)):
        host = torch.tensor(values, dtype=torch.int64).reshape(-1, width).pin_memory()
        made.append(host.to(device, non_blocking=True))
    return made[0], made[1]
