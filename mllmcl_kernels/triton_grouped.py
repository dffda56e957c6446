"""Products in rank space for the experts that tokens have chosen and no others, by top-k routing or by ids.

A counting sort puts the pairs of token and expert in order by expert; kernels then fetch the rows of a tile by their
numbers, so that no row is copied. Results lie as the dense kernels leave them, zeros where a token did not choose:
what follows, the product with B that adds all experts of a token at once, stays dense and writes once.
"""

# T tokens, K in, N out, E experts, R sum of ranks, k chosen experts, P = T k pairs

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import threshold
from .triton_tools import (
    EXPERT_IDS,
    SOFT_GATES,
    Gating,
    Tile,
    ceil_div,
    dot,
    dot_precision,
    keep_tile,
    launch,
    note_wrong_ids,
    power_of_two,
    rank_product,
)

__all__ = [
    "Choice",
    "Grouping",
    "Pairs",
    "grouped_rank_gradients",
    "grouped_shrink",
    "grouped_weight_gradient",
    "groupings",
    "pairs_by_expert",
]

#: what grouping has to save at least: ranks that a token does not use, and tokens to share the sort
BREAK_EVEN, LEAST_TOKENS = 256, 1024
#: entries [pairs, E] that a program of the sort holds
SORT_ENTRIES = 4096
#: m pairs, n ranks of an expert at most, k columns of x or dy
RANK_TILES = (Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3))
#: m ranks of an expert at most, n columns of the result, k pairs
WEIGHT_TILE = Tile(128, 128, 64, 8, 3)

_SOFT = tl.constexpr(SOFT_GATES)


@dataclass(frozen=True)
class Grouping:
    """The tile of the rank kernels by its place in `RANK_TILES`; -1 for the dense kernels."""

    tile: int


@dataclass(frozen=True)
class Choice:
    """The experts of each token: [G, k] or [G] integers, one row for every `run` consecutive tokens, -1 for none.

    An expert stands in a row once at most.
    """

    experts: Tensor
    run: int = 1

    @property
    def top_k(self) -> int:
        return self.experts.shape[1] if self.experts.dim() == 2 else 1


@dataclass(frozen=True)
class Pairs:
    """Pairs of token and chosen expert in order by expert, tokens ascending.

    order     [P] int32, token * k + slot
    starts    [E + 1] int32, where each expert's pairs begin; behind the last one nothing was written
    """

    order: Tensor
    starts: Tensor
    top_k: int
    #: of the rank kernels
    tile: Tile


def groupings(tokens: int, ranks: Sequence[int], choice: Choice | None, dtype: torch.dtype) -> tuple[Grouping, ...]:
    """What can run; the first one runs where none was timed. Past the break-even grouping may pay, else it cannot."""
    dense = (Grouping(-1),)
    if choice is None or dtype == torch.float32 or tokens < LEAST_TOKENS:
        return dense
    unused = sum(sorted(ranks)[: max(len(ranks) - choice.top_k, 0)])
    return (*dense, *map(Grouping, range(len(RANK_TILES)))) if unused >= BREAK_EVEN else dense


# -- sorting ----------------------------------------------------------------------------------------------------------


@triton.jit
def _chosen_experts(chosen_ptr, chunk, P, run, top_k, BLOCK_P: tl.constexpr):
    """Pairs of a chunk and their experts, -1 where there is none."""
    pairs = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    places = pairs // (run * top_k) * top_k + pairs % top_k
    return pairs, tl.load(chosen_ptr + places, mask=pairs < P, other=-1).to(tl.int64)


