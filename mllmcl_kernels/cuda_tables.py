"""Tables on the device that let one CUDA launch work on a whole list of tensors."""

# n tensors, c chunks

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .layouts import slices
from .masks import NONE

__all__ = ["CHUNK", "DTYPE_CODE", "chunk_starts", "entry", "tables"]

#: numbers of one block of threads; a multiple of four
CHUNK = 4096
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def entry(tensor: Tensor, pointers: Sequence[int], mask: Tensor, kind: int, active: int) -> tuple[int, ...]:
    """One row of the tensor table: param, grad, mean, square, mask, numel, kind, active, rows, inner."""
    (rows,), (inner,) = slices([tensor], [kind]) if kind >= 0 else ((1,), (1,))
    pointer = 0 if kind == NONE else mask.data_ptr()
    return (*pointers, pointer, tensor.numel(), kind, active, max(rows, 1), max(inner, 1))


def chunk_starts(sizes: Sequence[int], chunk: int = CHUNK) -> list[tuple[int, int]]:
    """(tensor, first number) of every block's work; tensors without numbers have none."""
    return [(index, start) for index, size in enumerate(sizes) for start in range(0, size, chunk)]


# host memory that a captured CUDA graph copies from at every replay
_kept_for_replays: list[Tensor] = []


def _on_device(values: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    """int64 [n, width], copied from pinned memory without a host wait."""
    host = torch.tensor(values, dtype=torch.int64).reshape(-1, width).pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _kept_for_replays.append(host)
    return host.to(device, non_blocking=True)


def _entry_table(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return _on_device(entries, 10, device)


def _chunk_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return _on_device(chunk_starts(sizes), 2, device)


# gradients may move from step to step, their sizes do not
_cached_entries, _cached_chunks = functools.lru_cache(32)(_entry_table), functools.lru_cache(32)(_chunk_table)


def tables(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables as int64 on the device: `[n, 10]` and `[c, 2]`, each kept while what it is made of stays the same.

    A captured CUDA graph makes its own, since they live in its memory.
    """
    sizes = tuple(row[5] for row in entries)
    if torch.cuda.is_current_stream_capturing():
        return _entry_table(entries, device), _chunk_table(sizes, device)
    return _cached_entries(entries, device), _cached_chunks(sizes, device)
