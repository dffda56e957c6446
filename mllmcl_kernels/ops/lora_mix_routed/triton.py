"""`lora_mix_routed` in Triton: one pass over x yields s, the logits, the gates and s * G.

A program owns all R + E columns of its rows, so the gates are known before the tile of s leaves its registers. Where
that does not fit (R + E over 256, dropout, which the router does not see, and cosine scores, which need norms) the
kernel of `route` runs first, that of `lora_mix` second. The backward is one pass over dy, one small kernel for the
gradient of the logits, and one product each for dx and for the weights of adapters and router, [ds | dlogits] being
one tensor.
"""

# T tokens, K in, N out, E experts, R sum of ranks, k chosen experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_expand import add_product, mixed_rows
from ...triton_grouped import Choice, Grouping, pairs_by_expert
from ...triton_tools import (
    Gating,
    Tile,
    Tiles,
    ceil_div,
    dot,
    dot_precision,
    dtype_reason,
    launch,
    power_of_two,
    rank_tables,
)
from ...tuning import bucket, pick_tile
from ..lora_mix.triton import (
    adapter_gradients,
    input_gradient,
    mix,
    pick_grouping,
    rank_gradients,
    trainable_runs,
)
from ..route import fake_routing
from ..route.reference import logits_backward
from ..route.triton import MOST_EXPERTS, given_masks, logits_gradient_triton, route_tile, route_triton
from . import lora_mix_routed_backward_op, lora_mix_routed_op

__all__ = ["merged_weights"]


@dataclass(frozen=True)
class RoutedTiles:
    """Tiles of the merged kernel, and the most columns R + E that a program holds."""

    #: m tokens, a multiple of PLANE_ROWS, and k columns of x; all ranks and all experts in every program
    shrink: Tiles
    widest: int = 256


TILES = RoutedTiles(
    shrink=Tiles(
        small=(Tile(16, 0, 64, 4, 4), Tile(16, 0, 64, 4, 3)),
        medium=(Tile(16, 0, 64, 4, 4), Tile(32, 0, 64, 4, 3)),
        large=(Tile(32, 0, 64, 4, 3), Tile(64, 0, 64, 8, 3), Tile(16, 0, 64, 4, 4)),
        float32=(Tile(32, 0, 32, 8, 2),),
    )
)


@dataclass(frozen=True)
class Passes:
    """How often x is read for router and ranks."""

    number: int


