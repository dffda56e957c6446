"""`route` in Triton: scores, choice and gates of a block of rows in registers, forward and backward.

A program owns whole rows of E columns, those of one router, and writes their planes. Up to `widest_fused` experts the
same program computes the logits, beyond that torch does. Selection takes the largest remaining key k times; among equal
keys the lowest index wins.
"""

# T tokens, D in, L routers side by side, E experts (PAD_E the power of two above), k chosen experts (PAD_K), P planes

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import dense_rows, mask_bytes
from ...triton_tools import (
    Tile,
    Tiles,
    ceil_div,
    dot,
    dot_precision,
    dtype_reason,
    launch,
    power_of_two,
)
from ...tuning import bucket, pick_tile
from ..routing_planes.triton import MOST_EXPERTS, counted_rows, plane_slopes, plane_tile, store_planes
from . import fake_routing, route_backward_op, route_op
from .reference import COSINE_EPSILON, logits_backward

__all__ = [
    "MOST_EXPERTS",
    "gates_from_logits_triton",
    "given_masks",
    "logits_gradient_triton",
    "route_tile",
    "route_triton",
]

_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_EPSILON = tl.constexpr(COSINE_EPSILON)


@dataclass(frozen=True)
class RouteTiles:
    """Tiles by kernel and the number of experts up to which one kernel does all."""

    #: m tokens, a multiple of PLANE_ROWS, and k columns of x; n is given by E
    fused: Tiles
    widest_fused: int = 128
    #: entries [rows, PAD_E] that a program without a product holds, where rows are not too long
    entries: int = 1024


TILES = RouteTiles(
    fused=Tiles(
        small=(Tile(16, 0, 256, 4, 3), Tile(16, 0, 128, 4, 4)),
        medium=(Tile(16, 0, 256, 4, 3), Tile(32, 0, 128, 4, 3)),
        large=(Tile(32, 0, 64, 4, 4), Tile(64, 0, 64, 4, 4), Tile(16, 0, 128, 4, 4)),
        float32=(Tile(16, 0, 64, 4, 2),),
    )
)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def table_rows(tokens):
    """Rows of this program's router for these tokens, where routers stand side by side: a row for token and router."""
    return tokens * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def route_tile(
    logits, tokens, noise_ptr, allowed_ptr, counted_ptr,
    gates_ptr, indices_ptr, values_ptr, logits_ptr, probs_ptr, planes_ptr, T, E, top_k, stride_allowed,
    NOISE: tl.constexpr, MASK: tl.constexpr, COUNTED: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
    STRAIGHT: tl.constexpr, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr, PAD_K: tl.constexpr,
):  # fmt: skip
    """Everything from the logits [BLOCK_T, PAD_E] of this program's tokens and router on, written out."""
    cols = tl.arange(0, PAD_E)
    rows, row_mask = table_rows(tokens), tokens < T
    inside = row_mask[:, None] & (cols < E)[None, :]
    places = rows[:, None] * E + cols[None, :]
    tl.store(logits_ptr + places, logits, mask=inside)
    allowed = inside
    if MASK:
        allowed = inside & (tl.load(allowed_ptr + tokens[:, None] * stride_allowed + cols, mask=inside, other=0) != 0)
    noisy = logits
    if NOISE:
        noisy = logits + tl.load(noise_ptr + places, mask=inside, other=0.0).to(tl.float32)
    probs = _scores(noisy, allowed, SIGMOID)
    tl.store(probs_ptr + places, probs, mask=inside)

    broken = tl.max((probs != probs).to(tl.int32), 1) > 0
    # the order of torch.nan_to_num, and ascending indices in a row without numbers
    key = tl.where(noisy != noisy, 0.0, tl.minimum(tl.maximum(noisy, -_MAX), _MAX))
    key = tl.where(broken[:, None], -cols.to(tl.float32)[None, :], key)
    raw = probs
    if STRAIGHT:
        raw = tl.where(probs != probs, probs, 1.0)
    slots = tl.arange(0, PAD_K)
    picks = tl.full((BLOCK_T, PAD_K), -1, tl.int32)
    values = tl.zeros((BLOCK_T, PAD_K), tl.float32)
    left = allowed
    chosen = tl.zeros((BLOCK_T, PAD_E), tl.int1)
    for slot in range(top_k):
        best = tl.max(tl.where(left, key, float("-inf")), 1)
        ties = tl.where(left & (key == best[:, None]), cols[None, :], PAD_E)
        pick = tl.min(ties, 1)
        hit = cols[None, :] == pick[:, None]
        here = (slots == slot)[None, :]
        picks = tl.where(here, tl.where(pick < PAD_E, pick, -1)[:, None], picks)
        values = tl.where(here, tl.sum(tl.where(hit, raw, 0.0), 1)[:, None], values)
        left = left & (cols[None, :] != pick[:, None])
        chosen = chosen | hit
    gates = tl.where(chosen, raw, 0.0)
    if RENORMALIZE:
        total = tl.sum(gates, 1)[:, None]
        gates = tl.where(chosen, gates / total, 0.0)
        values = tl.where(picks >= 0, values / total, 0.0)
    tl.store(gates_ptr + places, gates, mask=inside)
    kept = row_mask[:, None] & (slots < top_k)[None, :]
    slot_places = rows[:, None] * top_k + slots[None, :]
    tl.store(indices_ptr + slot_places, picks, mask=kept)
    tl.store(values_ptr + slot_places, values, mask=kept)
    counted = counted_rows(counted_ptr, tokens, T, COUNTED)
    width = 3 * E + 3
    store_planes(
        planes_ptr + tl.program_id(1) * width, tl.num_programs(1) * width, tl.program_id(0).to(tl.int64), counted,
        logits, probs, gates, tl.where(chosen, 1.0, 0.0), T, E, BLOCK_T, PAD_E,
    )  # fmt: skip


