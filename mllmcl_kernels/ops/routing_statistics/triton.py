"""`routing_statistics` in Triton: the sum of the planes and what follows from it in one launch, one backward."""

# P planes, E experts (PAD_E the power of two above)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...layouts import dense_rows
from ...triton_tools import ceil_div, launch, power_of_two
from ..routing_planes.triton import MOST_EXPERTS
from . import _fake, routing_statistics_backward_op, routing_statistics_op

__all__: list[str] = []


@dataclass(frozen=True)
class StatisticsTiles:
    """Sizes of the launch, for every number of experts."""

    #: entries [planes, PAD_E] that the program holds of each part of the planes
    entries: int = 2048
    #: times that it does so at most; more planes are added up before
    steps: int = 8


TILES = StatisticsTiles()


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _routing_statistics_kernel(
    planes_ptr, load_ptr, importance_ptr, balance_ptr, z_ptr, entropy_ptr, sums_ptr, P, E, steps, stride,
    BLOCK_P: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """The sums of all planes, and the statistics."""
    cols = tl.arange(0, PAD_E)
    load = tl.zeros((PAD_E,), tl.float32)
    importance = tl.zeros((PAD_E,), tl.float32)
    mass = tl.zeros((PAD_E,), tl.float32)
    squares = tl.zeros((BLOCK_P,), tl.float32)
    entropies = tl.zeros((BLOCK_P,), tl.float32)
    tokens = tl.zeros((BLOCK_P,), tl.float32)
    for step in range(steps):
        places = (step * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
        plane_ptrs = planes_ptr + places * stride
        inside = (places < P)[:, None] & (cols < E)[None, :]
        load += tl.sum(tl.load(plane_ptrs[:, None] + cols[None, :], mask=inside, other=0.0), 0)
        importance += tl.sum(tl.load(plane_ptrs[:, None] + (E + cols)[None, :], mask=inside, other=0.0), 0)
        mass += tl.sum(tl.load(plane_ptrs[:, None] + (2 * E + cols)[None, :], mask=inside, other=0.0), 0)
        squares += tl.load(plane_ptrs + 3 * E, mask=places < P, other=0.0)
        entropies += tl.load(plane_ptrs + 3 * E + 1, mask=places < P, other=0.0)
        tokens += tl.load(plane_ptrs + 3 * E + 2, mask=places < P, other=0.0)
    square, entropy, token = tl.sum(squares, 0), tl.sum(entropies, 0), tl.sum(tokens, 0)
    count = tl.maximum(token, 1.0)
    share = load / tl.maximum(tl.sum(load, 0), 1.0)
    tl.store(load_ptr + cols, load, mask=cols < E)
    tl.store(importance_ptr + cols, importance, mask=cols < E)
    tl.store(balance_ptr, E * tl.sum(share * mass, 0) / count)
    tl.store(z_ptr, square / count)
    tl.store(entropy_ptr, entropy / count)
    tl.store(sums_ptr + cols, load, mask=cols < E)
    tl.store(sums_ptr + E + cols, importance, mask=cols < E)
    tl.store(sums_ptr + 2 * E + cols, mass, mask=cols < E)
    tl.store(sums_ptr + 3 * E, square)
    tl.store(sums_ptr + 3 * E + 1, entropy)
    tl.store(sums_ptr + 3 * E + 2, token)


@triton.jit
def _routing_statistics_bwd_kernel(
    dimportance_ptr, dbalance_ptr, dz_ptr, dentropy_ptr, sums_ptr, dplane_ptr, E,
    IMPORTANCE: tl.constexpr, BALANCE: tl.constexpr, Z: tl.constexpr, ENTROPY: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """The gradient of every plane."""
    cols = tl.arange(0, PAD_E)
    load = tl.load(sums_ptr + cols, mask=cols < E, other=0.0)
    mass = tl.load(sums_ptr + 2 * E + cols, mask=cols < E, other=0.0)
    token, slot = tl.load(sums_ptr + 3 * E + 2), tl.sum(load, 0)
    count, slots, even = tl.maximum(token, 1.0), tl.maximum(slot, 1.0), tl.sum(load * mass, 0)
    d_importance = tl.zeros((PAD_E,), tl.float32)
    if IMPORTANCE:
        d_importance = tl.load(dimportance_ptr + cols, mask=cols < E, other=0.0)
    lost, slope, d_square, d_entropy = 0.0 * count, 0.0 * count, 0.0 * count, 0.0 * count
    if BALANCE:
        slope = tl.load(dbalance_ptr) * E / (slots * count)
        lost += slope * even
    if Z:
        d_square = tl.load(dz_ptr) / count
        lost += d_square * tl.load(sums_ptr + 3 * E)
    if ENTROPY:
        d_entropy = tl.load(dentropy_ptr) / count
        lost += d_entropy * tl.load(sums_ptr + 3 * E + 1)
    d_load = slope * (mass - tl.where(slot < 1.0, 0.0, even / slots))
    tl.store(dplane_ptr + cols, d_load, mask=cols < E)
    tl.store(dplane_ptr + E + cols, d_importance, mask=cols < E)
    tl.store(dplane_ptr + 2 * E + cols, slope * load, mask=cols < E)
    tl.store(dplane_ptr + 3 * E, d_square)
    tl.store(dplane_ptr + 3 * E + 1, d_entropy)
    tl.store(dplane_ptr + 3 * E + 2, tl.where(token < 1.0, 0.0, -lost / count))


# -- launches ---------------------------------------------------------------------------------------------------------


def _reason(sums) -> str | None:
    """Why Triton cannot take planes, or their sum, None where it can."""
    if sums.dtype != torch.float32:
        return f"triton computes statistics in float32, got {sums.dtype}"
    experts = (sums.shape[-1] - 3) // 3
    return f"triton routes to at most {MOST_EXPERTS} experts, got {experts}" if experts > MOST_EXPERTS else None


@routing_statistics_op.provider("triton", supports=_reason)
def routing_statistics_triton(planes):
    """One program adds up all planes in a fixed order; many are added up by torch before."""
    outputs, experts = _fake(planes), (planes.shape[1] - 3) // 3
    pad = power_of_two(experts, 1)
    block = max(1, TILES.entries // pad)
    if planes.shape[0] > TILES.steps * block:
        planes = planes.sum(0, keepdim=True)
    planes, count = dense_rows(planes), planes.shape[0]
    block = min(block, power_of_two(count, 1))
    launch(
        _routing_statistics_kernel, (1,), planes, *outputs, count, experts, ceil_div(count, block), planes.stride(0),
        BLOCK_P=block, PAD_E=pad, warps=4,
    )  # fmt: skip
    return outputs


@routing_statistics_backward_op.provider("triton", supports=lambda *args: _reason(args[4]))
def routing_statistics_backward_triton(d_importance, d_balance, d_z, d_entropy, sums):
    """The gradient of every plane in one launch."""
    d_plane, experts = torch.empty_like(sums), (sums.shape[0] - 3) // 3
    came = [None if grad is None else grad.contiguous() for grad in (d_importance, d_balance, d_z, d_entropy)]
    flags = dict(zip(("IMPORTANCE", "BALANCE", "Z", "ENTROPY"), (grad is not None for grad in came), strict=True))
    launch(
        _routing_statistics_bwd_kernel, (1,), *(sums if grad is None else grad for grad in came), sums, d_plane,
        experts, **flags, PAD_E=power_of_two(experts, 1), warps=4,
    )  # fmt: skip
    return d_plane
