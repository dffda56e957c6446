"""What the Triton files share: products in rank space, dropout's hash, tiles, launching.

Imports triton, so only files named `triton.py` import this one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import dtypes_in
from .device_tables import ChunkTable, device_tables
from .dropout import COLUMN_STEP, ROW_STEP
from .faults import fault_flag
from .library import debug_checks
from .masks import NONE, OWNER

__all__ = [
    "CHUNK",
    "EXPERT_IDS",
    "LOWEST",
    "NO_GATES",
    "ROW_BLOCK",
    "SOFT_GATES",
    "Gating",
    "GroupedProducts",
    "Tile",
    "Tiles",
    "ceil_div",
    "chunk_constants",
    "chunk_mask",
    "chunk_of",
    "compute_capability",
    "dot",
    "dot_precision",
    "dtype_reason",
    "dtypes_reason",
    "gate_tile",
    "grouped_product",
    "keep_tile",
    "laid_out",
    "lane_softmax",
    "lane_softmax_step",
    "launch",
    "lives_there",
    "note_wrong_ids",
    "num_processors",
    "power_of_two",
    "raise_for_ids",
    "rank_product",
    "rank_tables",
    "rows_and_columns",
    "splits",
    "start",
    "store_plane",
    "sum_planes",
]

#: True where TRITON_INTERPRET=1 was set before triton was imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
#: how the kernels read gates
NO_GATES, SOFT_GATES, EXPERT_IDS = 0, 1, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SOFT = tl.constexpr(SOFT_GATES)
_IDS = tl.constexpr(EXPERT_IDS)
_UPCAST = tl.constexpr(INTERPRETED)
_ROW_STEP = tl.constexpr(ROW_STEP)
_COLUMN_STEP = tl.constexpr(COLUMN_STEP)
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if _UPCAST:
        # the interpreter multiplies bfloat16 as the integers it stores them in
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * _MIX_1
    h = h ^ (h >> 13)
    h = h * _MIX_2
    return h ^ (h >> 16)


@triton.jit
def keep_tile(seed_ptr, rows, columns, THRESHOLD: tl.constexpr):
    """bool [rows, columns], the mask of `dropout.keep_mask`."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(rows.to(tl.uint32) * _ROW_STEP + low)
    step = columns.to(tl.uint32) * _COLUMN_STEP + high
    return _mix(key[:, None] ^ step[None, :]) >= tl.full((1, 1), THRESHOLD, tl.uint32)