@triton.jit
def _lora_mix_routed_shrink_kernel(
    x_ptr, a_ptr, router_ptr, bias_ptr, s_ptr, mixed_ptr, owner_ptr, scale_ptr, noise_ptr, allowed_ptr,
    counted_ptr, gates_ptr, indices_ptr, values_ptr, logits_ptr, probs_ptr, planes_ptr,
    T, K, R, E, top_k, temperature, stride_xt, stride_xk, stride_mt, stride_allowed,
    BIAS: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr, COUNTED: tl.constexpr, SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PAD_C: tl.constexpr, PAD_E: tl.constexpr, PAD_K: tl.constexpr,
):  # fmt: skip
    """[s | logits] = x [A ; W_r]^T, the routing of these rows, and s * G.

    One product whose columns point into A and then into W_r: two products in one loop make the compiler stack its warps
    along the rows, which repeats the work of a flat tile.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, PAD_C).to(tl.int64)
    row_mask, is_rank, is_logit = rows < T, cols < R, (cols >= R) & (cols < R + E)
    columns = tl.where(is_rank, a_ptr + cols * K, router_ptr + (cols - R) * K)
    acc = tl.zeros((BLOCK_T, PAD_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xt + ks[None, :].to(tl.int64) * stride_xk,
            mask=row_mask[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        w = tl.load(columns[None, :] + ks[:, None], mask=(ks < K)[:, None] & (cols < R + E)[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    logits = acc
    if BIAS:
        logits += tl.load(bias_ptr + cols - R, mask=is_logit, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None] * E + (cols - R)[None, :]
    tl.store(logits_ptr + places, logits / temperature, mask=row_mask[:, None] & is_logit[None, :])

    # columns change threads by way of the cache: what threads of this program wrote, all of them see behind a barrier
    tl.debug_barrier()
    experts = tl.arange(0, PAD_E)
    inside = row_mask[:, None] & (experts < E)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * E + experts[None, :], mask=inside, other=0.0, volatile=True)
    route_tile(
        logits, rows, noise_ptr, allowed_ptr, counted_ptr,
        gates_ptr, indices_ptr, values_ptr, logits_ptr, probs_ptr, planes_ptr, T, E, top_k, stride_allowed,
        NOISE, MASK, COUNTED, SIGMOID, RENORMALIZE, STRAIGHT, BLOCK_T, PAD_E, PAD_K,
    )  # fmt: skip
    tl.debug_barrier()
    kept = row_mask[:, None] & is_rank[None, :]
    owner = tl.load(owner_ptr + cols, mask=is_rank, other=0)
    scale = tl.load(scale_ptr + cols, mask=is_rank, other=0.0)
    gate = tl.load(gates_ptr + rows[:, None] * E + owner[None, :], mask=kept, other=0.0, volatile=True)
    places = rows[:, None] * R + cols[None, :]
    tl.store(s_ptr + places, acc.to(s_ptr.dtype.element_ty), mask=kept)
    mixed = acc * (gate * scale[None, :])
    tl.store(mixed_ptr + rows[:, None] * stride_mt + cols[None, :], mixed.to(mixed_ptr.dtype.element_ty), mask=kept)


def _choice(indices: Tensor, experts: int, straight_through: bool) -> Choice | None:
    """Experts outside of which gates are zero and nobody asks for their gradient."""
    return None if straight_through or indices.shape[1] == experts else Choice(indices)


def _merges(rank: int, experts: int, score: str, dropout: float) -> bool:
    """Whether router and experts share a pass over x."""
    return dropout == 0.0 and score != "cosine" and rank > 0 and rank + experts <= TILES.widest


def _supports(x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, *_rest) -> str | None:
    if router_weight.shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {router_weight.shape[0]}"
    if noise is not None and noise.dtype == torch.float64:
        return "triton takes noise in float32, got torch.float64"
    return dtype_reason(x, weight, bias, lora_a, lora_b, router_weight, router_bias)


@lora_mix_routed_op.provider("triton", supports=_supports)
def lora_mix_routed_triton(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed,
    top_k, score, temperature, renormalize, straight_through, ranks, scaling, trainable, dropout,
):  # fmt: skip
    """One pass over x for the routing, s and s * G, then y; two passes where one does not fit or takes longer."""
    routing_options = (top_k, score, temperature, renormalize, straight_through)
    layer, router = (x, weight, bias, lora_a, lora_b), (router_weight, router_bias, noise, expert_mask, token_mask)

    def run(passes: Passes):
        if passes.number == 1:
            return _in_one_pass(*layer, *router, *routing_options, ranks, scaling)
        routing = route_triton(x, *router, *routing_options)
        by, choice = Gating.of(routing[0], ranks, scaling, x), _choice(routing[1], len(ranks), straight_through)
        return *mix(*layer, seed, ranks, dropout, by, choice), *routing

    if not _merges(lora_a.shape[0], router_weight.shape[0], score, dropout):
        return run(Passes(2))
    key = ("lora_mix_routed", bucket(x.shape[0]), *weight.shape, lora_a.shape[0], router_weight.shape[0], x.dtype)
    return run(pick_tile(key, (Passes(1), Passes(2)), x.device, run))


def _in_one_pass(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask,
    top_k, score, temperature, renormalize, straight_through, ranks, scaling,
):  # fmt: skip
    """y, s and the routing by the merged kernel."""
    (tokens, width), rank, experts = x.shape, lora_a.shape[0], router_weight.shape[0]
    routing = fake_routing(x, experts, top_k)
    s, mixed = x.new_empty(tokens, rank), mixed_rows(x, weight, lora_b)
    owner, scale, _ = rank_tables(tuple(ranks), tuple(scaling), x.device)
    allowed, counted, stride_allowed = given_masks(expert_mask, token_mask, s)
    a_rows, router_rows = lora_a.contiguous(), router_weight.contiguous()

    def run(tile: Tile) -> None:
        launch(
            _lora_mix_routed_shrink_kernel, (ceil_div(tokens, tile.m),),
            x, a_rows, router_rows, router_rows if router_bias is None else router_bias, s, mixed, owner, scale,
            s if noise is None else noise.contiguous(), allowed, counted, *routing,
            tokens, width, rank, experts, top_k, temperature,
            *x.stride(), mixed.stride(0), stride_allowed,
            BIAS=router_bias is not None, NOISE=noise is not None, MASK=expert_mask is not None,
            COUNTED=token_mask is not None, SIGMOID=score == "sigmoid", RENORMALIZE=renormalize,
            STRAIGHT=straight_through, PRECISION=dot_precision(),
            BLOCK_T=tile.m, BLOCK_K=tile.k, PAD_C=power_of_two(rank + experts), PAD_E=power_of_two(experts),
            PAD_K=power_of_two(top_k, 1), warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    key = ("lora_mix_routed_shrink", bucket(tokens), width, rank, experts, x.dtype)
    run(pick_tile(key, TILES.shrink.candidates(tokens, x.dtype), x.device, run))
    return add_product(x, weight, bias, mixed, lora_b), s, *routing


def _supports_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates, *_rest
) -> str | None:
    if router_weight.shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {router_weight.shape[0]}"
    reason = dtype_reason(d_gates, d_values, d_logits, d_probs, d_planes, gates)
    return reason or dtype_reason(dy, x, weight, lora_a, lora_b, router_weight, s)


def merged_weights(
    extended: Tensor, x: Tensor, runs: Sequence[tuple[int, int]], rank: int, needs_a: bool, needs_router: bool
) -> tuple[Tensor, Tensor]:
    """dA and dW_r from [ds | dlogits]^T x, one product where the last experts train."""
    experts = extended.shape[1] - rank
    da = x.new_zeros(rank, x.shape[1]) if needs_a else x.new_empty(0)
    drouter = x.new_empty(0)
    spans = list(runs) if needs_a else []
    if needs_router:
        joins = bool(spans) and spans[-1][1] == rank
        spans = [*spans[:-1], (spans[-1][0], rank + experts)] if joins else [*spans, (rank, rank + experts)]
    for first, last in spans:
        product = extended[:, first:last].t() @ x
        if first < rank:
            da[first : min(last, rank)] = product[: rank - first]
        if last > rank:
            drouter = product[max(rank - first, 0) :].clone()
    return da, drouter


@lora_mix_routed_backward_op.provider("triton", supports=_supports_backward)
def lora_mix_routed_backward_triton(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates,
    indices, logits, probs, token_mask, score, temperature, renormalize, straight_through, ranks, scaling, trainable,
    dropout, needs,
):  # fmt: skip
    """One pass over dy in rank space, the router's formula, then the products."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_router, needs_router_bias = needs
    rank, experts = lora_a.shape[0], router_weight.shape[0]
    by, choice = Gating.of(gates, ranks, scaling, dy), _choice(indices, len(ranks), straight_through)
    in_one = dropout == 0.0 and score != "cosine"

    def run(grouping: Grouping) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        pairs = pairs_by_expert(choice, x.shape[0], by, grouping)
        # [ds | dlogits] is one tensor, so that dx takes one product, and dA and dW_r another
        extended = x.new_empty(x.shape[0], rank + experts)
        ds, low = extended[:, :rank], extended[:, rank:]
        mixed, through_mix = rank_gradients(dy, lora_b, s, ds, ranks, by, pairs, needs_b, True)
        dl = logits_gradient_triton(
            d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask, score,
            temperature, renormalize, straight_through, more=through_mix, low=low,
        )  # fmt: skip
        dx, da, drouter = (x.new_empty(0) for _ in range(3))
        joined = in_one and pairs is None
        if needs_x and in_one:
            dx = add_product(dy, weight.t(), None, extended, torch.cat((lora_a, router_weight)).t())
        elif needs_x:
            dx = input_gradient(dy, weight, ds, lora_a, seed, dropout)
        if joined:
            da, drouter = merged_weights(extended, x, trainable_runs(ranks, trainable), rank, needs_a, needs_router)
        elif in_one:
            drouter = low.t() @ x if needs_router else drouter
        else:
            through_router, drouter = logits_backward(dl, x, router_weight, score, needs_x, needs_router)
            dx = dx + through_router
        given = (dy, x, ds, mixed, lora_b, seed, dropout, ranks, trainable, by, pairs)
        other, db = adapter_gradients(*given, needs_a and not joined, needs_b)
        return dx, da if joined else other, db, drouter, dl

    dx, da, db, drouter, dl = run(pick_grouping("lora_mix_routed_backward", x, lora_b, ranks, choice, run))
    dweight = dy.t() @ x if needs_weight else x.new_empty(0)
    dbias = dy.sum(0) if needs_bias else x.new_empty(0)
    drouter_bias = dl.sum(0).to(x.dtype) if needs_router_bias else x.new_empty(0)
    return dx, dweight, dbias, da, db, drouter, drouter_bias