@triton.jit
def _scores(logits, allowed, SIGMOID: tl.constexpr):
    """Softmax over the allowed entries or their sigmoids; NaN in a row that has no scores, zero where forbidden."""
    if SIGMOID:
        probs = 1.0 / (1.0 + tl.exp(-logits))
        # false for NaN and for both infinities
        finite = tl.abs(logits) < float("inf")
        broken = tl.max((allowed & (finite == 0)).to(tl.int32), 1) > 0
        probs = tl.where(broken[:, None], float("nan"), probs)
    else:
        masked = tl.where(allowed, logits, float("-inf"))
        powers = tl.exp(masked - tl.max(masked, 1)[:, None])
        probs = powers / tl.sum(powers, 1)[:, None]
    return tl.where(allowed, probs, 0.0)


@triton.jit
def _route_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, raw_ptr, noise_ptr, allowed_ptr, counted_ptr,
    gates_ptr, indices_ptr, values_ptr, logits_ptr, probs_ptr, planes_ptr,
    T, D, E, top_k, temperature, stride_xt, stride_xd, stride_we, stride_wd, stride_allowed,
    FUSED: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr,
    COUNTED: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PAD_E: tl.constexpr, PAD_K: tl.constexpr,
):  # fmt: skip
    """Logits, scores, choice and gates of a block of rows; without FUSED the logits come from `raw_ptr` [T, L * E]."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = tokens < T
    cols = tl.arange(0, PAD_E)
    if FUSED:
        logits = tl.zeros((BLOCK_T, PAD_E), tl.float32)
        x_square = tl.zeros((BLOCK_T,), tl.float32)
        w_square = tl.zeros((PAD_E,), tl.float32)
        for start in range(0, D, BLOCK_D):
            ds = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            x = tl.load(
                x_ptr + tokens[:, None] * stride_xt + ds[None, :] * stride_xd,
                mask=row_mask[:, None] & (ds < D)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + cols[None, :].to(tl.int64) * stride_we + ds[:, None] * stride_wd,
                mask=(ds < D)[:, None] & (cols < E)[None, :],
                other=0.0,
            )
            logits = dot(x, w, logits, PRECISION)
            if COSINE:
                x_wide, w_wide = x.to(tl.float32), w.to(tl.float32)
                x_square += tl.sum(x_wide * x_wide, 1)
                w_square += tl.sum(w_wide * w_wide, 0)
        if COSINE:
            logits = logits / tl.maximum(tl.sqrt_rn(x_square), _EPSILON)[:, None]
            logits = logits / tl.maximum(tl.sqrt_rn(w_square), _EPSILON)[None, :]
        if BIAS:
            logits += tl.load(bias_ptr + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
        logits = logits / temperature
    else:
        inside = row_mask[:, None] & (cols < E)[None, :]
        logits = tl.load(raw_ptr + table_rows(tokens)[:, None] * E + cols[None, :], mask=inside, other=0.0)
    route_tile(
        logits, tokens, noise_ptr, allowed_ptr, counted_ptr,
        gates_ptr, indices_ptr, values_ptr, logits_ptr, probs_ptr, planes_ptr, T, E, top_k, stride_allowed,
        NOISE, MASK, COUNTED, SIGMOID, RENORMALIZE, STRAIGHT, BLOCK_T, PAD_E, PAD_K,
    )  # fmt: skip


@triton.jit
def _route_bwd_kernel(
    dgates_ptr, more_ptr, dvalues_ptr, dlogits_ptr, dprobs_ptr, dplanes_ptr,
    gates_ptr, indices_ptr, logits_ptr, probs_ptr, counted_ptr, dl_ptr, low_ptr,
    T, L, E, top_k, temperature, stride_planes, stride_low,
    GATES: tl.constexpr, MORE: tl.constexpr, VALUES: tl.constexpr, LOGITS: tl.constexpr, PROBS: tl.constexpr,
    PLANES: tl.constexpr, COUNTED: tl.constexpr, LOW: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """Gradient of x W^T + b from those of its outputs; MORE adds to that of the gates, LOW writes a second copy."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens = rows // L
    cols = tl.arange(0, PAD_E)
    inside = (tokens < T)[:, None] & (cols < E)[None, :]
    places = rows[:, None] * E + cols[None, :]
    probs = tl.load(probs_ptr + places, mask=inside, other=0.0)
    h = tl.zeros((BLOCK_T, PAD_E), tl.float32)
    d_probs = tl.zeros((BLOCK_T, PAD_E), tl.float32)
    d_logits = tl.zeros((BLOCK_T, PAD_E), tl.float32)
    if PLANES:
        logits = tl.load(logits_ptr + places, mask=inside, other=0.0)
        counted = counted_rows(counted_ptr, tokens, T, COUNTED)
        h, d_probs, d_logits = plane_slopes(
            dplanes_ptr + (rows - tokens * L) * (3 * E + 3), stride_planes, tokens, counted, logits, probs, E, PAD_E
        )  # fmt: skip
    if GATES:
        h += tl.load(dgates_ptr + places, mask=inside, other=0.0)
    if MORE:
        h += tl.load(more_ptr + places, mask=inside, other=0.0)
    if PROBS:
        d_probs += tl.load(dprobs_ptr + places, mask=inside, other=0.0)
    if LOGITS:
        d_logits += tl.load(dlogits_ptr + places, mask=inside, other=0.0)
    chosen = tl.zeros((BLOCK_T, PAD_E), tl.int1)
    for slot in range(top_k):
        pick = tl.load(indices_ptr + rows * top_k + slot, mask=tokens < T, other=-1)
        hit = cols[None, :] == pick[:, None]
        if VALUES:
            dvalue = tl.load(dvalues_ptr + rows * top_k + slot, mask=tokens < T, other=0.0)
            h += tl.where(hit, dvalue[:, None], 0.0)
        chosen = chosen | hit
    if STRAIGHT:
        d = h
    elif RENORMALIZE:
        gates = tl.load(gates_ptr + places, mask=inside, other=0.0)
        total = tl.sum(tl.where(chosen, probs, 0.0), 1)[:, None]
        mean = tl.sum(tl.where(chosen, h * gates, 0.0), 1)[:, None]
        d = tl.where(chosen, (h - mean) / total, 0.0)
    else:
        d = tl.where(chosen, h, 0.0)
    d += d_probs
    if SIGMOID:
        through = probs * (1.0 - probs) * d
    else:
        through = probs * (d - tl.sum(probs * d, 1)[:, None])
    dl = (through + d_logits) / temperature
    tl.store(dl_ptr + places, dl, mask=inside)
    if LOW:
        low = dl.to(low_ptr.dtype.element_ty)
        tl.store(low_ptr + rows[:, None] * stride_low + cols[None, :], low, mask=inside)


