"""`routing_planes` in Triton: one launch forward, one backward; rows may lie apart. `route` uses the same functions."""

# T tokens, E experts (PAD_E the power of two above), k chosen experts, P planes

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import dense_rows, mask_bytes
from ...triton_tools import ceil_div, launch, power_of_two
from . import _fake_backward, fake_planes, routing_planes_backward_op, routing_planes_op
from .reference import PLANE_ROWS

__all__ = ["MOST_EXPERTS", "counted_rows", "plane_slopes", "plane_tile", "reason_against", "store_planes"]

_ROWS = tl.constexpr(PLANE_ROWS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
MOST_EXPERTS = 1024
#: entries [rows, PAD_E] that a program holds of each table, where rows are not too long
ENTRIES = 1024


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
def counted_rows(mask_ptr, tokens, T, MASK: tl.constexpr):
    """Which tokens [BLOCK_T] count."""
    counted = tokens < T
    if MASK:
        counted = counted & (tl.load(mask_ptr + tokens, mask=counted, other=0) != 0)
    return counted


@triton.jit
def _by_plane(table, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr):
    """Sums over the rows of each plane: [BLOCK_T, PAD_E] to [BLOCK_T / PLANE_ROWS, PAD_E]."""
    return tl.sum(tl.reshape(table, (BLOCK_T // _ROWS, _ROWS, PAD_E)), 1)


@triton.jit
def store_planes(
    planes_ptr, stride, block, counted, logits, probs, gates, choices, T, E,
    BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """The planes of this block of tokens from their rows [BLOCK_T, PAD_E]; BLOCK_T is a multiple of PLANE_ROWS."""
    cols = tl.arange(0, PAD_E)
    inside = counted[:, None] & (cols < E)[None, :]
    planes = block * (BLOCK_T // _ROWS) + tl.arange(0, BLOCK_T // _ROWS)
    here = planes * _ROWS < T
    starts = planes_ptr + planes * stride
    last = (starts + 3 * E)[:, None]
    lse = _log_sum(logits, inside)
    tl.store(last, _by_plane(tl.where(counted, lse * lse, 0.0)[:, None], BLOCK_T, 1), mask=here[:, None])
    probs = tl.where(inside, probs, 0.0)
    q, log_q, _ = _normalised(probs)
    tl.store(last + 1, _by_plane(-tl.sum(q * log_q, 1)[:, None], BLOCK_T, 1), mask=here[:, None])
    tl.store(last + 2, _by_plane(tl.where(counted, 1.0, 0.0)[:, None], BLOCK_T, 1), mask=here[:, None])
    places, written = starts[:, None] + cols[None, :], here[:, None] & (cols < E)[None, :]
    tl.store(places, _by_plane(tl.where(inside, choices, 0.0), BLOCK_T, PAD_E), mask=written)
    tl.store(places + E, _by_plane(tl.where(inside, gates, 0.0), BLOCK_T, PAD_E), mask=written)
    tl.store(places + 2 * E, _by_plane(probs, BLOCK_T, PAD_E), mask=written)


@triton.jit
def plane_slopes(dplanes_ptr, stride, tokens, counted, logits, probs, E, PAD_E: tl.constexpr):
    """What gates, probabilities and logits [BLOCK_T, PAD_E] get from their planes' gradient; nothing from a zero."""
    cols = tl.arange(0, PAD_E)
    inside = counted[:, None] & (cols < E)[None, :]
    starts = dplanes_ptr + (tokens // _ROWS) * stride
    places = starts[:, None] + cols[None, :]
    d_gates = tl.load(places + E, mask=inside, other=0.0)
    d_probs = tl.load(places + 2 * E, mask=inside, other=0.0)
    d_squares = tl.load(starts + 3 * E, mask=counted, other=0.0)[:, None]
    d_entropy = tl.load(starts + 3 * E + 1, mask=counted, other=0.0)[:, None]
    lse = _log_sum(logits, inside)[:, None]
    d_logits = tl.where(inside & (d_squares != 0.0), 2.0 * d_squares * lse * tl.exp(logits - lse), 0.0)
    q, log_q, total = _normalised(tl.where(inside, probs, 0.0))
    # a q below the clamp passes no gradient through its logarithm
    slope = log_q + tl.where(q < _TINY, 0.0, 1.0)
    through = d_entropy * (slope - tl.sum(q * slope, 1)[:, None]) / total
    d_probs -= tl.where(inside & (d_entropy != 0.0), through, 0.0)
    return d_gates, d_probs, d_logits


@triton.jit
def _routing_planes_kernel(
    logits_ptr, probs_ptr, gates_ptr, indices_ptr, mask_ptr, planes_ptr,
    T, E, top_k, stride_logits, stride_probs, stride_gates, stride_indices,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """The planes of a block of rows."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, PAD_E)
    counted = counted_rows(mask_ptr, rows, T, MASK)
    inside = counted[:, None] & (cols < E)[None, :]
    choices = tl.zeros((BLOCK_T, PAD_E), tl.float32)
    for slot in range(top_k):
        pick = tl.load(indices_ptr + rows * stride_indices + slot, mask=counted, other=-1)
        choices += tl.where(cols[None, :] == pick[:, None], 1.0, 0.0)
    gates = tl.load(gates_ptr + rows[:, None] * stride_gates + cols[None, :], mask=inside, other=0.0)
    probs = tl.load(probs_ptr + rows[:, None] * stride_probs + cols[None, :], mask=inside, other=0.0)
    logits = tl.load(logits_ptr + rows[:, None] * stride_logits + cols[None, :], mask=inside, other=0.0)
    store_planes(planes_ptr, 3 * E + 3, block, counted, logits, probs, gates, choices, T, E, BLOCK_T, PAD_E)


@triton.jit
def _routing_planes_bwd_kernel(
    dplanes_ptr, logits_ptr, probs_ptr, mask_ptr, dlogits_ptr, dprobs_ptr, dgates_ptr,
    T, E, stride_planes, stride_logits, stride_probs,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """Gradients of logits, probabilities and gates, zero in rows that do not count."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, PAD_E)
    counted = counted_rows(mask_ptr, rows, T, MASK)
    inside = counted[:, None] & (cols < E)[None, :]
    probs = tl.load(probs_ptr + rows[:, None] * stride_probs + cols[None, :], mask=inside, other=0.0)
    logits = tl.load(logits_ptr + rows[:, None] * stride_logits + cols[None, :], mask=inside, other=0.0)
    d_gates, d_probs, d_logits = plane_slopes(
        dplanes_ptr, stride_planes, rows, counted, logits, probs, E, PAD_E
    )  # fmt: skip
    places, written = rows[:, None] * E + cols[None, :], (rows < T)[:, None] & (cols < E)[None, :]
    tl.store(dlogits_ptr + places, d_logits, mask=written)
    tl.store(dprobs_ptr + places, d_probs, mask=written)
    tl.store(dgates_ptr + places, d_gates, mask=written)


# -- launches ---------------------------------------------------------------------------------------------------------


def plane_tile(entries: int, pad: int) -> tuple[int, int]:
    """Rows, whole planes of them, and warps of a program that holds about so many entries of rows of length `pad`."""
    rows = max(PLANE_ROWS, entries // pad)
    return rows, min(max(4, rows * pad // 1024), 16)


def reason_against(*tables: Tensor) -> str | None:
    """Why Triton cannot take these tables, None where it can."""
    foreign = next((table.dtype for table in tables if table.dtype != torch.float32), None)
    if foreign is not None:
        return f"triton computes statistics in float32, got {foreign}"
    experts = tables[0].shape[1]
    return f"triton routes to at most {MOST_EXPERTS} experts, got {experts}" if experts > MOST_EXPERTS else None


@routing_planes_op.provider(
    "triton", supports=lambda logits, probs, gates, *_rest: reason_against(logits, probs, gates)
)
def routing_planes_triton(logits, probs, gates, indices, token_mask):
    """All planes in one launch."""
    tables = [dense_rows(table) for table in (logits, probs, gates, indices)]
    planes, (tokens, experts) = fake_planes(gates), gates.shape
    pad = power_of_two(experts, 1)
    rows, warps = plane_tile(ENTRIES, pad)
    launch(
        _routing_planes_kernel, (ceil_div(tokens, rows),), *tables,
        gates if token_mask is None else mask_bytes(token_mask), planes,
        tokens, experts, indices.shape[1], *(table.stride(0) for table in tables),
        MASK=token_mask is not None, BLOCK_T=rows, PAD_E=pad, warps=warps,
    )  # fmt: skip
    return planes


@routing_planes_backward_op.provider(
    "triton", supports=lambda d_planes, logits, probs, *_rest: reason_against(logits, probs, d_planes)
)
def routing_planes_backward_triton(d_planes, logits, probs, token_mask):
    """All gradients in one launch."""
    grads, (tokens, experts) = _fake_backward(d_planes, logits, probs, token_mask), probs.shape
    tables = [dense_rows(table) for table in (d_planes, logits, probs)]
    pad = power_of_two(experts, 1)
    rows = max(1, ENTRIES // pad)
    launch(
        _routing_planes_bwd_kernel, (ceil_div(tokens, rows),), *tables,
        probs if token_mask is None else mask_bytes(token_mask), *grads,
        tokens, experts, *(table.stride(0) for table in tables),
        MASK=token_mask is not None, BLOCK_T=rows, PAD_E=pad, warps=4,
    )  # fmt: skip
    return grads
