"""Adding a product of rank R onto a wide one, x W^T + b + mixed B^T: the ways to do it, and which one runs.

torch's product and one more added onto it is always there and the default; it reads and writes the result once more.
In slabs the rows of x and y stay in the cache between the two. The kernels below contract over (x, W) and over
(mixed, B) and write once, but have to keep up with cuBLAS. Where W and B lie side by side, one product of torch does
both, for a copy of x where its rows have no room behind them (`concat`). `tuning.tune` times what there is.
"""

# T tokens, K in, N out, R sum of ranks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .concat import are_side_by_side, joined_rows, joined_weights, room_behind
from .layouts import dense_rows
from .triton_tools import (
    Tile,
    Tiles,
    ceil_div,
    compute_capability,
    dot,
    dot_precision,
    launch,
    num_processors,
)
from .tuning import bucket, pick_tile

__all__ = ["add_product", "candidates", "dual_product", "maps_product", "mixed_rows", "ways"]

#: kinds of `Way`
ADD, SLABS, DUAL, MAPS, CONCAT = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Way:
    """How both products are made; `size` is the tokens of a slab."""

    kind: int
    size: int = 0

    def __str__(self) -> str:
        names = ("two products", f"slabs of {self.size}", "dual source", "dual source by tensor maps", "one product")
        return names[self.kind]


@triton.jit
def _dual_product_kernel(
    y_ptr, x_ptr, weight_ptr, mixed_ptr, b_ptr, bias_ptr, T, N, K, R,
    stride_xt, stride_wn, stride_wk, stride_mt, stride_bn, stride_bk,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = [x | s * G] [W | B]^T + b: one loop whose source changes after K, so that the pipeline never drains."""
    pid = tl.program_id(0)
    blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    # GROUP blocks of rows take turns over the columns, so that W stays in L2
    group = pid // (GROUP * blocks_n)
    height = tl.minimum(blocks_t - group * GROUP, GROUP)
    inner = pid % (GROUP * blocks_n)
    rows = (group * GROUP + inner % height).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (inner // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < N
    blocks_k = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for block in range(0, blocks_k + tl.cdiv(R, BLOCK_K)):
        base = block < blocks_k
        start = tl.where(base, block, block - blocks_k) * BLOCK_K
        ks = start + tl.arange(0, BLOCK_K)
        inside = ks < tl.where(base, K, R)
        left_ptr = tl.where(base, x_ptr, mixed_ptr)
        right_ptr = tl.where(base, weight_ptr, b_ptr)
        if ACROSS:
            # rows of both right factors lie one behind the other, which the compiler has to see
            right_n, right_k = 1, tl.where(base, stride_wk, stride_bk)
        else:
            right_n, right_k = tl.where(base, stride_wn, stride_bn), 1
        left = tl.load(
            left_ptr + rows[:, None] * tl.where(base, stride_xt, stride_mt) + ks[None, :],
            mask=row_mask[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + cols[None, :] * right_n + ks[:, None].to(tl.int64) * right_k,
            mask=inside[:, None] & col_mask[None, :],
            other=0.0,
        )
        acc = dot(left, right, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=row_mask[:, None] & col_mask[None, :])


@dataclass(frozen=True)
class DualTiles:
    """Tiles of the dual-source product: m rows, n columns, k of the contraction."""

    hopper: Tiles
    #: before Hopper accumulators live with the operands in registers
    ampere: Tiles


DUAL_TILES = DualTiles(
    hopper=Tiles(
        small=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 4)),
        medium=(Tile(64, 128, 64, 4, 3), Tile(64, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
        large=(Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
        float32=(Tile(64, 64, 32, 8, 2),),
    ),
    ampere=Tiles(
        small=(Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 4)),
        medium=(Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
        large=(Tile(128, 128, 64, 8, 3), Tile(128, 256, 32, 8, 4)),
        float32=(Tile(64, 64, 32, 8, 2),),
    ),
)


def dual_product(x: Tensor, weight: Tensor, bias: Tensor | None, mixed: Tensor, lora_b: Tensor) -> Tensor:
    """x W^T + b + mixed B^T in one kernel that writes its result once: [T, N].

    x [T, K], weight [N, K], bias [N] or None, mixed [T, R], lora_b [N, R], all of one dtype. weight and lora_b may both
    be transposed views.
    """
    across = _lies_across(weight) and lora_b.stride(0) == 1
    x, mixed = dense_rows(x), dense_rows(mixed)
    if not across:
        weight, lora_b = dense_rows(weight), dense_rows(lora_b)
    (tokens, width), (out, rank) = x.shape, lora_b.shape
    y = x.new_empty(tokens, out)

    def run(tile: Tile) -> None:
        launch(
            _dual_product_kernel, (ceil_div(tokens, tile.m) * ceil_div(out, tile.n),),
            y, x, weight, mixed, lora_b, weight if bias is None else bias.contiguous(), tokens, out, width, rank,
            x.stride(0), *weight.stride(), mixed.stride(0), *lora_b.stride(),
            HAS_BIAS=bias is not None, ACROSS=across, PRECISION=dot_precision(), GROUP=8,
            BLOCK_T=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    table = DUAL_TILES.hopper if compute_capability(x.device) >= 9 else DUAL_TILES.ampere
    key = ("dual_product", bucket(tokens), width, out, rank, across, x.dtype)
    run(pick_tile(key, table.candidates(tokens, x.dtype), x.device, run))
    return y


@triton.jit
def _dual_product_maps_kernel(
    y_ptr, x_map, weight_map, mixed_map, b_map, bias_ptr, T, N, K, R,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, B_ACROSS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same by as many programs as processors; the copy engine fetches their tiles, zeros for what is outside."""
    blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_t * blocks_n, tl.num_programs(0)):
        group = tile // (GROUP * blocks_n)
        height = tl.minimum(blocks_t - group * GROUP, GROUP)
        inner = tile % (GROUP * blocks_n)
        first_t = (group * GROUP + inner % height) * BLOCK_T
        first_n = (inner // height) * BLOCK_N
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, R, BLOCK_K):
            left = mixed_map.load([first_t, start])
            right = b_map.load([start, first_n]) if B_ACROSS else b_map.load([first_n, start]).T
            acc = dot(left, right, acc, "ieee")
        for start in range(0, K, BLOCK_K):
            left = x_map.load([first_t, start])
            right = weight_map.load([start, first_n]) if ACROSS else weight_map.load([first_n, start]).T
            acc = dot(left, right, acc, "ieee")
        rows = first_t.to(tl.int64) + tl.arange(0, BLOCK_T)
        cols = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        inside = (rows < T)[:, None] & (cols < N)[None, :]
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


