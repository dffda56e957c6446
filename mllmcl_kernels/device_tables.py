"""Tables on the device that let one launch work on a whole list of tensors, and how they get there.

Triton and CUDA kernels read the same tables. The host never waits: what it writes is copied from pinned memory.
"""

# n tensors, c chunks

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import addresses, laid_like, laid_masks, lie_alike, seen, seen_as, slices
from .tuning import is_capturing

__all__ = [
    "ChunkTable",
    "KeptTables",
    "by_dtypes",
    "chunk_starts",
    "chunk_table",
    "device_tables",
    "is_wide",
    "masked_by_dtypes",
    "table_rows",
]

# host memory that a captured CUDA graph copies from at every replay
_kept_for_replays: list[Tensor] = []


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    if device.type != "cuda":
        return table.to(device)
    host = table.pin_memory()
    if is_capturing(device):
        _kept_for_replays.append(host)
    return host.to(device, non_blocking=True)


# addresses repeat from step to step, so that the copy to the device happens once
@functools.lru_cache(maxsize=64)
def _cached_tables(make: Callable[..., Sequence[Tensor]], key: tuple, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(_to_device(table, device) for table in make(*key))


def device_tables(make: Callable[..., Sequence[Tensor]], key: tuple, device: torch.device) -> tuple[Tensor, ...]:
    """The tables that `make(*key)` gives, on the device: kept while the key repeats.

    A captured CUDA graph makes its own, since they live in its memory.
    """
    if is_capturing(device):
        return tuple(_to_device(table, device) for table in make(*key))
    return _cached_tables(make, key, device)


# -- a row for each tensor, a row for each chunk of entries -----------------------------------------------------------


@dataclass(frozen=True)
class ChunkTable:
    """What a launch over many tensors reads from the device.

    rows [n, width] int64: of each tensor the address in each list, then the mask's address, its kind, id, inner length,
    number of slices, and the number of entries. chunks [c, 2] int64: tensor and first entry.
    """

    rows: Tensor
    chunks: Tensor
    #: whether some tensor has too many entries for int32
    wide: bool


def chunk_starts(sizes: Sequence[int], chunk: int) -> Tensor:
    """(tensor, first entry) of every chunk, [c, 2]; tensors without entries have none."""
    chunks_of = (torch.tensor(sizes, dtype=torch.int64) + chunk - 1) // chunk
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), chunks_of)
    first = torch.arange(len(tensor)) - torch.repeat_interleave(torch.cumsum(chunks_of, 0) - chunks_of, chunks_of)
    return torch.stack((tensor, first * chunk), 1)


def _chunks(rows: tuple[tuple[int, ...], ...], chunk: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows, dtype=torch.int64), chunk_starts([row[-1] for row in rows], chunk)


def table_rows(
    lists: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Rows of a `ChunkTable` for tensors without gaps, `lists[l][i]` all of tensor i's shape and laid alike."""
    found = slices(lists[0], kinds)
    # single entries have no slices
    numbers, lengths = (
        [count if kind >= 0 else 1 for count, kind in zip(counts, kinds, strict=True)] for counts in found
    )
    sizes = map(Tensor.numel, lists[0])
    return tuple(zip(*map(addresses, lists), addresses(masks), kinds, actives, lengths, numbers, sizes, strict=True))


def chunk_table(
    lists: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int],
    chunk: int,
) -> ChunkTable:  # fmt: skip
    """The table of tensors without gaps that lie alike, masks as `flatten_masks` gives them; `chunk` entries each."""
    rows = table_rows(lists, masks, kinds, actives)
    return ChunkTable(*device_tables(_chunks, (rows, chunk), lists[0][0].device), is_wide(rows))


