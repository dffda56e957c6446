"""`lora_mix` for few tokens in two launches or in one: the parts of s, and all else beside the one pass over W.

A step of decoding waits for W and for launches, not for arithmetic: s, its gates and the product with B ride along in
every program of the base product, which reads W once. In one launch the parts of s are made by programs beside those
that read W, which wait for them once they have read it.
"""

# T tokens, K in, N out, E experts, R sum of ranks

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counters import launch_counters
from .dropout import threshold
from .layouts import dense_rows
from .triton_tools import (
    EXPERT_IDS,
    Gating,
    Tile,
    ceil_div,
    dot,
    dot_precision,
    gate_tile,
    launch,
    note_wrong_ids,
    power_of_two,
    rank_product,
    rows_and_columns,
    splits,
    store_plane,
    sum_planes,
)
from .tuning import bucket, pick_tile

__all__ = ["Launches", "few_tokens_at_once", "few_tokens_product", "launch_counts"]

#: tokens up to which the base product waits for W alone
MOST_TOKENS = 64
#: m tokens, n columns of y, k of the contraction; the first of a size is the default
FEW_TILES = {
    16: (Tile(16, 32, 256, 4, 4), Tile(16, 16, 512, 4, 3), Tile(16, 64, 128, 4, 4)),
    64: (Tile(64, 32, 128, 4, 4), Tile(64, 64, 64, 4, 4)),
}

_IDS = tl.constexpr(EXPERT_IDS)


@dataclass(frozen=True)
class Launches:
    """How many kernels a forward is: 1, 2, or the product for s, its gates, the base product and the one with B."""

    number: int


def launch_counts(tokens: int, dtype: torch.dtype) -> tuple[Launches, ...]:
    """What can run; the first one runs where none was timed."""
    if tokens > MOST_TOKENS or dtype == torch.float32:
        return (Launches(4),)
    return Launches(4), Launches(2), Launches(1)