@triton.jit
def _grouped_count_kernel(
    counts_ptr, chosen_ptr, flag_ptr, P, run, top_k, E, WATCHED: tl.constexpr, BLOCK_P: tl.constexpr,
    PAD_E: tl.constexpr,
):  # fmt: skip
    """counts [chunks, E]: the pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    pairs, experts = _chosen_experts(chosen_ptr, chunk, P, run, top_k, BLOCK_P)
    columns = tl.arange(0, PAD_E)
    counts = tl.sum((experts[:, None] == columns[None, :].to(tl.int64)).to(tl.int32), 0)
    tl.store(counts_ptr + chunk * E + columns, counts, mask=columns < E)
    if WATCHED:
        # with ids a pair is a token
        note_wrong_ids(flag_ptr, chosen_ptr, pairs.to(tl.int64), pairs < P, run, E)


@triton.jit
def _grouped_place_kernel(
    order_ptr, starts_ptr, counts_ptr, chosen_ptr, P, run, top_k, E, chunks,
    BLOCK_P: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """Every pair of a chunk to its place, by the counts of all chunks."""
    chunk = tl.program_id(0)
    columns = tl.arange(0, PAD_E)
    before, total = tl.zeros((PAD_E,), tl.int32), tl.zeros((PAD_E,), tl.int32)
    for first in range(0, chunks, BLOCK_P):
        others = first + tl.arange(0, BLOCK_P)
        counts = tl.load(
            counts_ptr + others[:, None] * E + columns[None, :],
            mask=(others < chunks)[:, None] & (columns < E)[None, :],
            other=0,
        )
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((others < chunk)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(starts_ptr + columns, ends - total, mask=columns < E)
        tl.store(starts_ptr + E, tl.sum(total, 0))
    pairs, experts = _chosen_experts(chosen_ptr, chunk, P, run, top_k, BLOCK_P)
    hits = (experts[:, None] == columns[None, :].to(tl.int64)).to(tl.int32)
    places = (ends - total + before)[None, :] + tl.cumsum(hits, 0) - hits
    place = tl.sum(hits * places, 1)
    tl.store(order_ptr + place, pairs, mask=(experts >= 0) & (experts < E) & (pairs < P))


def pairs_by_expert(choice: Choice | None, tokens: int, by: Gating, grouping: Grouping) -> Pairs | None:
    """The pairs of every token and every expert it has chosen, sorted; None for the dense kernels.

    Nothing waits for the device.
    """
    if grouping.tile < 0:
        return None
    chosen, top_k, number = choice.experts.contiguous(), choice.top_k, tokens * choice.top_k
    pad = power_of_two(by.experts)
    block = max(SORT_ENTRIES // pad, 16)
    chunks = ceil_div(number, block)
    sizes = (number, by.experts + 1, chunks * by.experts)
    order, starts, counts = (chosen.new_empty(size, dtype=torch.int32) for size in sizes)
    size = {"BLOCK_P": block, "PAD_E": pad, "warps": 4}
    launch(
        _grouped_count_kernel, (chunks,), counts, chosen, by.flag, number, choice.run, top_k, by.experts,
        WATCHED=by.kind == EXPERT_IDS, **size,
    )  # fmt: skip
    launch(
        _grouped_place_kernel, (chunks,),
        order, starts, counts, chosen, number, choice.run, top_k, by.experts, chunks, **size,
    )  # fmt: skip
    return Pairs(order, starts, top_k, RANK_TILES[grouping.tile])


# -- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of_pairs(
    order_ptr, starts_ptr, tile, T, top_k, E, PAD_E: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The expert of a tile and the tokens of its pairs in int64, T where there is none; E where no tile is left."""
    columns = tl.arange(0, PAD_E)
    first = tl.load(starts_ptr + columns, mask=columns < E, other=0)
    last = tl.load(starts_ptr + columns + 1, mask=columns < E, other=0)
    tiles = (last - first + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum(((ends <= tile) & (columns < E)).to(tl.int32), 0)
    mine = columns == expert
    begin = tl.sum(tl.where(mine, first + (tile - ends + tiles) * BLOCK_T, 0), 0)
    end = tl.sum(tl.where(mine, last, 0), 0)
    return expert, _rows_of_pairs(order_ptr, begin, end, T, top_k, BLOCK_T)


@triton.jit
def _rows_of_pairs(order_ptr, begin, end, T, top_k, BLOCK_T: tl.constexpr):
    """Tokens of the pairs from `begin` on in int64, T from `end` on."""
    places = begin + tl.arange(0, BLOCK_T)
    rows = tl.load(order_ptr + places, mask=places < end, other=0) // top_k
    return tl.where(places < end, rows, T).to(tl.int64)


@triton.jit
def _ranks_of(rank_starts_ptr, expert, ALIGNED: tl.constexpr):
    """The first rank of an expert and the one behind its last."""
    first, end = tl.load(rank_starts_ptr + expert), tl.load(rank_starts_ptr + expert + 1)
    if ALIGNED:
        # what comes out of a table is known to nobody
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
    return first, end


@triton.jit
def _gate_of_rows(gates_ptr, rows, expert, T, run, num_experts, KIND: tl.constexpr):
    """The gates of one expert in float32, 1 for ids."""
    gate = tl.full(rows.shape, 1.0, tl.float32)
    if KIND == _SOFT:
        gate = tl.load(gates_ptr + (rows // run) * num_experts + expert, mask=rows < T, other=0.0)
    return gate


@triton.jit
def _grouped_shrink_kernel(
    x_ptr, a_ptr, s_ptr, mixed_ptr, gates_ptr, scale_ptr, rank_starts_ptr, seed_ptr, order_ptr, starts_ptr,
    T, K, R, top_k, run, num_experts, stride_xt, stride_xk, stride_ar, stride_ak, stride_mt,
    KIND: tl.constexpr, DROPS: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PAD_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s = drop(x) A^T and s * G for the pairs of a tile; the rest is left as it is, which is zero."""
    expert, rows = _tile_of_pairs(order_ptr, starts_ptr, tl.program_id(0), T, top_k, num_experts, PAD_E, BLOCK_T)
    if expert < num_experts:
        gate = _gate_of_rows(gates_ptr, rows, expert, T, run, num_experts, KIND)
        first, end = _ranks_of(rank_starts_ptr, expert, ALIGNED)
        for block in range(tl.cdiv(end - first, BLOCK_R)):
            cols = (first + block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            acc = rank_product(
                x_ptr, a_ptr, seed_ptr, rows, cols, T, K, end, 0, stride_xt, stride_xk, stride_ar, stride_ak,
                DROPS, THRESHOLD, 1, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            acc *= KEEP_SCALE
            factor = gate[:, None] * tl.load(scale_ptr + cols, mask=cols < end, other=0.0)[None, :]
            inside = (rows < T)[:, None] & (cols < end)[None, :]
            places = rows[:, None] * R + cols[None, :]
            tl.store(s_ptr + places, acc.to(s_ptr.dtype.element_ty), mask=inside)
            targets = rows[:, None] * stride_mt + cols[None, :]
            tl.store(mixed_ptr + targets, (acc * factor).to(mixed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_bwd_rank_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, mixed_ptr, dgates_ptr, gates_ptr, scale_ptr, rank_starts_ptr, order_ptr, starts_ptr,
    T, N, R, top_k, run, num_experts, stride_yt, stride_yn, stride_bn, stride_br, stride_ds,
    KIND: tl.constexpr, GATES: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PAD_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u = dy B, then ds = u * G, s * G and the gates' gradient for the pairs of a tile."""
    expert, rows = _tile_of_pairs(order_ptr, starts_ptr, tl.program_id(0), T, top_k, num_experts, PAD_E, BLOCK_T)
    if expert < num_experts:
        gate = _gate_of_rows(gates_ptr, rows, expert, T, run, num_experts, KIND)
        total = tl.zeros((BLOCK_T,), tl.float32)
        first, end = _ranks_of(rank_starts_ptr, expert, ALIGNED)
        for block in range(tl.cdiv(end - first, BLOCK_R)):
            cols = (first + block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            u = rank_product(
                dy_ptr, b_ptr, dy_ptr, rows, cols, T, N, end, 0, stride_yt, stride_yn, stride_br, stride_bn,
                False, 0, 1, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            scale = tl.load(scale_ptr + cols, mask=cols < end, other=0.0)[None, :]
            inside = (rows < T)[:, None] & (cols < end)[None, :]
            targets = rows[:, None] * stride_ds + cols[None, :]
            tl.store(ds_ptr + targets, (u * gate[:, None] * scale).to(ds_ptr.dtype.element_ty), mask=inside)
            if MIXED or GATES:
                places = rows[:, None] * R + cols[None, :]
                s = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
                if MIXED:
                    mixed = s * gate[:, None] * scale
                    tl.store(mixed_ptr + places, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)
                if GATES:
                    total += tl.sum(tl.where(inside, u * s * scale, 0.0), 1)
        if GATES:
            tl.store(dgates_ptr + rows * num_experts + expert, total, mask=rows < T)


@triton.jit
def _grouped_bwd_da_kernel(
    out_ptr, left_ptr, right_ptr, seed_ptr, experts_ptr, rank_starts_ptr, order_ptr, starts_ptr,
    T, C, top_k, blocks_r, stride_lt, stride_rt, stride_rc, stride_or, stride_oc,
    DROPS: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """left^T drop(right) for a block of one expert's ranks and a block of columns, over the expert's pairs."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // blocks_c
    expert = tl.load(experts_ptr + block // blocks_r)
    first, end_rank = _ranks_of(rank_starts_ptr, expert, ALIGNED)
    ranks = (first + block % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    cols = (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank_mask, col_mask = ranks < end_rank, cols < C
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    end = tl.load(starts_ptr + expert + 1)
    for begin in range(tl.load(starts_ptr + expert), end, BLOCK_T):
        rows = _rows_of_pairs(order_ptr, begin, end, T, top_k, BLOCK_T)
        left = tl.load(
            left_ptr + rows[None, :] * stride_lt + ranks[:, None],
            mask=(rows < T)[None, :] & rank_mask[:, None],
            other=0.0,
        )
        right = tl.load(
            right_ptr + rows[:, None] * stride_rt + cols[None, :] * stride_rc,
            mask=(rows < T)[:, None] & col_mask[None, :],
            other=0.0,
        )
        if DROPS:
            right = tl.where(keep_tile(seed_ptr, rows, cols, THRESHOLD), right, tl.zeros_like(right))
        acc = dot(left, right, acc, PRECISION)
    acc *= KEEP_SCALE
    places = out_ptr + ranks[:, None] * stride_or + cols[None, :] * stride_oc
    tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=rank_mask[:, None] & col_mask[None, :])


def _is_aligned(ranks: Sequence[int]) -> bool:
    """Whether every expert begins at a rank that rows of 16 bytes divide."""
    return all(rank % 16 == 0 for rank in ranks)


def _dropping(dropout: float) -> dict[str, object]:
    return {"DROPS": dropout > 0.0, "THRESHOLD": threshold(dropout), "KEEP_SCALE": 1.0 / (1.0 - dropout)}


def _rank_launch(kernel, args: tuple, pairs: Pairs, ranks: Sequence[int], by: Gating, **constants) -> None:
    """A program for every tile that there may be: an expert's last one is not full."""
    tile = pairs.tile
    programs = pairs.order.numel() // tile.m + by.experts
    launch(
        kernel, (programs,), *args, KIND=by.kind, PRECISION=dot_precision(), ALIGNED=_is_aligned(ranks),
        PAD_E=power_of_two(by.experts), BLOCK_T=tile.m, BLOCK_R=min(tile.n, power_of_two(max(ranks))), BLOCK_K=tile.k,
        warps=tile.warps, stages=tile.stages, **constants,
    )  # fmt: skip


def grouped_shrink(
    x: Tensor, lora_a: Tensor, seed: Tensor | None, dropout: float, ranks: Sequence[int], by: Gating, pairs: Pairs,
    mixed: Tensor,
) -> Tensor:  # fmt: skip
    """s = drop(x) A^T, [T, R] in x's dtype, and s * G in `mixed` [T, R]: zero where a token has not chosen."""
    (tokens, width), rank = x.shape, lora_a.shape[0]
    s, _ = x.new_zeros(tokens, rank), mixed.zero_()
    args = (
        x, lora_a, s, mixed, by.gates, by.scale, by.starts, x if seed is None else seed, pairs.order, pairs.starts,
        tokens, width, rank, pairs.top_k, by.run, by.experts, *x.stride(), *lora_a.stride(), mixed.stride(0),
    )  # fmt: skip
    _rank_launch(_grouped_shrink_kernel, args, pairs, ranks, by, **_dropping(dropout))
    return s


def grouped_rank_gradients(
    dy: Tensor, lora_b: Tensor, s: Tensor, ds: Tensor, ranks: Sequence[int], by: Gating, pairs: Pairs,
    needs_mixed: bool, needs_gates: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write ds = (dy B) * G into `ds` [T, R]; give s * G [T, R] and the gates' gradient by token [T, E] float32.

    All of them are zero where a token has not chosen.
    """
    (tokens, out), rank = dy.shape, lora_b.shape[1]
    s, _ = s.contiguous(), ds.zero_()
    mixed = dy.new_zeros(tokens, rank) if needs_mixed else s
    dgates = dy.new_zeros(tokens, by.experts, dtype=torch.float32) if needs_gates else s
    args = (
        dy, lora_b, s, ds, mixed, dgates, by.gates, by.scale, by.starts, pairs.order, pairs.starts,
        tokens, out, rank, pairs.top_k, by.run, by.experts, *dy.stride(), *lora_b.stride(), ds.stride(0),
    )  # fmt: skip
    _rank_launch(_grouped_bwd_rank_kernel, args, pairs, ranks, by, GATES=needs_gates, MIXED=needs_mixed)
    return mixed, dgates


@functools.lru_cache(maxsize=256)
def _trainable(trainable: tuple[bool, ...], device: torch.device) -> Tensor:
    """The experts that train, int32."""
    # built outside of inference mode, since the cache outlives it
    with torch.inference_mode(False):
        return torch.tensor(trainable, device="cpu").nonzero().flatten().to(device, torch.int32)


def grouped_weight_gradient(
    into: Tensor, left: Tensor, right: Tensor, ranks: Sequence[int], trainable: Sequence[bool], by: Gating,
    pairs: Pairs, seed: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The trainable experts' rows of `into` [R, C] become left^T drop(right): left [T, R], right [T, C]."""
    (tokens, columns), tile = right.shape, WEIGHT_TILE
    experts = _trainable(tuple(trainable), right.device)
    height = min(tile.m, power_of_two(max(ranks)))
    blocks = ceil_div(max(ranks), height)
    launch(
        _grouped_bwd_da_kernel, (len(experts) * blocks * ceil_div(columns, tile.n),),
        into, left, right, right if seed is None else seed, experts, by.starts, pairs.order, pairs.starts,
        tokens, columns, pairs.top_k, blocks, left.stride(0), *right.stride(), *into.stride(),
        **_dropping(dropout), PRECISION=dot_precision(), ALIGNED=_is_aligned(ranks),
        BLOCK_R=height, BLOCK_C=tile.n, BLOCK_T=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return into