def is_wide(rows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether some tensor has too many entries for int32."""
    return max(row[-1] for row in rows) >= 2**31


# -- lists of several dtypes ------------------------------------------------------------------------------------------


def _groups(lists: Sequence[Sequence[Tensor]]) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Places by their dtypes in each list; tensors without entries are left out."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, tensors in enumerate(zip(*lists, strict=True)):
        if tensors[0].numel():
            groups.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(index)
    return groups


def _in_rows(_heads: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def by_dtypes(
    lists: Sequence[Sequence[Tensor]], written: Sequence[int], *columns: Sequence, lay: Callable = _in_rows
) -> Iterator[tuple[list[list[Tensor]], list[list]]]:
    """For each combination of dtypes the tensors of every list without gaps, and the columns' values beside them.

    Tensors without entries are left out. When the caller comes back for the next ones, tensors of the lists at the
    places `written` receive what was written into their copies. `lay` copies tensors as the first list's may want it.
    """
    for indices in _groups(lists).values():
        heads = [lists[0][index] for index in indices]
        flat = [lay(heads, [tensors[index] for index in indices]) for tensors in lists]
        yield flat, [[column[index] for index in indices] for column in columns]
        for place in written:
            for index, copy in zip(indices, flat[place], strict=True):
                if copy is not lists[place][index]:
                    lists[place][index].copy_(copy)


def masked_by_dtypes(
    lists: Sequence[Sequence[Tensor]], written: Sequence[int], masks: Sequence[Tensor], kinds: Sequence[int],
    *columns: Sequence,
) -> Iterator[tuple[list[list[Tensor]], list[list]]]:  # fmt: skip
    """`by_dtypes` with tensors and masks laid as the first list's tensors lie; the columns begin with masks, kinds."""
    for flat, (some, kinds_here, *rest) in by_dtypes(lists, written, masks, kinds, *columns, lay=laid_like):
        yield flat, [laid_masks(flat[0], some, kinds_here), kinds_here, *rest]


# -- calls that come again --------------------------------------------------------------------------------------------


@dataclass
class _Kept:
    """The table of one combination of dtypes, for the tensors at `places`."""

    places: list[int]
    host: Tensor
    table: ChunkTable


class KeptTables:
    """Chunk tables for calls that come again: all lists stay where they are but for the one at `moving`.

    Making tables anew takes a call over hundreds of tensors longer than the update of a few experts.
    """

    def __init__(
        self, lists: Sequence[Sequence[Tensor]], moving: int, masks: Sequence[Tensor], kinds: Sequence[int],
        actives: Sequence[int], chunk: int,
    ) -> None:  # fmt: skip
        heads, moves = lists[0], lists[moving]
        self._staying, self._moving = [*lists[:moving], *lists[moving + 1 :]], moving
        as_read = laid_like(heads, moves)
        #: whether nothing has to be copied
        self._renewable = lie_alike(heads, *self._staying[1:]) and all(map(operator.is_, as_read, moves))
        self._masks = laid_masks(heads, masks, kinds)
        self._seen, self._moving_as, self._where = seen(self._staying), seen_as(moves), addresses(moves)
        self._device = heads[0].device
        self.kept = [self._table(places, lists, kinds, actives, chunk) for places in _groups(lists).values()]

    def _table(self, places, lists, kinds, actives, chunk: int) -> _Kept:
        def pick(values: Sequence) -> list:
            return [values[place] for place in places]

        rows = table_rows([pick(tensors) for tensors in lists], pick(self._masks), pick(kinds), pick(actives))
        host, chunks = _chunks(rows, chunk)
        with torch.inference_mode(False):
            there = (_to_device(table, self._device) for table in (host, chunks))
            return _Kept(places, host, ChunkTable(*there, is_wide(rows)))

    def renew(self, moves: Sequence[Tensor]) -> bool:
        """Write down where these tensors, which the caller holds, are; False where tables have to be made anew."""
        if not self._renewable or is_capturing(self._device):
            return False
        if seen(self._staying) != self._seen or seen_as(moves) != self._moving_as:
            return False
        where = addresses(moves)
        if where != self._where:
            self._where = where
            for kept in self.kept:
                kept.host[:, self._moving] = torch.tensor([where[place] for place in kept.places])
                rows = _to_device(kept.host, self._device)
                kept.table = ChunkTable(rows, kept.table.chunks, kept.table.wide)
        return True
