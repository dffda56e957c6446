"""`lora_mix` in Triton: skinny products in rank space with the gates in their epilogue, wide products in cuBLAS.

Forward: one pass over x gives s and s * G; y by `triton_expand`. Backward: one pass over dy gives ds = (dy B) * G,
s * G again and the gates' gradient. No atomics; every split of a contraction is added up in fixed order. Where tokens
choose experts, `triton_grouped` can do what lies in rank space for the chosen ones alone.
"""

# T tokens, K in, N out, E experts, R sum of ranks; `run` consecutive tokens share a row of gates

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import threshold
from ...layouts import by_columns
from ...triton_expand import add_product, mixed_rows
from ...triton_few import Launches, few_tokens_at_once, few_tokens_product, launch_counts
from ...triton_grouped import (
    Choice,
    Grouping,
    Pairs,
    grouped_rank_gradients,
    grouped_shrink,
    grouped_weight_gradient,
    groupings,
    pairs_by_expert,
)
from ...triton_tools import (
    EXPERT_IDS,
    SOFT_GATES,
    Gating,
    Tile,
    Tiles,
    ceil_div,
    dot,
    dot_precision,
    dtype_reason,
    gate_tile,
    keep_tile,
    launch,
    note_wrong_ids,
    num_processors,
    power_of_two,
    rank_product,
    rows_and_columns,
    splits,
    store_plane,
    sum_planes,
)
from ...tuning import bucket, pick_tile
from . import lora_mix_backward_op, lora_mix_op

__all__ = [
    "adapter_gradients",
    "input_gradient",
    "mix",
    "mix_ranks",
    "pick_grouping",
    "rank_gradients",
    "shrink",
    "shrink_planes",
    "trainable_runs",
]

_SOFT = tl.constexpr(SOFT_GATES)
_IDS = tl.constexpr(EXPERT_IDS)


@dataclass(frozen=True)
class LoraMixTiles:
    """Tiles by kernel."""

    #: m tokens, n ranks, k columns of x or dy
    rank: Tiles
    #: m tokens, n columns of dx, k ranks
    dropped_dx: Tile
    #: m ranks, n columns of x, k tokens
    dropped_da: Tile
    dropped_da_float32: Tile
    #: m tokens, n ranks
    gate: Tile


