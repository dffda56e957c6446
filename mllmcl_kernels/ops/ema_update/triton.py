"""`ema_update_` in Triton: one launch for the sums over groups, where weights need them, and one for the update.

A unit is what a program takes: at most CHUNK entries of one group, a group being the slices [start, start + length) of
one dimension of a tensor [outer, n, inner]. Seen alone its entries are [outer, run] with run = length * inner, and lie
`block` = n * inner apart. Sums of units are added up by every program that needs them, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device_tables import device_tables, is_wide, masked_by_dtypes, table_rows
from ...layouts import slices
from ...masks import ELEMENTS, NONE
from ...triton_tools import (
    CHUNK,
    chunk_mask,
    dtypes_reason,
    launch,
)
from . import ema_update_op
from .reference import CONSTANT, DEMA, PEMA

__all__: list[str] = []

BLOCK = 1024
#: sums of units added at a time
PARTS = 128
#: tensor, first entry, run, block, first and last place in the group, and the first and last unit of group and tensor
UNIT_COLUMNS = 10

_CONSTANT, _DEMA, _PEMA = tl.constexpr(CONSTANT), tl.constexpr(DEMA), tl.constexpr(PEMA)
_UNIT = tl.constexpr(UNIT_COLUMNS)


# -- units ------------------------------------------------------------------------------------------------------------


def _units_of(total: int, block: int, inner: int, lengths: tuple[int, ...]) -> Tensor:
    """Units of one tensor [units, UNIT_COLUMNS]; their numbers count from 0 and the tensor is 0."""
    lengths_G = torch.tensor(lengths, dtype=torch.int64)
    runs_G = lengths_G * inner
    sizes_G = runs_G * (total // block)
    counts_G = (sizes_G + CHUNK - 1) // CHUNK
    ends_G = counts_G.cumsum(0)
    group_U = torch.repeat_interleave(torch.arange(len(lengths)), counts_G)
    first_U = (torch.arange(len(group_U)) - (ends_G - counts_G)[group_U]) * CHUNK
    columns = (
        torch.zeros_like(group_U), ((lengths_G.cumsum(0) - lengths_G) * inner)[group_U], runs_G[group_U],
        torch.full_like(group_U, block), first_U, torch.minimum(first_U + CHUNK, sizes_G[group_U]),
        (ends_G - counts_G)[group_U], ends_G[group_U], torch.zeros_like(group_U),
        torch.full_like(group_U, len(group_U)),
    )  # fmt: skip
    return torch.stack(columns, 1)


def _tables(rows: tuple[tuple[int, ...], ...], shapes: tuple[tuple, ...]) -> tuple[Tensor, Tensor]:
    """Rows as int64 and the units of all tensors; a shape is (entries, block, inner, slices of each group)."""
    parts, before = [], 0
    for place, shape in enumerate(shapes):
        part = _units_of(*shape)
        part[:, 0] = place
        part[:, 6:] += before
        before += len(part)
        parts.append(part)
    return torch.tensor(rows, dtype=torch.int64), torch.cat(parts)


@dataclass(frozen=True)
class Units:
    """Tables on the device: rows as in `ChunkTable`, units [units, UNIT_COLUMNS]."""

    rows: Tensor
    units: Tensor
    wide: bool

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"WIDTH": self.rows.shape[1], "WIDE": self.wide, "BLOCK": BLOCK}


def _unit_table(lists, masks, kinds, actives, groups: list[int], ranks: list[int]) -> Units:
    shapes = []
    for tensor, dim, rows, inner in zip(lists[0], groups, *slices(lists[0], groups), strict=True):
        total = tensor.numel()
        if dim < 0:
            shapes.append((total, total, total, (1,)))
        else:
            shapes.append((total, rows * inner, inner, tuple(ranks) if ranks else (1,) * rows))
    rows = table_rows(lists, masks, kinds, actives)
    return Units(*device_tables(_tables, (rows, tuple(shapes)), lists[0][0].device), is_wide(rows))


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _entries(unit_ptr, places, SLICED: tl.constexpr, WIDE: tl.constexpr):
    """Where in the tensor the places of a unit's group lie."""
    if SLICED:
        offset, run, block = tl.load(unit_ptr + 1), tl.load(unit_ptr + 2), tl.load(unit_ptr + 3)
        if WIDE:
            outer = places // run
        else:
            # a division of 64 bits costs more than the memory it waits for
            outer = (places.to(tl.uint32) // run.to(tl.uint32)).to(tl.int64)
        return outer * block + offset + (places - outer * run)
    return places


@triton.jit
def _moved(row_ptr, a_like_ptr, p_like_ptr, entries, keep):
    """The average and param - average, in float32."""
    a_ptr = tl.load(row_ptr).to(a_like_ptr.dtype)
    p_ptr = tl.load(row_ptr + 1).to(p_like_ptr.dtype)
    average = tl.load(a_ptr + entries, mask=keep, other=0.0).to(tl.float32)
    return average, tl.load(p_ptr + entries, mask=keep, other=0.0).to(tl.float32) - average


@triton.jit
def _terms(row_ptr, third_like_ptr, fourth_like_ptr, entries, keep, MODE: tl.constexpr):
    """|g| and |g - g_before|, or F and 1; zero where the mask forbids."""
    third_ptr = tl.load(row_ptr + 2).to(third_like_ptr.dtype)
    third = tl.load(third_ptr + entries, mask=keep, other=0.0).to(tl.float32)
    if MODE == _DEMA:
        fourth_ptr = tl.load(row_ptr + 3).to(fourth_like_ptr.dtype)
        fourth = tl.load(fourth_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        return tl.abs(third), tl.abs(third - fourth)
    return third, keep.to(tl.float32)


@triton.jit
def _dema_weight(moved, size, turned, factor, fallback):
    weight = factor * (1.0 + size) / (moved * turned)
    return tl.where((weight > 0.0) & (weight < 1.0), weight, fallback)


@triton.jit
def _pema_weight(mean_moved, mean_square, moved, square, base):
    weight = base * (mean_moved / moved) * (mean_square / square)
    weight = tl.where(weight < 0.1 * base, 0.1 * base, weight)
    weight = tl.where(weight > 1.0, 1.0, weight)
    return tl.where(weight == weight, weight, base)


@triton.jit
def _ema_sums_kernel(
    a_like_ptr, p_like_ptr, third_like_ptr, fourth_like_ptr, rows_ptr, units_ptr, sums_ptr, num_units,
    MODE: tl.constexpr, SLICED: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [3, units] of |d| and of the mode's two terms over each unit."""
    pid = tl.program_id(0).to(tl.int64)
    unit_ptr = units_ptr + pid * _UNIT
    row_ptr = rows_ptr + tl.load(unit_ptr) * WIDTH
    first, end = tl.load(unit_ptr + 4), tl.load(unit_ptr + 5)
    moved, second, third = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        entries = _entries(unit_ptr, places, SLICED, WIDE)
        keep = chunk_mask(row_ptr, entries, places < end, WIDTH, WIDE)
        _, d = _moved(row_ptr, a_like_ptr, p_like_ptr, entries, keep)
        one, other = _terms(row_ptr, third_like_ptr, fourth_like_ptr, entries, keep, MODE)
        moved += tl.abs(d)
        second += one
        third += other
    tl.store(sums_ptr + pid, tl.sum(moved))
    tl.store(sums_ptr + num_units + pid, tl.sum(second))
    tl.store(sums_ptr + 2 * num_units + pid, tl.sum(third))


@triton.jit
def _total(sums_ptr, first, end, PARTS: tl.constexpr):
    """The sum of the numbers [first, end)."""
    total = tl.zeros((PARTS,), tl.float32)
    for start in range(first, end, PARTS):
        places = start + tl.arange(0, PARTS)
        total += tl.load(sums_ptr + places, mask=places < end, other=0.0)
    return tl.sum(total)


@triton.jit
def _totals(sums_ptr, num_units, unit_ptr, PARTS: tl.constexpr):
    """The three sums over the units whose range stands at `unit_ptr`."""
    first, end = tl.load(unit_ptr), tl.load(unit_ptr + 1)
    moved = _total(sums_ptr, first, end, PARTS)
    second = _total(sums_ptr + num_units, first, end, PARTS)
    return moved, second, _total(sums_ptr + 2 * num_units, first, end, PARTS)


@triton.jit
def _ema_update_kernel(
    a_like_ptr, p_like_ptr, third_like_ptr, fourth_like_ptr, rows_ptr, units_ptr, sums_ptr, num_units, weight, factor,
    MODE: tl.constexpr, EACH: tl.constexpr, SLICED: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """average += w d on one unit, its weight from the sums or, where EACH entry has its own, from the entry."""
    unit_ptr = units_ptr + tl.program_id(0).to(tl.int64) * _UNIT
    row_ptr = rows_ptr + tl.load(unit_ptr) * WIDTH
    first, end = tl.load(unit_ptr + 4), tl.load(unit_ptr + 5)
    w = weight
    if MODE == _DEMA and not EACH:
        moved, size, turned = _totals(sums_ptr, num_units, unit_ptr + 6, PARTS)
        w = _dema_weight(moved, size, turned, factor, weight)
    if MODE == _PEMA:
        moved, square, count = _totals(sums_ptr, num_units, unit_ptr + 8, PARTS)
        mean_moved, mean_square = moved / count, square / count
        if not EACH:
            moved, square, count = _totals(sums_ptr, num_units, unit_ptr + 6, PARTS)
            w = _pema_weight(mean_moved, mean_square, moved / count, square / count, weight)
    a_ptr = tl.load(row_ptr).to(a_like_ptr.dtype)
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        entries = _entries(unit_ptr, places, SLICED, WIDE)
        keep = chunk_mask(row_ptr, entries, places < end, WIDTH, WIDE)
        average, d = _moved(row_ptr, a_like_ptr, p_like_ptr, entries, keep)
        if EACH:
            one, other = _terms(row_ptr, third_like_ptr, fourth_like_ptr, entries, keep, MODE)
            if MODE == _DEMA:
                average += _dema_weight(tl.abs(d), one, other, factor, weight) * d
            else:
                average += _pema_weight(mean_moved, mean_square, tl.abs(d), one, weight) * d
        else:
            average += w * d
        tl.store(a_ptr + entries, average.to(a_like_ptr.dtype.element_ty), mask=keep)


# -- provider ---------------------------------------------------------------------------------------------------------


def _supports(averages, params, grads, previous_grads, squared_grads, *_rest) -> str | None:
    return dtypes_reason(averages, params, grads, previous_grads, squared_grads)


def _run(flat: list[list[Tensor]], table: Units, mode: int, weight: float, factor: float, each: bool, sliced: bool):
    count = len(table.units)
    like = [tensors[0] for tensors in flat]
    # the mode does not look at what is repeated here
    like += [like[-1]] * (4 - len(like))
    has_sums = mode != CONSTANT and not (each and mode == DEMA)
    sums = torch.empty(3, count if has_sums else 0, dtype=torch.float32, device=like[0].device)
    options = {"MODE": mode, "SLICED": sliced, **table.constants}
    if has_sums:
        launch(_ema_sums_kernel, (count,), *like, table.rows, table.units, sums, count, **options, warps=4)
    launch(
        _ema_update_kernel, (count,), *like, table.rows, table.units, sums, count, weight, factor,
        EACH=each, PARTS=PARTS, **options, warps=4,
    )  # fmt: skip


@ema_update_op.provider("triton", supports=_supports)
def ema_update_triton(
    averages, params, grads, previous_grads, squared_grads, masks, kinds, actives, mode: int, weight: float,
    factor: float, groups: list[int], ranks: list[int],
):  # fmt: skip
    """Two launches at most for each combination of dtypes; weights stay on the device."""
    lists = [tensors for tensors in (averages, params, grads, previous_grads, squared_grads) if tensors]
    if mode == CONSTANT:
        groups = [NONE] * len(groups)
    each, sliced = ELEMENTS in groups, any(group >= 0 for group in groups)
    for flat, (masks_here, kinds_here, actives_here, groups_here) in masked_by_dtypes(
        lists, (0,), masks, kinds, actives, groups
    ):
        table = _unit_table(flat, masks_here, kinds_here, actives_here, groups_here, ranks)
        _run(flat, table, mode, weight, factor, each, sliced)