@triton.jit
def _few_tokens_kernel(
    y_ptr, s_ptr, x_ptr, weight_ptr, planes_ptr, b_ptr, bias_ptr, gates_ptr, owner_ptr, scale_ptr, flag_ptr,
    T, N, K, R, run, num_experts, stride_xt, stride_wn, stride_bn, stride_br,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b + (s * G) B^T for a block of columns, s summed up from its planes in fixed order."""
    rows, cols = rows_and_columns(tl.program_id(0), N, BLOCK_T, BLOCK_N)
    acc = rank_product(
        x_ptr, weight_ptr, x_ptr, rows, cols, T, K, N, 0, stride_xt, 1, stride_wn, 1,
        False, 0, 1, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _finish_tile(
        acc, y_ptr, s_ptr, planes_ptr, b_ptr, bias_ptr, gates_ptr, owner_ptr, scale_ptr, flag_ptr,
        rows, cols, tl.program_id(0) % tl.cdiv(N, BLOCK_N) == 0, T, N, R, run, num_experts, stride_bn, stride_br,
        KIND, HAS_BIAS, SPLIT, PRECISION, BLOCK_T, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _finish_tile(
    acc, y_ptr, s_ptr, planes_ptr, b_ptr, bias_ptr, gates_ptr, owner_ptr, scale_ptr, flag_ptr,
    rows, cols, is_first, T, N, R, run, num_experts, stride_bn, stride_br,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write acc + (s * G) B^T + b to y, and with `is_first` s, which is summed up from its planes."""
    row_mask, col_mask = rows < T, cols < N
    if KIND == _IDS:
        note_wrong_ids(flag_ptr, gates_ptr, rows, row_mask & is_first, run, num_experts)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        rank_mask = ranks < R
        inside = row_mask[:, None] & rank_mask[None, :]
        s = sum_planes(planes_ptr, rows, ranks, inside, T, R, SPLIT, BLOCK_T, BLOCK_R)
        if is_first:
            tl.store(s_ptr + rows[:, None] * R + ranks[None, :], s.to(s_ptr.dtype.element_ty), mask=inside)
        factor = gate_tile(
            gates_ptr, owner_ptr, scale_ptr, rows, ranks, row_mask, rank_mask, run, num_experts, KIND
        )  # fmt: skip
        b = tl.load(
            b_ptr + cols[None, :] * stride_bn + ranks[:, None] * stride_br,
            mask=rank_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        acc = dot((s * factor).to(b.dtype), b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def _few_tokens_at_once_kernel(
    y_ptr, s_ptr, x_ptr, weight_ptr, a_ptr, planes_ptr, b_ptr, bias_ptr, gates_ptr, owner_ptr, scale_ptr, seed_ptr,
    flag_ptr, counters_ptr,
    T, N, K, R, run, num_experts, stride_xt, stride_wn, stride_ar, stride_ak, stride_bn, stride_br,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PART_R: tl.constexpr,
):  # fmt: skip
    """The planes of s by the first programs to start; y and s by the others, which read their part of W and wait.

    counters: programs that started, parts of the planes that are written, tiles of y that are. Whoever waits started
    after everyone it waits for, and those wait for nobody: however few programs run at a time, all of them end.
    """
    parts = tl.cdiv(T, BLOCK_T) * tl.cdiv(R, PART_R) * SPLIT
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket < parts:
        split = ticket % SPLIT
        rows, ranks = rows_and_columns(ticket // SPLIT, R, BLOCK_T, PART_R)
        part = rank_product(
            x_ptr, a_ptr, seed_ptr, rows, ranks, T, K, R, split, stride_xt, 1, stride_ar, stride_ak,
            DROPS, THRESHOLD, SPLIT, PRECISION, BLOCK_T, PART_R, BLOCK_K,
        )  # fmt: skip
        inside = (rows < T)[:, None] & (ranks < R)[None, :]
        store_plane(planes_ptr, part * KEEP_SCALE, rows, ranks, inside, T, R, split)
        # one thread releases what all of them stored
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + 1, 1, sem="release")
    else:
        tile = ticket - parts
        rows, cols = rows_and_columns(tile, N, BLOCK_T, BLOCK_N)
        acc = rank_product(
            x_ptr, weight_ptr, x_ptr, rows, cols, T, K, N, 0, stride_xt, 1, stride_wn, 1,
            False, 0, 1, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < parts:
            pass
        # one thread acquired what all of them load
        tl.debug_barrier()
        _finish_tile(
            acc, y_ptr, s_ptr, planes_ptr, b_ptr, bias_ptr, gates_ptr, owner_ptr, scale_ptr, flag_ptr,
            rows, cols, tile % tl.cdiv(N, BLOCK_N) == 0, T, N, R, run, num_experts, stride_bn, stride_br,
            KIND, HAS_BIAS, SPLIT, PRECISION, BLOCK_T, BLOCK_R,
        )  # fmt: skip
        # by now everybody has started and nobody waits; no other memory is read by this count
        last = tl.cdiv(T, BLOCK_T) * tl.cdiv(N, BLOCK_N) - 1
        if tl.atomic_add(counters_ptr + 2, 1, sem="relaxed") == last:
            for counter in tl.static_range(3):
                tl.store(counters_ptr + counter, 0)


def few_tokens_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, planes: Tensor, lora_b: Tensor, by: Gating
) -> tuple[Tensor, Tensor]:
    """y [T, N] and s [T, R] in x's dtype from x [T, K], weight [N, K], lora_b [N, R] and the planes [P, T, R] of s."""
    x, weight = dense_rows(x), dense_rows(weight)
    (tokens, width), (out, rank) = x.shape, lora_b.shape
    y, s = x.new_empty(tokens, out), x.new_empty(tokens, rank)

    def run(tile: Tile) -> None:
        launch(
            _few_tokens_kernel, (ceil_div(tokens, tile.m) * ceil_div(out, tile.n),),
            y, s, x, weight, planes, lora_b, y if bias is None else bias.contiguous(), by.gates, by.owner, by.scale,
            by.flag, tokens, out, width, rank, by.run, by.experts, x.stride(0), weight.stride(0), *lora_b.stride(),
            **_constants(tile, rank, bias, by, planes.shape[0]),
        )  # fmt: skip

    key = ("few_tokens_product", bucket(tokens), width, out, rank, planes.shape[0], x.dtype)
    run(pick_tile(key, _tiles(tokens), x.device, run))
    return y, s


def few_tokens_at_once(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, seed: Tensor | None,
    dropout: float, by: Gating,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, N] and s [T, R] in x's dtype from x [T, K], weight [N, K], lora_a [R, K] and lora_b [N, R]."""
    x, weight = dense_rows(x), dense_rows(weight)
    (tokens, width), (out, rank) = x.shape, lora_b.shape
    y, s = x.new_empty(tokens, out), x.new_empty(tokens, rank)

    def run(tile: Tile) -> None:
        # a part of s is a tile like one of y
        ranks, blocks = min(tile.n, power_of_two(rank)), ceil_div(tokens, tile.m)
        parts, tiles = blocks * ceil_div(rank, ranks), blocks * ceil_div(out, tile.n)
        split = splits(parts, width, x.device, max(tile.k, 256))
        planes = x.new_empty(split, tokens, rank, dtype=torch.float32)
        launch(
            _few_tokens_at_once_kernel, (parts * split + tiles if tiles else 0,),
            y, s, x, weight, lora_a, planes, lora_b, y if bias is None else bias.contiguous(), by.gates, by.owner,
            by.scale, x if seed is None else seed, by.flag, launch_counters(x.device),
            tokens, out, width, rank, by.run, by.experts, x.stride(0), weight.stride(0), *lora_a.stride(),
            *lora_b.stride(),
            DROPS=dropout > 0.0, THRESHOLD=threshold(dropout), KEEP_SCALE=1.0 / (1.0 - dropout), PART_R=ranks,
            **_constants(tile, rank, bias, by, split),
        )  # fmt: skip

    key = ("few_tokens_at_once", bucket(tokens), width, out, rank, dropout > 0.0, x.dtype)
    run(pick_tile(key, _tiles(tokens), x.device, run))
    return y, s


def _tiles(tokens: int) -> tuple[Tile, ...]:
    return FEW_TILES[16 if tokens <= 16 else 64]


def _constants(tile: Tile, rank: int, bias: Tensor | None, by: Gating, split: int) -> dict:
    """What both kernels that write y are compiled for."""
    return {
        "KIND": by.kind, "HAS_BIAS": bias is not None, "SPLIT": split, "PRECISION": dot_precision(),
        "BLOCK_T": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": min(power_of_two(rank), 64),
        "warps": tile.warps, "stages": tile.stages,
    }  # fmt: skip