@triton.jit
def gate_tile(
    gates_ptr, owner_ptr, scale_ptr, rows, cols, row_mask, col_mask, run, num_experts, KIND: tl.constexpr
):  # fmt: skip
    """G [rows, cols] in float32: gate times scaling, or scaling where the rank belongs to the row's expert."""
    scale = tl.load(scale_ptr + cols, mask=col_mask, other=0.0)
    owner = tl.load(owner_ptr + cols, mask=col_mask, other=-2)
    if KIND == _SOFT:
        inside = row_mask[:, None] & col_mask[None, :]
        places = (rows // run)[:, None] * num_experts + owner[None, :]
        factor = tl.load(gates_ptr + places, mask=inside, other=0.0) * scale[None, :]
    elif KIND == _IDS:
        # an id outside 0..E-1 owns no rank
        ids = tl.load(gates_ptr + rows // run, mask=row_mask, other=-1).to(tl.int64)
        factor = tl.where(ids[:, None] == owner[None, :].to(tl.int64), scale[None, :], 0.0)
    else:
        factor = tl.where(row_mask[:, None], scale[None, :], 0.0)
    return factor


@triton.jit
def note_wrong_ids(flag_ptr, gates_ptr, rows, row_mask, run, num_experts):
    """Raise the flag to 1 + the highest position of an id outside -1..E-1; nothing is written where there is none."""
    ids = tl.load(gates_ptr + rows // run, mask=row_mask, other=-1).to(tl.int64)
    wrong = row_mask & ((ids < -1) | (ids >= num_experts))
    tl.atomic_max(flag_ptr + tl.zeros_like(rows), rows // run + 1, mask=wrong)


@triton.jit
def rank_product(
    x_ptr, a_ptr, seed_ptr, rows, cols, T, K, R, split, stride_xt, stride_xk, stride_ar, stride_ak,
    DROPS: tl.constexpr, THRESHOLD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of x (dropped entries zero, not yet divided by 1 - p) times rows of a, over this split of K."""
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(blocks, SPLIT)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        ks = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = ks < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_xt + ks[None, :].to(tl.int64) * stride_xk,
            mask=(rows < T)[:, None] & inside[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + cols[None, :] * stride_ar + ks[:, None].to(tl.int64) * stride_ak,
            mask=inside[:, None] & (cols < R)[None, :],
            other=0.0,
        )
        if DROPS:
            x = tl.where(keep_tile(seed_ptr, rows, ks, THRESHOLD), x, tl.zeros_like(x))
        acc = dot(x, a, acc, PRECISION)
    return acc


@triton.jit
def rows_and_columns(tile, width, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of a tile in int64; tiles beside each other share rows, so that x comes from L2."""
    blocks = tl.cdiv(width, BLOCK_C)
    rows = (tile // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tile % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rows, cols


@triton.jit
def store_plane(planes_ptr, part, rows, cols, inside, T, R, split):
    """A tile of this split's plane in planes [SPLIT, T, R] float32."""
    places = split.to(tl.int64) * T * R + rows[:, None] * R + cols[None, :]
    tl.store(planes_ptr + places, part, mask=inside)


@triton.jit
def sum_planes(planes_ptr, rows, cols, inside, T, R, SPLIT, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of the sum of planes [SPLIT, T, R] in fixed order, read from L2: other processors wrote them."""
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    from_ptr = planes_ptr + rows[:, None] * R + cols[None, :]
    for split in range(SPLIT):
        plane_ptr = from_ptr + tl.cast(split, tl.int64) * T * R
        total += tl.load(plane_ptr, mask=inside, other=0.0, cache_modifier=".cg")
    return total


# -- softmax over a long row ------------------------------------------------------------------------------------------

#: entries of a row that a program reads at once, with eight warps
ROW_BLOCK = 2048
#: the maximum of a lane that has seen nothing: finite, so that it can be subtracted
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def lane_softmax_step(top, mass, z):
    """Each lane's maximum and sum of exp(z - maximum), with one more z in every lane; minus infinity adds nothing."""
    higher = tl.maximum(top, z)
    return higher, mass * tl.exp(top - higher) + tl.exp(z - higher)


@triton.jit
def lane_softmax(top, mass):
    """The same of all lanes together."""
    highest = tl.max(top, 0)
    return highest, tl.sum(mass * tl.exp(top - highest), 0)


# -- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch: `m` rows of the output, `n` columns, `k` of the contracted dimension."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Candidates of one kernel by size of T, each tuple's first the default: T <= 64, T <= 1024, above; float32."""

    small: tuple[Tile, ...]
    medium: tuple[Tile, ...]
    large: tuple[Tile, ...]
    # products in float32 run without matrix instructions and hold twice the bytes
    float32: tuple[Tile, ...]

    def candidates(self, tokens: int, dtype: torch.dtype) -> tuple[Tile, ...]:
        if dtype == torch.float32:
            return self.float32
        return self.small if tokens <= 64 else self.medium if tokens <= 1024 else self.large


# -- launching --------------------------------------------------------------------------------------------------------


def ceil_div(number: int, block: int) -> int:
    return -(-number // block)


def power_of_two(number: int, least: int = 16) -> int:
    """The power of two at or above `number`; 16 is the least extent of a matrix instruction."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def start(kernel, grid: tuple[int, ...], args: tuple, constants: dict, warps: int, stages: int) -> None:
    """Every launch passes here, so that tests can look at what would be compiled."""
    kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


def launch(kernel, grid: tuple[int, ...], *args, warps: int, stages: int = 1, **constants) -> None:
    """Run `kernel` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    place = torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext()
    with place:
        start(kernel, grid, args, constants, warps, stages)


def dot_precision() -> str:
    """How float32 tiles are multiplied: as torch is asked to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.lru_cache(maxsize=16)
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=16)
def compute_capability(device: torch.device) -> int:
    """Major compute capability of the device; Hopper's where there is none to ask."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; an H100's where there is none to ask."""
    return _processors_of(device) if device.type == "cuda" else 132


def splits(programs: int, width: int, device: torch.device, least: int = 256) -> int:
    """Parts of a contraction over `width`, a power of two, where so many programs leave processors idle.

    A part covers `least` columns or more.
    """
    split = 1
    while 2 * split * programs <= num_processors(device) and width // (2 * split) >= least:
        split *= 2
    return split


# -- arguments --------------------------------------------------------------------------------------------------------


def dtype_reason(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot share a kernel, None where they can."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        return f"triton needs tensors of one dtype, got {sorted(map(str, dtypes))}"
    if not dtypes <= set(DTYPES):
        return f"triton runs float32, bfloat16 and float16, got {dtypes.pop()}"
    return None


def dtypes_reason(*lists: Sequence[Tensor]) -> str | None:
    """Why a kernel that takes every tensor in a dtype of its own cannot take one of these."""
    foreign = dtypes_in(*lists) - set(DTYPES)
    return f"triton runs float32, bfloat16 and float16, got {', '.join(map(str, foreign))}" if foreign else None


def raise_for_ids(op: str, gates: Tensor | None, experts: int) -> None:
    """With MLLMCL_DEBUG=1 wait for the device and raise for an id outside -1..E-1; else see `faults`."""
    if gates is None or gates.is_floating_point() or not debug_checks() or gates.numel() == 0:
        return
    wrong = (gates < -1) | (gates >= experts)
    if bool(wrong.any()):
        where = int(wrong.to(torch.uint8).argmax())
        raise ValueError(f"{op}: gates must be ids in -1..{experts - 1}, got {int(gates[where])} at position {where}")


@functools.lru_cache(maxsize=256)
def rank_tables(
    ranks: tuple[int, ...], scaling: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each rank the expert [R] int32 and the scaling [R] float32; of each expert its first rank [E + 1] int32."""
    owner = [expert for expert, rank in enumerate(ranks) for _ in range(rank)]
    starts = [sum(ranks[:expert]) for expert in range(len(ranks) + 1)]
    # built outside of inference mode, since the cache outlives it
    with torch.inference_mode(False):
        return (
            torch.tensor(owner, dtype=torch.int32, device=device),
            torch.tensor([scaling[expert] for expert in owner], dtype=torch.float32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Gating:
    """What the kernels read gates from: the tensor, its kind, tokens a row of it, experts, and the rank tables."""

    gates: Tensor
    kind: int
    run: int
    experts: int
    owner: Tensor
    scale: Tensor
    starts: Tensor
    #: raised by ids out of range
    flag: Tensor

    @classmethod
    def of(cls, gates: Tensor | None, ranks: Sequence[int], scaling: Sequence[float], x: Tensor) -> Gating:
        """Of gates [G, E], ids [G] or None for the tokens of x [T, ...], each row for T / G of them."""
        owner, scale, starts = rank_tables(tuple(ranks), tuple(scaling), x.device)
        raise_for_ids("lora_mix", gates, len(ranks))
        if gates is None:
            return cls(scale, NO_GATES, 1, len(ranks), owner, scale, starts, starts)
        kind = SOFT_GATES if gates.is_floating_point() else EXPERT_IDS
        run = max(x.shape[0] // max(gates.shape[0], 1), 1)
        flag = fault_flag("lora_mix", len(ranks), x.device) if kind == EXPERT_IDS else starts
        return cls(gates.contiguous(), kind, run, len(ranks), owner, scale, starts, flag)


# -- products of many pairs in one launch ----------------------------------------------------------------------------

#: addresses of x, w and the result, then T, C, K, then what a row of x, of w and of the result takes
_PRODUCT_COLUMNS = tl.constexpr(9)


def _grouped_tables(products: tuple[tuple[int, ...], ...], m: int, n: int) -> tuple[Tensor, Tensor]:
    """The products [products, 9] and the tiles of all results [tiles, 3]: product, block of rows, block of columns."""
    tiles = [
        torch.cartesian_prod(
            torch.tensor([place]), torch.arange(ceil_div(row[3], m)), torch.arange(ceil_div(row[4], n))
        )
        for place, row in enumerate(products)
    ]
    return torch.tensor(products, dtype=torch.int64), torch.cat([tile.view(-1, 3) for tile in tiles])


@dataclass(frozen=True)
class GroupedProducts:
    """Matrix products of any sizes, all tiles of all results in one launch.

    Each is (x, w, result), contiguous, and all x share a dtype, all w, all results: x [T, K], w [C, K], or [K, C] where
    `across`, result [T, C]. The caller keeps the tensors alive until the launch. `like` are tensors of these dtypes.
    """

    like: tuple[Tensor, Tensor, Tensor]
    products: Tensor
    tiles: Tensor
    tile: Tile
    constants: dict[str, int | bool | str]

    @classmethod
    def of(cls, like: tuple[Tensor, Tensor, Tensor], triples: Sequence[tuple], across: bool) -> GroupedProducts:
        rows, aligned = [], True
        for x, w, result in triples:
            (height, depth), width = x.shape, w.shape[int(across)]
            addresses = [tensor.data_ptr() for tensor in (x, w, result)]
            rows.append((*addresses, height, width, depth, depth, w.shape[1], width))
            # how rows are vectorised; a result may be a dtype wider and of any address
            aligned = aligned and all(number % 16 == 0 for number in (*addresses[:2], depth, width))
        tile = _grouped_tile(max(row[3] for row in rows), triples[0][0].dtype)
        tables = device_tables(_grouped_tables, (tuple(rows), tile.m, tile.n), triples[0][0].device)
        blocks = {"BLOCK_T": tile.m, "BLOCK_R": tile.n, "BLOCK_K": tile.k}
        flags = {"ACROSS": across, "ALIGNED": aligned, "PRECISION": dot_precision()}
        return cls(like, *tables, tile, {**blocks, **flags})

    def launch(self, kernel, *args, **constants) -> None:
        """Run `kernel` on every tile; its first arguments are x, w, the result (for their dtypes) and the tables."""
        launch(
            kernel, (len(self.tiles),), *self.like, self.products, self.tiles, *args, **constants, **self.constants,
            warps=self.tile.warps, stages=self.tile.stages,
        )  # fmt: skip


def laid_out(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of these shapes, one behind the other."""
    parts = flat.split([height * width for height, width in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _grouped_tile(rows: int, dtype: torch.dtype) -> Tile:
    """As many rows as the tallest x has, up to 64: where they fit one tile, w is read once."""
    height = min(power_of_two(rows), 64)
    if dtype == torch.float32:
        return Tile(height, 64, 32, 4 if height < 64 else 8, 2)
    return Tile(64, 128, 64, 8, 3) if height == 64 else Tile(height, 64, 64, 4, 4)


@triton.jit
def grouped_product(
    x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr,
    ACROSS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's tile of x w^T in float32, the result's address, the tile's places there, which of them exist."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    row_ptr = products_ptr + tl.load(tile_ptr) * _PRODUCT_COLUMNS
    x_ptr = tl.load(row_ptr).to(x_like_ptr.dtype)
    w_ptr = tl.load(row_ptr + 1).to(w_like_ptr.dtype)
    out_ptr = tl.load(row_ptr + 2).to(out_like_ptr.dtype)
    T, C, K = tl.load(row_ptr + 3), tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    stride_x, stride_w, stride_out = tl.load(row_ptr + 6), tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    if ALIGNED:
        # what comes out of a table is known to nobody
        x_ptr, w_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(w_ptr, 16)
        C, K = tl.multiple_of(C, 16), tl.multiple_of(K, 16)
        stride_x, stride_w = tl.multiple_of(stride_x, 16), tl.multiple_of(stride_w, 16)
    rows = tl.load(tile_ptr + 1) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.load(tile_ptr + 2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if ACROSS:
        acc = rank_product(
            x_ptr, w_ptr, products_ptr, rows, cols, T, K, C, 0, stride_x, 1, 1, stride_w, False, 0, 1, PRECISION,
            BLOCK_T, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        acc = rank_product(
            x_ptr, w_ptr, products_ptr, rows, cols, T, K, C, 0, stride_x, 1, stride_w, 1, False, 0, 1, PRECISION,
            BLOCK_T, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    places = rows[:, None] * stride_out + cols[None, :]
    return acc, out_ptr, places, (rows < T)[:, None] & (cols < C)[None, :]


# -- many tensors in one launch ---------------------------------------------------------------------------------------

#: entries a program takes
CHUNK = 16384
_NONE = tl.constexpr(NONE)
_OWNER = tl.constexpr(OWNER)


def chunk_constants(table: ChunkTable) -> dict[str, int | bool]:
    """Compile-time arguments of every kernel that walks the table."""
    return {"WIDTH": table.rows.shape[1], "WIDE": table.wide, "CHUNK": CHUNK}


def lives_there(value: Tensor | float, device: torch.device) -> bool:
    """Whether a kernel has to read this number, since the host would have to wait for it."""
    return isinstance(value, Tensor) and value.device == device and device.type != "cpu"


@triton.jit
def chunk_of(rows_ptr, chunks_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """This program's row of the table, its first entry and the entry behind its last."""
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(chunks_ptr + pid * 2) * WIDTH
    first = tl.load(chunks_ptr + pid * 2 + 1)
    return row_ptr, first, tl.minimum(first + CHUNK, tl.load(row_ptr + WIDTH - 1))


@triton.jit
def chunk_mask(row_ptr, entries, inside, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """bool: which entries of the row's tensor its mask lets change."""
    mask_ptr = tl.load(row_ptr + WIDTH - 6).to(tl.pointer_type(tl.uint8))
    kind = tl.load(row_ptr + WIDTH - 5)
    wanted = tl.where(kind == _OWNER, tl.load(row_ptr + WIDTH - 4), 1)
    inner = tl.load(row_ptr + WIDTH - 3)
    slices = tl.load(row_ptr + WIDTH - 2)
    places = entries
    if kind >= 0:
        if WIDE:
            places = (entries // inner) % slices
        else:
            # a division of 64 bits costs more than the memory it waits for
            places = ((entries.to(tl.uint32) // inner.to(tl.uint32)) % slices.to(tl.uint32)).to(tl.int64)
    found = tl.load(mask_ptr + places, mask=inside & (kind != _NONE), other=0).to(tl.int64)
    return inside & ((kind == _NONE) | (found == wanted))
