"""`routing_statistics` in Triton: planes of sums and their sum forward, one launch backward; rows may lie apart."""

# T tokens, E experts (PAD_E the power of two above), k chosen experts, N planes

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import dense_rows
from ...triton_tools import ceil_div, launch, power_of_two
from . import _fake, _fake_backward, routing_statistics_backward_op, routing_statistics_op

__all__: list[str] = []

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class StatisticsTiles:
    """Sizes of the launches, for every number of experts."""

    #: entries [rows, PAD_E] that a program holds of each table
    entries: int = 1024
    #: planes at most: what one program adds up in a moment
    planes: int = 128


TILES = StatisticsTiles()


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _log_sum(logits, inside):
    """log sum exp of each row [BLOCK_T]; infinite where the largest is, NaN where a logit is."""
    masked = tl.where(inside, logits, float("-inf"))
    top = tl.max(masked, 1)
    # of an infinite maximum nothing is subtracted
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    return tl.log(tl.sum(tl.exp(masked - top[:, None]), 1)) + top


@triton.jit
def _normalised(probs):
    """q = p / sum p, log q, and the sum [BLOCK_T, 1], 1 for a row where nothing is allowed."""
    total = tl.sum(probs, 1)[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    q = probs / total
    return q, tl.log(tl.where(q < _TINY, _TINY, q)), total


@triton.jit
def _counted_rows(mask_ptr, rows, T, MASK: tl.constexpr):
    """Which rows [BLOCK_T] count."""
    counted = rows < T
    if MASK:
        counted = counted & (tl.load(mask_ptr + rows, mask=counted, other=0) != 0)
    return counted


@triton.jit
def _routing_statistics_planes_kernel(
    logits_ptr, probs_ptr, gates_ptr, indices_ptr, mask_ptr, planes_ptr,
    T, E, top_k, steps, stride_logits, stride_probs, stride_gates, stride_indices,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """This program's plane [3 E + 3]: choices, gates and probabilities of each expert; z, entropy and tokens."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, PAD_E)
    load = tl.zeros((PAD_E,), tl.float32)
    importance = tl.zeros((PAD_E,), tl.float32)
    mass = tl.zeros((PAD_E,), tl.float32)
    z = tl.zeros((BLOCK_T,), tl.float32)
    entropy = tl.zeros((BLOCK_T,), tl.float32)
    tokens = tl.zeros((BLOCK_T,), tl.float32)
    for step in range(steps):
        rows = (step * tl.num_programs(0) + pid) * BLOCK_T + tl.arange(0, BLOCK_T)
        counted = _counted_rows(mask_ptr, rows, T, MASK)
        inside = counted[:, None] & (cols < E)[None, :]
        chosen = tl.zeros((BLOCK_T, PAD_E), tl.float32)
        for slot in range(top_k):
            pick = tl.load(indices_ptr + rows * stride_indices + slot, mask=counted, other=-1)
            chosen += tl.where(cols[None, :] == pick[:, None], 1.0, 0.0)
        load += tl.sum(chosen, 0)
        gates = tl.load(gates_ptr + rows[:, None] * stride_gates + cols[None, :], mask=inside, other=0.0)
        importance += tl.sum(gates, 0)
        probs = tl.load(probs_ptr + rows[:, None] * stride_probs + cols[None, :], mask=inside, other=0.0)
        mass += tl.sum(probs, 0)
        q, log_q, _ = _normalised(probs)
        entropy -= tl.sum(q * log_q, 1)
        logits = tl.load(logits_ptr + rows[:, None] * stride_logits + cols[None, :], mask=inside, other=0.0)
        lse = _log_sum(logits, inside)
        z += tl.where(counted, lse * lse, 0.0)
        tokens += tl.where(counted, 1.0, 0.0)
    plane_ptr = planes_ptr + pid * (3 * E + 3)
    tl.store(plane_ptr + cols, load, mask=cols < E)
    tl.store(plane_ptr + E + cols, importance, mask=cols < E)
    tl.store(plane_ptr + 2 * E + cols, mass, mask=cols < E)
    tl.store(plane_ptr + 3 * E, tl.sum(z, 0))
    tl.store(plane_ptr + 3 * E + 1, tl.sum(entropy, 0))
    tl.store(plane_ptr + 3 * E + 2, tl.sum(tokens, 0))


@triton.jit
def _routing_statistics_sum_kernel(
    planes_ptr, load_ptr, importance_ptr, balance_ptr, z_ptr, entropy_ptr, count_ptr, N, E, steps,
    BLOCK_N: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """The sums of all planes, and what follows from them."""
    cols = tl.arange(0, PAD_E)
    load = tl.zeros((PAD_E,), tl.float32)
    importance = tl.zeros((PAD_E,), tl.float32)
    mass = tl.zeros((PAD_E,), tl.float32)
    z = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    tokens = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(steps):
        places = (step * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        plane_ptrs = planes_ptr + places * (3 * E + 3)
        inside = (places < N)[:, None] & (cols < E)[None, :]
        load += tl.sum(tl.load(plane_ptrs[:, None] + cols[None, :], mask=inside, other=0.0), 0)
        importance += tl.sum(tl.load(plane_ptrs[:, None] + (E + cols)[None, :], mask=inside, other=0.0), 0)
        mass += tl.sum(tl.load(plane_ptrs[:, None] + (2 * E + cols)[None, :], mask=inside, other=0.0), 0)
        z += tl.load(plane_ptrs + 3 * E, mask=places < N, other=0.0)
        entropy += tl.load(plane_ptrs + 3 * E + 1, mask=places < N, other=0.0)
        tokens += tl.load(plane_ptrs + 3 * E + 2, mask=places < N, other=0.0)
    count = tl.maximum(tl.sum(tokens, 0), 1.0)
    share = load / tl.maximum(tl.sum(load, 0), 1.0)
    tl.store(load_ptr + cols, load, mask=cols < E)
    tl.store(importance_ptr + cols, importance, mask=cols < E)
    tl.store(balance_ptr, E * tl.sum(share * mass, 0) / count)
    tl.store(z_ptr, tl.sum(z, 0) / count)
    tl.store(entropy_ptr, tl.sum(entropy, 0) / count)
    tl.store(count_ptr, count)


@triton.jit
def _routing_statistics_bwd_kernel(
    dimportance_ptr, dbalance_ptr, dz_ptr, dentropy_ptr, logits_ptr, probs_ptr, mask_ptr, load_ptr, count_ptr,
    dlogits_ptr, dprobs_ptr, dgates_ptr, T, E, stride_logits, stride_probs,
    IMPORTANCE: tl.constexpr, BALANCE: tl.constexpr, Z: tl.constexpr, ENTROPY: tl.constexpr, MASK: tl.constexpr,
    LOGITS: tl.constexpr, PROBS: tl.constexpr, GATES: tl.constexpr, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """Gradients of logits, probabilities and gates, each where it is wanted, zero in rows that do not count."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, PAD_E)
    counted = _counted_rows(mask_ptr, rows, T, MASK)
    inside = counted[:, None] & (cols < E)[None, :]
    written = (rows < T)[:, None] & (cols < E)[None, :]
    places = rows[:, None] * E + cols[None, :]
    count = tl.load(count_ptr)
    if LOGITS:
        d = tl.zeros((BLOCK_T, PAD_E), tl.float32)
        if Z:
            logits = tl.load(logits_ptr + rows[:, None] * stride_logits + cols[None, :], mask=inside, other=0.0)
            lse = _log_sum(logits, inside)[:, None]
            d = 2.0 * tl.load(dz_ptr) / count * lse * tl.exp(logits - lse)
        tl.store(dlogits_ptr + places, tl.where(inside, d, 0.0), mask=written)
    if PROBS:
        d = tl.zeros((BLOCK_T, PAD_E), tl.float32)
        if BALANCE:
            load = tl.load(load_ptr + cols, mask=cols < E, other=0.0)
            d += (tl.load(dbalance_ptr) * E / count * load / tl.maximum(tl.sum(load, 0), 1.0))[None, :]
        if ENTROPY:
            probs = tl.load(probs_ptr + rows[:, None] * stride_probs + cols[None, :], mask=inside, other=0.0)
            q, log_q, total = _normalised(probs)
            # a q below the clamp passes no gradient through its logarithm
            slope = log_q + tl.where(q < _TINY, 0.0, 1.0)
            d -= tl.load(dentropy_ptr) / count * (slope - tl.sum(q * slope, 1)[:, None]) / total
        tl.store(dprobs_ptr + places, tl.where(inside, d, 0.0), mask=written)
    if GATES:
        d = tl.zeros((BLOCK_T, PAD_E), tl.float32)
        if IMPORTANCE:
            d += tl.load(dimportance_ptr + cols, mask=cols < E, other=0.0)[None, :]
        tl.store(dgates_ptr + places, tl.where(inside, d, 0.0), mask=written)


# -- launches ---------------------------------------------------------------------------------------------------------


def _reason(*tables: Tensor) -> str | None:
    foreign = next((table.dtype for table in tables if table.dtype != torch.float32), None)
    if foreign is not None:
        return f"triton computes statistics in float32, got {foreign}"
    experts = tables[0].shape[1]
    return f"triton routes to at most {MOST_EXPERTS} experts, got {experts}" if experts > MOST_EXPERTS else None


def _bytes(mask: Tensor | None, like: Tensor) -> Tensor:
    return like if mask is None else mask.contiguous().view(torch.uint8)


@routing_statistics_op.provider("triton", supports=lambda logits, probs, gates, *_rest: _reason(logits, probs, gates))
def routing_statistics_triton(logits, probs, gates, indices, token_mask):
    """A plane of sums for each program, then their sum in a fixed order."""
    tables = [dense_rows(table) for table in (logits, probs, gates, indices)]
    outputs = _fake(logits, probs, gates, indices, token_mask)
    tokens, experts = gates.shape
    pad = power_of_two(experts, 1)
    rows = max(1, TILES.entries // pad)
    blocks = ceil_div(tokens, rows)
    planes = min(blocks, TILES.planes)
    sums = gates.new_empty(planes, 3 * experts + 3)
    launch(
        _routing_statistics_planes_kernel, (planes,), *tables, _bytes(token_mask, gates), sums,
        tokens, experts, indices.shape[1], ceil_div(blocks, max(planes, 1)), *(table.stride(0) for table in tables),
        MASK=token_mask is not None, BLOCK_T=rows, PAD_E=pad, warps=4,
    )  # fmt: skip
    block = min(max(1, TILES.entries // pad), power_of_two(TILES.planes, 1))
    launch(
        _routing_statistics_sum_kernel, (1,), sums, *outputs, planes, experts, ceil_div(planes, block),
        BLOCK_N=block, PAD_E=pad, warps=4,
    )  # fmt: skip
    return outputs


@routing_statistics_backward_op.provider("triton", supports=lambda *args: _reason(args[4], args[5]))
def routing_statistics_backward_triton(
    d_importance, d_balance, d_z, d_entropy, logits, probs, token_mask, load, count, needs
):
    """All gradients in one launch."""
    grads = _fake_backward(None, None, None, None, logits, probs, None, None, None, needs)
    came = [None if grad is None else grad.contiguous() for grad in (d_importance, d_balance, d_z, d_entropy)]
    tables = dense_rows(logits), dense_rows(probs)
    tokens, experts = probs.shape
    pad = power_of_two(experts, 1)
    rows = max(1, TILES.entries // pad)
    flags = dict(zip(("IMPORTANCE", "BALANCE", "Z", "ENTROPY"), (grad is not None for grad in came), strict=True))
    flags |= dict(zip(("LOGITS", "PROBS", "GATES"), needs, strict=True))
    launch(
        _routing_statistics_bwd_kernel, (ceil_div(tokens, rows) if any(needs) else 0,),
        *(count if grad is None else grad for grad in came), *tables, _bytes(token_mask, count), load, count, *grads,
        tokens, experts, *(table.stride(0) for table in tables),
        MASK=token_mask is not None, **flags, BLOCK_T=rows, PAD_E=pad, warps=4,
    )  # fmt: skip
    return grads