TILES = LoraMixTiles(
    rank=Tiles(
        # few tokens: many programs that each take a few ranks, since all of them wait for A
        small=(Tile(16, 32, 128, 4, 3), Tile(16, 16, 256, 4, 3), Tile(16, 128, 128, 4, 3)),
        medium=(Tile(32, 256, 64, 4, 3), Tile(32, 128, 128, 4, 3), Tile(64, 128, 64, 4, 3)),
        large=(Tile(64, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 128, 4, 3)),
        float32=(Tile(32, 32, 32, 4, 2),),
    ),
    dropped_dx=Tile(64, 128, 32, 8, 2),
    dropped_da=Tile(64, 128, 32, 8, 2),
    dropped_da_float32=Tile(64, 64, 16, 8, 2),
    gate=Tile(32, 64, 1, 4, 1),
)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _lora_mix_shrink_kernel(
    x_ptr, a_ptr, s_ptr, mixed_ptr, planes_ptr, gates_ptr, owner_ptr, scale_ptr, seed_ptr, flag_ptr,
    T, K, R, run, num_experts, stride_xt, stride_xk, stride_ar, stride_ak, stride_mt,
    KIND: tl.constexpr, DROPS: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    SPLIT: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s = drop(x) A^T and s * G, or with PLANES the float32 plane of one split."""
    rows, cols = rows_and_columns(tl.program_id(0), R, BLOCK_T, BLOCK_R)
    split = tl.program_id(1)
    acc = rank_product(
        x_ptr, a_ptr, seed_ptr, rows, cols, T, K, R, split, stride_xt, stride_xk, stride_ar, stride_ak,
        DROPS, THRESHOLD, SPLIT, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    acc *= KEEP_SCALE
    row_mask, col_mask = rows < T, cols < R
    inside = row_mask[:, None] & col_mask[None, :]
    if PLANES:
        store_plane(planes_ptr, acc, rows, cols, inside, T, R, split)
    else:
        if KIND == _IDS:
            note_wrong_ids(flag_ptr, gates_ptr, rows, row_mask, run, num_experts)
        factor = gate_tile(
            gates_ptr, owner_ptr, scale_ptr, rows, cols, row_mask, col_mask, run, num_experts, KIND
        )  # fmt: skip
        places = rows[:, None] * R + cols[None, :]
        tl.store(s_ptr + places, acc.to(s_ptr.dtype.element_ty), mask=inside)
        targets = rows[:, None] * stride_mt + cols[None, :]
        tl.store(mixed_ptr + targets, (acc * factor).to(mixed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_mix_gate_kernel(
    planes_ptr, s_ptr, mixed_ptr, gates_ptr, owner_ptr, scale_ptr, flag_ptr, T, R, run, num_experts, width, stride_mt,
    KIND: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s from its planes [SPLIT, T, width] in fixed order and s * G; with SPLIT = 0 only s * G from s."""
    rows, cols = rows_and_columns(tl.program_id(0), R, BLOCK_T, BLOCK_R)
    row_mask, col_mask = rows < T, cols < R
    inside = row_mask[:, None] & col_mask[None, :]
    places = rows[:, None] * R + cols[None, :]
    if SPLIT == 0:
        s = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
    else:
        s = sum_planes(planes_ptr, rows, cols, inside, T, width, SPLIT, BLOCK_T, BLOCK_R)
        tl.store(s_ptr + places, s.to(s_ptr.dtype.element_ty), mask=inside)
    if KIND == _IDS:
        note_wrong_ids(flag_ptr, gates_ptr, rows, row_mask, run, num_experts)
    factor = gate_tile(
        gates_ptr, owner_ptr, scale_ptr, rows, cols, row_mask, col_mask, run, num_experts, KIND
    )  # fmt: skip
    targets = rows[:, None] * stride_mt + cols[None, :]
    tl.store(mixed_ptr + targets, (s * factor).to(mixed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_mix_bwd_rank_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, mixed_ptr, planes_ptr, dgates_ptr, gates_ptr, owner_ptr, scale_ptr,
    T, N, R, run, num_experts, stride_yt, stride_yn, stride_bn, stride_br, stride_ds,
    KIND: tl.constexpr, GATES: tl.constexpr, MIXED: tl.constexpr, FUSED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u = dy B, then ds = u * G, s * G and each token's gradient of the gates; without FUSED the plane of one split."""
    rows, cols = rows_and_columns(tl.program_id(0), R, BLOCK_T, BLOCK_R)
    split = tl.program_id(1)
    u = rank_product(
        dy_ptr, b_ptr, dy_ptr, rows, cols, T, N, R, split, stride_yt, stride_yn, stride_br, stride_bn,
        False, 0, SPLIT, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    row_mask, col_mask = rows < T, cols < R
    inside = row_mask[:, None] & col_mask[None, :]
    places = rows[:, None] * R + cols[None, :]
    if not FUSED:
        store_plane(planes_ptr, u, rows, cols, inside, T, R, split)
    else:
        factor = gate_tile(
            gates_ptr, owner_ptr, scale_ptr, rows, cols, row_mask, col_mask, run, num_experts, KIND
        )  # fmt: skip
        targets = rows[:, None] * stride_ds + cols[None, :]
        tl.store(ds_ptr + targets, (u * factor).to(ds_ptr.dtype.element_ty), mask=inside)
        if MIXED or GATES:
            s = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
            if MIXED:
                tl.store(mixed_ptr + places, (s * factor).to(mixed_ptr.dtype.element_ty), mask=inside)
            if GATES:
                scale = tl.load(scale_ptr + cols, mask=col_mask, other=0.0)
                owner = tl.load(owner_ptr + cols, mask=col_mask, other=-2)
                product = u * s * scale[None, :]
                for expert in range(num_experts):
                    part = tl.sum(tl.where((owner == expert)[None, :], product, 0.0), 1)
                    tl.store(dgates_ptr + rows * num_experts + expert, part, mask=row_mask)


@triton.jit
def _lora_mix_bwd_gate_kernel(
    planes_ptr, s_ptr, ds_ptr, mixed_ptr, dgates_ptr, gates_ptr, starts_ptr, scale_ptr,
    T, R, run, num_experts, stride_ds, SPLIT,
    KIND: tl.constexpr, GATES: tl.constexpr, MIXED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The epilogue of the kernel above from planes of u: a program takes a block of rows through one expert's ranks."""
    pid = tl.program_id(0)
    expert = pid % num_experts
    rows = (pid // num_experts).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    if KIND == _SOFT:
        gate = tl.load(gates_ptr + (rows // run) * num_experts + expert, mask=row_mask, other=0.0)
    elif KIND == _IDS:
        ids = tl.load(gates_ptr + rows // run, mask=row_mask, other=-1).to(tl.int64)
        gate = tl.where(ids == expert, 1.0, 0.0)
    else:
        gate = tl.full((BLOCK_T,), 1.0, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    end = tl.load(starts_ptr + expert + 1)
    for start in range(tl.load(starts_ptr + expert), end, BLOCK_R):
        cols = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = row_mask[:, None] & (cols < end)[None, :]
        places = rows[:, None] * R + cols[None, :]
        u = sum_planes(planes_ptr, rows, cols, inside, T, R, SPLIT, BLOCK_T, BLOCK_R)
        scale = tl.load(scale_ptr + cols, mask=cols < end, other=0.0)
        factor = gate[:, None] * scale[None, :]
        tl.store(
            ds_ptr + rows[:, None] * stride_ds + cols[None, :], (u * factor).to(ds_ptr.dtype.element_ty), mask=inside
        )
        if MIXED or GATES:
            s = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
            if MIXED:
                tl.store(mixed_ptr + places, (s * factor).to(mixed_ptr.dtype.element_ty), mask=inside)
            if GATES:
                total += tl.sum(u * s * scale[None, :], 1)
    if GATES:
        tl.store(dgates_ptr + rows * num_experts + expert, total, mask=row_mask)


@triton.jit
def _lora_mix_bwd_dx_kernel(
    dx_ptr, ds_ptr, a_ptr, seed_ptr, T, K, R, stride_ds, stride_ar, stride_ak,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx += drop'(ds A), in place."""
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ks = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        ds = tl.load(
            ds_ptr + rows[:, None] * stride_ds + ranks[None, :],
            mask=(rows < T)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + ranks[:, None] * stride_ar + ks[None, :] * stride_ak,
            mask=(ranks < R)[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        acc = dot(ds, a, acc, PRECISION)
    places = dx_ptr + rows[:, None] * K + ks[None, :]
    inside = (rows < T)[:, None] & (ks < K)[None, :]
    dx = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    through = tl.where(keep_tile(seed_ptr, rows, ks, THRESHOLD), acc * KEEP_SCALE, 0.0)
    tl.store(places, (dx + through).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_mix_bwd_da_kernel(
    planes_ptr, ds_ptr, x_ptr, seed_ptr, T, K, R, first, stride_ds, stride_xt, stride_xk, share,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One split's plane [R, K] of ds^T drop(x) over `share` blocks of tokens, for R ranks from `first` on."""
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    ranks = (pid // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(T, BLOCK_T))):
        rows = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        ds = tl.load(
            ds_ptr + rows[None, :] * stride_ds + (first + ranks)[:, None],
            mask=(rows < T)[None, :] & (ranks < R)[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows[:, None] * stride_xt + ks[None, :] * stride_xk,
            mask=(rows < T)[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        x = tl.where(keep_tile(seed_ptr, rows, ks, THRESHOLD), x, tl.zeros_like(x))
        acc = dot(ds, x, acc, PRECISION)
    places = split.to(tl.int64) * R * K + ranks[:, None] * K + ks[None, :]
    tl.store(planes_ptr + places, acc, mask=(ranks < R)[:, None] & (ks < K)[None, :])


# -- forward ----------------------------------------------------------------------------------------------------------


#: torch's product in place of a tile of ours, with the gates in a kernel behind it
TORCH = Tile(0, 0, 0, 0, 0)


def _rank_launch(
    name: str, tokens: int, width: int, rank: int, like: Tensor, run, dropout: float = 0.0, only_ours: bool = False
) -> None:
    """Run `run(tile, n, split)` with the tile for this size; splits where the tokens alone leave processors idle."""

    def attempt(tile: Tile) -> None:
        if tile == TORCH:
            return run(tile, 0, 0)
        n = min(tile.n, power_of_two(rank))
        return run(tile, n, splits(ceil_div(tokens, tile.m) * ceil_div(rank, n), width, like.device))

    key = (name, bucket(tokens), width, rank, dropout > 0.0, like.dtype)
    choices = TILES.rank.candidates(tokens, like.dtype)
    if dropout == 0.0 and like.dtype != torch.float32 and not only_ours:
        choices = (*choices, TORCH)
    attempt(pick_tile(key, choices, like.device, attempt))


def shrink(
    x: Tensor, lora_a: Tensor, seed: Tensor | None, dropout: float, by: Gating, mixed: Tensor
) -> Tensor:  # fmt: skip
    """s = drop(x) A^T, [T, R] in x's dtype; s * G goes into `mixed` [T, R], whose rows may lie apart."""
    (tokens, width), rank = x.shape, lora_a.shape[0]
    s = x.new_empty(tokens, rank)

    def run(tile: Tile, n: int, split: int) -> None:
        if tile == TORCH:
            torch.mm(x, lora_a.t(), out=s)
            mix_ranks(s, s, mixed, 0, by)
            return
        planes = x.new_empty(split, tokens, rank, dtype=torch.float32) if split > 1 else s
        _launch_shrink(x, lora_a, s, mixed, planes, seed, dropout, by, tile, n, split, split > 1)
        if split > 1:
            mix_ranks(planes, s, mixed, split, by)

    _rank_launch("lora_mix_shrink", tokens, width, rank, x, run, dropout)
    return s


def shrink_planes(x: Tensor, lora_a: Tensor, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """float32 [P, T, R] that add up to drop(x) A^T."""
    (tokens, width), rank = x.shape, lora_a.shape[0]
    # planes know no gates
    by = Gating.of(None, [rank], [1.0], x)
    made: list[Tensor] = []

    def run(tile: Tile, n: int, split: int) -> None:
        planes = x.new_empty(split, tokens, rank, dtype=torch.float32)
        _launch_shrink(x, lora_a, planes, planes, planes, seed, dropout, by, tile, n, split, True)
        made[:] = [planes]

    _rank_launch("lora_mix_planes", tokens, width, rank, x, run, dropout, only_ours=True)
    return made[0]


def _launch_shrink(x, lora_a, s, mixed, planes, seed, dropout, by: Gating, tile: Tile, n: int, split: int, cut: bool):
    """With `cut` planes are what is written, else s and mixed."""
    (tokens, width), rank = x.shape, lora_a.shape[0]
    launch(
        _lora_mix_shrink_kernel, (ceil_div(tokens, tile.m) * ceil_div(rank, n), split),
        x, lora_a, s, mixed, planes, by.gates, by.owner, by.scale, x if seed is None else seed, by.flag,
        tokens, width, rank, by.run, by.experts, *x.stride(), *lora_a.stride(), mixed.stride(0),
        KIND=by.kind, DROPS=dropout > 0.0, THRESHOLD=threshold(dropout), KEEP_SCALE=1.0 / (1.0 - dropout),
        SPLIT=split, PLANES=cut, PRECISION=dot_precision(), BLOCK_T=tile.m, BLOCK_R=n, BLOCK_K=tile.k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def mix_ranks(planes: Tensor, s: Tensor, mixed: Tensor, split: int, by: Gating) -> None:
    """s * G into `mixed`, from s, or with `split` from planes [split, T, at least R], of which s is written too."""
    (tokens, rank), tile = s.shape, TILES.gate
    n = min(tile.n, power_of_two(rank))
    launch(
        _lora_mix_gate_kernel, (ceil_div(tokens, tile.m) * ceil_div(rank, n),),
        planes, s, mixed, by.gates, by.owner, by.scale, by.flag, tokens, rank, by.run, by.experts,
        planes.shape[-1], mixed.stride(0),
        KIND=by.kind, SPLIT=split, BLOCK_T=tile.m, BLOCK_R=n, warps=tile.warps,
    )  # fmt: skip


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(x, weight, bias, lora_a, lora_b)


@lora_mix_op.provider("triton", supports=_supports)
def lora_mix_triton(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    """One pass over x for s and s * G, then y."""
    by = Gating.of(gates if gates is None or not gates.is_floating_point() else gates.float(), ranks, scaling, x)
    choice = Choice(by.gates, by.run) if by.kind == EXPERT_IDS else None
    return mix(x, weight, bias, lora_a, lora_b, seed, ranks, dropout, by, choice)


def mix(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, seed: Tensor | None,
    ranks: Sequence[int], dropout: float, by: Gating, choice: Choice | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and s. `choice`: experts outside of which gates are zero and their gradient is asked by nobody."""

    def by_launches(launches: Launches) -> tuple[Tensor, Tensor]:
        if launches.number > 2:
            return run(pick_grouping("lora_mix", x, lora_b, ranks, choice, run))
        if launches.number == 1:
            return few_tokens_at_once(x, weight, bias, lora_a, lora_b, seed, dropout, by)
        planes = shrink_planes(x, lora_a, seed, dropout)
        return few_tokens_product(x, weight, bias, planes, lora_b, by)

    def run(grouping: Grouping) -> tuple[Tensor, Tensor]:
        pairs, mixed = pairs_by_expert(choice, x.shape[0], by, grouping), mixed_rows(x, weight, lora_b)
        if pairs is None:
            s = shrink(x, lora_a, seed, dropout, by, mixed)
        else:
            s = grouped_shrink(x, lora_a, seed, dropout, ranks, by, pairs, mixed)
        return add_product(x, weight, bias, mixed, lora_b), s

    key = ("lora_mix_launches", bucket(x.shape[0]), *weight.shape, lora_a.shape[0], by.kind, x.dtype)
    return by_launches(pick_tile(key, launch_counts(x.shape[0], x.dtype), x.device, by_launches))


def pick_grouping(
    name: str, x: Tensor, lora_b: Tensor, ranks: Sequence[int], choice: Choice | None, run: Callable[[Grouping], object]
) -> Grouping:
    tokens, width = x.shape
    key = (f"{name}_grouping", bucket(tokens), width, *lora_b.shape, choice and (choice.top_k, choice.run > 1), x.dtype)
    return pick_tile(key, groupings(tokens, ranks, choice, x.dtype), x.device, run)


# -- backward ---------------------------------------------------------------------------------------------------------


def trainable_runs(ranks: Sequence[int], trainable: Sequence[bool]) -> list[tuple[int, int]]:
    """Ranges of consecutive ranks that train: what dA and dB are computed for."""
    runs: list[tuple[int, int]] = []
    start = 0
    for rank, trains in zip(ranks, trainable, strict=True):
        if trains and rank:
            joins = bool(runs) and runs[-1][1] == start
            runs = [*runs[:-1], (runs[-1][0], start + rank)] if joins else [*runs, (start, start + rank)]
        start += rank
    return runs


def rank_gradients(
    dy: Tensor, lora_b: Tensor, s: Tensor, ds: Tensor, ranks: Sequence[int], by: Gating, pairs: Pairs | None,
    needs_mixed: bool, needs_gates: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write ds = (dy B) * G into `ds` [T, R]; give s * G [T, R] and the gates' gradient by token [T, E] float32."""
    if pairs is not None:
        return grouped_rank_gradients(dy, lora_b, s, ds, ranks, by, pairs, needs_mixed, needs_gates)
    (tokens, out), rank = dy.shape, lora_b.shape[1]
    s = s.contiguous()
    mixed = dy.new_empty(s.shape) if needs_mixed else s
    dgates = dy.new_zeros(tokens, by.experts, dtype=torch.float32) if needs_gates else s

    def run(tile: Tile, n: int, split: int) -> None:
        # a program sees all ranks of its rows, or leaves the sum over an expert's ranks to the second kernel
        fused = split == 1 and (not needs_gates or n >= rank)
        if tile == TORCH:
            planes, split = dy @ lora_b, 1
        else:
            planes = s if fused else dy.new_empty(split, tokens, rank, dtype=torch.float32)
            product(tile, n, split, fused, planes)
        if not fused:
            epilogue(planes, split)

    def product(tile: Tile, n: int, split: int, fused: bool, planes: Tensor) -> None:
        launch(
            _lora_mix_bwd_rank_kernel, (ceil_div(tokens, tile.m) * ceil_div(rank, n), split),
            dy, lora_b, s, ds, mixed, planes, dgates, by.gates, by.owner, by.scale,
            tokens, out, rank, by.run, by.experts, *dy.stride(), *lora_b.stride(), ds.stride(0),
            KIND=by.kind, GATES=needs_gates, MIXED=needs_mixed, FUSED=fused, SPLIT=split, PRECISION=dot_precision(),
            BLOCK_T=tile.m, BLOCK_R=n, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    def epilogue(planes: Tensor, split: int) -> None:
        gate = TILES.gate
        launch(
            _lora_mix_bwd_gate_kernel, (ceil_div(tokens, gate.m) * by.experts,),
            planes, s, ds, mixed, dgates, by.gates, by.starts, by.scale,
            tokens, rank, by.run, by.experts, ds.stride(0), split,
            KIND=by.kind, GATES=needs_gates, MIXED=needs_mixed,
            BLOCK_T=gate.m, BLOCK_R=16, warps=gate.warps,
        )  # fmt: skip

    _rank_launch("lora_mix_bwd_rank", tokens, out, rank, dy, run)
    return mixed, dgates


def input_gradient(
    dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, seed: Tensor | None, dropout: float
) -> Tensor:
    """dy W + drop'(ds A): [T, K]."""
    if dropout == 0.0:
        return add_product(dy, weight.t(), None, ds, lora_a.t())
    dx = dy @ weight
    tokens, width = dx.shape
    tile, rank = TILES.dropped_dx, lora_a.shape[0]
    launch(
        _lora_mix_bwd_dx_kernel, (ceil_div(tokens, tile.m) * ceil_div(width, tile.n),),
        dx, ds, lora_a, seed, tokens, width, rank, ds.stride(0), *lora_a.stride(),
        THRESHOLD=threshold(dropout), KEEP_SCALE=1.0 / (1.0 - dropout), PRECISION=dot_precision(),
        BLOCK_T=tile.m, BLOCK_K=tile.n, BLOCK_R=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return dx


def _dropped_da(ds: Tensor, x: Tensor, seed: Tensor, dropout: float, first: int, last: int) -> Tensor:
    """ds[:, first:last]^T drop(x) in float32: planes over splits of T, added in fixed order."""
    (tokens, width), rank = x.shape, last - first
    tile = TILES.dropped_da_float32 if x.dtype == torch.float32 else TILES.dropped_da
    m = min(tile.m, power_of_two(rank))
    programs = ceil_div(rank, m) * ceil_div(width, tile.n)
    blocks = ceil_div(tokens, tile.k)
    split = max(1, min(ceil_div(blocks, 4), ceil_div(2 * num_processors(x.device), max(programs, 1))))
    planes = x.new_empty(split, rank, width, dtype=torch.float32)
    launch(
        _lora_mix_bwd_da_kernel, (programs, split),
        planes, ds, x, seed, tokens, width, rank, first, ds.stride(0), *x.stride(), ceil_div(blocks, split),
        THRESHOLD=threshold(dropout), PRECISION=dot_precision(),
        BLOCK_R=m, BLOCK_K=tile.n, BLOCK_T=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return planes.sum(0) * (1.0 / (1.0 - dropout))


def adapter_gradients(
    dy: Tensor, x: Tensor, ds: Tensor, mixed: Tensor, lora_b: Tensor, seed: Tensor | None, dropout: float,
    ranks: Sequence[int], trainable: Sequence[bool], by: Gating | None, pairs: Pairs | None, needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA [R, K] and dB [N, R]: zero outside the ranks that train, which alone cost work. dB lies as B does.

    Pairs need to know `by`.
    """
    rank, columns, runs = mixed.shape[1], by_columns(lora_b), trainable_runs(ranks, trainable)
    if pairs is not None:
        da = x.new_zeros(rank, x.shape[1]) if needs_a else x.new_empty(0)
        db = torch.zeros_like(lora_b, dtype=x.dtype) if needs_b else x.new_empty(0)
        if needs_a:
            grouped_weight_gradient(da, ds, x, ranks, trainable, by, pairs, seed, dropout)
        if needs_b:
            grouped_weight_gradient(db.t(), mixed, dy, ranks, trainable, by, pairs)
        return da, db
    if list(runs) == [(0, rank)] and dropout == 0.0:
        da = ds.t() @ x if needs_a else x.new_empty(0)
        if not needs_b:
            return da, x.new_empty(0)
        return da, (mixed.t() @ dy).t() if columns else dy.t() @ mixed
    da = x.new_zeros(rank, x.shape[1]) if needs_a else x.new_empty(0)
    db = torch.zeros_like(lora_b, dtype=x.dtype) if needs_b else x.new_empty(0)
    for first, last in runs:
        if needs_a and dropout > 0.0:
            da[first:last] = _dropped_da(ds, x, seed, dropout, first, last)
        elif needs_a:
            da[first:last] = ds[:, first:last].t() @ x
        if needs_b and columns:
            db.t()[first:last] = mixed[:, first:last].t() @ dy
        elif needs_b:
            db[:, first:last] = dy.t() @ mixed[:, first:last]
    return da, db


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, seed, s, *_rest) -> str | None:
    if gates is not None and gates.dtype == torch.float64:
        return "triton takes gates in float32, got torch.float64"
    return dtype_reason(dy, x, weight, lora_a, lora_b, s)


@lora_mix_backward_op.provider("triton", supports=_supports_backward)
def lora_mix_backward_triton(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    """One pass over dy in rank space, then dx, dA and dB."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    wide = gates.float() if gates is not None and gates.is_floating_point() else gates
    by = Gating.of(wide, ranks, scaling, dy)
    choice = Choice(by.gates, by.run) if by.kind == EXPERT_IDS else None

    def run(grouping: Grouping) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pairs = pairs_by_expert(choice, x.shape[0], by, grouping)
        ds, mixed, by_token = x.new_empty(s.shape), x.new_empty(s.shape), x.new_empty(0)
        if needs_x or needs_a or needs_gates:
            mixed, by_token = rank_gradients(dy, lora_b, s, ds, ranks, by, pairs, needs_b, needs_gates)
        elif needs_b:
            kept = s.contiguous()
            mix_ranks(kept, kept, mixed, 0, by)
        dx = input_gradient(dy, weight, ds, lora_a, seed, dropout) if needs_x else x.new_empty(0)
        given = (dy, x, ds, mixed, lora_b, seed, dropout, ranks, trainable, by, pairs)
        return dx, *adapter_gradients(*given, needs_a, needs_b), by_token

    dx, da, db, dgates = run(pick_grouping("lora_mix_backward", x, lora_b, ranks, choice, run))
    if needs_gates:
        rows, experts = gates.shape
        dgates = dgates.view(rows, dy.shape[0] // max(rows, 1), experts).sum(1).to(gates.dtype)
    else:
        dgates = x.new_empty(0)
    dweight = dy.t() @ x if needs_weight else x.new_empty(0)
    dbias = dy.sum(0) if needs_bias else x.new_empty(0)
    return dx, dweight, dbias, da, db, dgates