# -- forward ----------------------------------------------------------------------------------------------------------


def given_masks(expert_mask: Tensor | None, token_mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both masks as bytes, `like` for None; and the distance between the experts of tokens, 0 where all share them."""
    allowed, counted = (like if mask is None else mask_bytes(mask) for mask in (expert_mask, token_mask))
    shares = expert_mask is None or expert_mask.shape[0] == 1
    return allowed, counted, 0 if shares else expert_mask.shape[1]


def _supports(x, weight, bias, noise, *_rest) -> str | None:
    if weight.shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {weight.shape[0]}"
    if noise is not None and noise.dtype == torch.float64:
        return "triton takes noise in float32, got torch.float64"
    return dtype_reason(x, weight, bias)


def _plain_logits(x: Tensor, weight: Tensor, bias: Tensor | None, score: str, temperature: float) -> Tensor:
    x, weight = x.float(), weight.float()
    if score == "cosine":
        x, weight = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(COSINE_EPSILON) for rows in (x, weight))
    logits = x @ weight.t()
    return (logits if bias is None else logits + bias.float()) / temperature


@route_op.provider("triton", supports=_supports)
def route_triton(
    x, weight, bias, noise, expert_mask, token_mask, top_k, score, temperature, renormalize, straight_through
):  # fmt: skip
    """Logits, scores, choice, gates and planes in one kernel; over `widest_fused` experts the logits by torch."""
    (tokens, width), experts = x.shape, weight.shape[0]
    choice = (noise, expert_mask, token_mask, top_k, score, renormalize, straight_through)
    if power_of_two(experts) > TILES.widest_fused:
        return gates_from_logits_triton(_plain_logits(x, weight, bias, score, temperature), *choice)
    outputs = fake_routing(x, experts, top_k)
    layer = (x, weight, weight if bias is None else bias, x)
    sizes = (tokens, width, experts, top_k, temperature, *x.stride(), *weight.stride())

    def run(tile: Tile) -> None:
        flags = {"FUSED": True, "BIAS": bias is not None, "COSINE": score == "cosine", "BLOCK_D": tile.k}
        _launch_route(layer, outputs, sizes, *choice, 1, tile.m, flags, warps=tile.warps, stages=tile.stages)

    key = ("route_fwd", bucket(tokens), width, experts, x.dtype)
    run(pick_tile(key, TILES.fused.candidates(tokens, x.dtype), x.device, run))
    return outputs


def gates_from_logits_triton(
    logits: Tensor, noise: Tensor | None, expert_mask: Tensor | None, token_mask: Tensor | None, top_k: int, score: str,
    renormalize: bool, straight_through: bool, count: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gates, indices, values, logits, probs, planes from float32 logits `[T, count * E]` of routers side by side."""
    logits = logits.contiguous()
    tokens, experts = logits.shape[0], logits.shape[1] // count
    outputs = fake_routing(logits, experts, top_k, count)
    rows, warps = plane_tile(TILES.entries, power_of_two(experts))
    sizes = (tokens, 0, experts, top_k, 1.0, 0, 0, 0, 0)
    flags = {"FUSED": False, "BIAS": False, "COSINE": False, "BLOCK_D": 16}
    _launch_route(
        (logits,) * 4, outputs, sizes, noise, expert_mask, token_mask, top_k, score, renormalize, straight_through,
        count, rows, flags, warps=warps,
    )  # fmt: skip
    return outputs


def _launch_route(
    layer, outputs, sizes, noise, expert_mask, token_mask, top_k, score, renormalize, straight_through, count: int,
    rows: int, flags: dict, **launched,
) -> None:  # fmt: skip
    (tokens, _, experts, *_), like = sizes, outputs[0]
    allowed, counted, stride_allowed = given_masks(expert_mask, token_mask, like)
    launch(
        _route_fwd_kernel, (ceil_div(tokens, rows), count),
        *layer, like if noise is None else noise.contiguous(), allowed, counted, *outputs, *sizes, stride_allowed,
        NOISE=noise is not None, MASK=expert_mask is not None, COUNTED=token_mask is not None,
        SIGMOID=score == "sigmoid", RENORMALIZE=renormalize, STRAIGHT=straight_through, PRECISION=dot_precision(),
        BLOCK_T=rows, PAD_E=power_of_two(experts), PAD_K=power_of_two(top_k, 1), **flags, **launched,
    )  # fmt: skip


# -- backward ---------------------------------------------------------------------------------------------------------


def logits_gradient_triton(
    d_gates: Tensor | None, d_values: Tensor | None, d_logits: Tensor | None, d_probs: Tensor | None,
    d_planes: Tensor | None, gates: Tensor, indices: Tensor, logits: Tensor, probs: Tensor, token_mask: Tensor | None,
    score: str, temperature: float, renormalize: bool, straight_through: bool, count: int = 1,
    more: Tensor | None = None, low: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of x W^T + b, [T, count * E] float32, of routers side by side.

    `more`, like the gates, is added to their gradient; `low` [T, E] of one router, rows any distance apart, gets a copy
    in its dtype.
    """
    tokens, experts, top_k = gates.shape[0], gates.shape[1] // count, indices.shape[1] // count
    saved = [tensor.contiguous() for tensor in (gates, indices, logits, probs)]
    dl = torch.empty_like(saved[0])
    came = dict(GATES=d_gates, MORE=more, VALUES=d_values, LOGITS=d_logits, PROBS=d_probs)
    grads = [dl if grad is None else grad.contiguous() for grad in came.values()]
    planes = dl if d_planes is None else dense_rows(d_planes)
    pad = power_of_two(experts)
    rows = max(1, TILES.entries // pad)
    launch(
        _route_bwd_kernel, (ceil_div(tokens * count, rows),),
        *grads, planes, *saved, dl if token_mask is None else mask_bytes(token_mask), dl, dl if low is None else low,
        tokens, count, experts, top_k, temperature, planes.stride(0), 0 if low is None else low.stride(0),
        **{name: grad is not None for name, grad in came.items()}, PLANES=d_planes is not None,
        COUNTED=token_mask is not None, LOW=low is not None, SIGMOID=score == "sigmoid", RENORMALIZE=renormalize,
        STRAIGHT=straight_through, BLOCK_T=rows, PAD_E=pad, warps=4,
    )  # fmt: skip
    return dl


def _supports_backward(d_gates, d_values, d_logits, d_probs, d_planes, x, weight, gates, *_rest) -> str | None:
    if weight.shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {weight.shape[0]}"
    return dtype_reason(x, weight) or dtype_reason(d_gates, d_values, d_logits, d_probs, d_planes, gates)


@route_backward_op.provider("triton", supports=_supports_backward)
def route_backward_triton(
    d_gates, d_values, d_logits, d_probs, d_planes, x, weight, gates, indices, logits, probs, token_mask,
    score, temperature, renormalize, straight_through, needs,
):  # fmt: skip
    """One kernel for the logits' gradient, then the products."""
    tables = (d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask)
    dl = logits_gradient_triton(*tables, score, temperature, renormalize, straight_through)
    dx, dweight = logits_backward(dl, x, weight, score, needs[0], needs[1])
    dbias = dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
    return dx if needs[0] else x.new_empty(0), dweight if needs[1] else x.new_empty(0), dbias