MAPS_TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4))


def maps_product(x: Tensor, weight: Tensor, bias: Tensor | None, mixed: Tensor, lora_b: Tensor) -> Tensor:
    """As `dual_product`, by tensor maps: for Hopper and later, and rows that begin at multiples of 16 bytes.

    weight and lora_b may each be a transposed view.
    """
    across, b_across = _lies_across(weight), _lies_across(lora_b)
    right = (weight.t() if across else weight, lora_b.t() if b_across else lora_b)
    x, mixed, weight_rows, b_rows = (_mappable(tensor) for tensor in (x, mixed, *right))
    (tokens, width), (out, rank) = x.shape, lora_b.shape
    y = x.new_empty(tokens, out)

    def run(tile: Tile) -> None:
        left, by_rows, by_columns = [tile.m, tile.k], [tile.n, tile.k], [tile.k, tile.n]
        blocks = (left, by_columns if across else by_rows, left, by_columns if b_across else by_rows)
        maps = list(map(TensorDescriptor.from_tensor, (x, weight_rows, mixed, b_rows), blocks))
        programs = min(ceil_div(tokens, tile.m) * ceil_div(out, tile.n), num_processors(x.device))
        launch(
            _dual_product_maps_kernel, (programs,),
            y, *maps, y if bias is None else bias.contiguous(), tokens, out, width, rank,
            HAS_BIAS=bias is not None, ACROSS=across, B_ACROSS=b_across, GROUP=8,
            BLOCK_T=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    key = ("maps_product", bucket(tokens), width, out, rank, across, b_across, x.dtype)
    run(pick_tile(key, MAPS_TILES, x.device, run))
    return y


def _lies_across(tensor: Tensor) -> bool:
    return tensor.stride(0) == 1 and tensor.stride(1) != 1


def _mappable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not begin at multiples of 16 bytes."""
    size = tensor.element_size()
    fits = tensor.stride(1) == 1 and tensor.stride(0) * size % 16 == 0
    if tensor.is_meta or (fits and tensor.data_ptr() % 16 == 0):
        return tensor
    columns = tensor.shape[1]
    padded = tensor.new_zeros(tensor.shape[0], ceil_div(columns * size, 16) * 16 // size)[:, :columns]
    return padded.copy_(tensor)


# -- which way --------------------------------------------------------------------------------------------------------


def candidates(
    tokens: int, width: int, rank: int, dtype: torch.dtype, has_maps: bool, side_by_side: bool
) -> tuple[Way, ...]:
    """What can add a product of depth `rank` onto one of depth `width`; the first one runs where none was timed.

    Below 512 tokens the base product waits for W, not for arithmetic, and nothing beats it. Triton loads wide only from
    rows whose length is a multiple of 16. One product needs W and B `side_by_side`.
    """
    if dtype == torch.float32 or tokens < 512:
        return (Way(ADD),)
    found = [Way(ADD), *(Way(SLABS, size) for size in (1024, 2048) if tokens >= 2 * size)]
    if rank % 16 == 0 and width % 16 == 0:
        found += [Way(DUAL), Way(MAPS)] if has_maps else [Way(DUAL)]
    return (*found, Way(CONCAT)) if side_by_side else tuple(found)


def _candidates_for(x: Tensor, weight: Tensor, lora_b: Tensor) -> tuple[Way, ...]:
    has_maps = compute_capability(x.device) >= 9
    return candidates(*x.shape, lora_b.shape[1], x.dtype, has_maps, are_side_by_side(weight, lora_b))


def mixed_rows(x: Tensor, weight: Tensor, lora_b: Tensor) -> Tensor:
    """An empty [T, R] for s * G: behind the rows of x where one product may read it there, else on its own."""
    behind = room_behind(x, lora_b.shape[1])
    if behind is None or Way(CONCAT) not in _candidates_for(x, weight, lora_b):
        return x.new_empty(x.shape[0], lora_b.shape[1])
    return behind


def _run(way: Way, x: Tensor, weight: Tensor, bias: Tensor | None, mixed: Tensor, lora_b: Tensor) -> Tensor:
    if way.kind == DUAL:
        return dual_product(x, weight, bias, mixed, lora_b)
    if way.kind == MAPS:
        return maps_product(x, weight, bias, mixed, lora_b)
    if way.kind == CONCAT:
        return F.linear(joined_rows(x, mixed), joined_weights(weight, lora_b), bias)
    if way.kind == ADD:
        return F.linear(x, weight, bias).addmm_(mixed, lora_b.t())
    size = way.size
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, narrow, part in zip(x.split(size), mixed.split(size), y.split(size), strict=True):
        if bias is None:
            torch.mm(rows, weight.t(), out=part)
        else:
            torch.addmm(bias, rows, weight.t(), out=part)
        part.addmm_(narrow, lora_b.t())
    return y


def add_product(x: Tensor, weight: Tensor, bias: Tensor | None, mixed: Tensor, lora_b: Tensor) -> Tensor:
    """x W^T + b + mixed B^T: [T, N], by the way that was found to be the quickest."""
    (tokens, width), (out, rank) = x.shape, lora_b.shape

    def run(way: Way) -> Tensor:
        return _run(way, x, weight, bias, mixed, lora_b)

    key = ("add_product", bucket(tokens), width, out, rank, weight.stride(0) == 1, lora_b.stride(0) == 1, x.dtype)
    found = _candidates_for(x, weight, lora_b)
    if found[-1].kind == CONCAT:
        key = (*key, "side by side", "copied" if room_behind(x, rank) is None else "in place")
    return run(pick_tile(key, found, x.device, run))


def ways(
    x: Tensor, weight: Tensor, bias: Tensor | None, mixed: Tensor, lora_b: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Every way that fits these tensors, by its name."""
    found = _candidates_for(x, weight, lora_b)
    return {str(way): lambda way=way: _run(way, x, weight, bias, mixed, lora_b) for way in found}
