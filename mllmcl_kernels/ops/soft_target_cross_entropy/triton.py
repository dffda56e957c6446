"""`soft_target_cross_entropy` in Triton: logits of a chunk by cuBLAS, then loss and gradient of a row in a program.

The gradient overwrites the logits. A row is read twice, the second time out of L2, and written once.
"""

# C tokens of a chunk, V vocabulary
# logits_CV, factor_C, labels_C, losses_C

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_tools import LOWEST, ROW_BLOCK, dtype_reason, lane_softmax, lane_softmax_step, launch, power_of_two
from ..linear_loss import linear_loss
from . import soft_target_cross_entropy_op
from .reference import token_factors

__all__ = ["soft_target_cross_entropy_triton"]


@triton.jit
def _soft_target_rows_kernel(
    logits_ptr, factor_ptr, labels_ptr, losses_ptr, V, alpha,
    SOFT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of this program's row from the closed form, its gradient over the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    factor = tl.load(factor_ptr + row)
    label = tl.load(labels_ptr + row)
    chosen = tl.load(row_ptr + label).to(tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    mass, rest = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    # a row that does not count is not read
    for start in range(0, tl.where(factor == 0.0, 0, V), BLOCK_V):
        cols = start + lanes
        z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        top, mass = lane_softmax_step(top, mass, z)
        if SOFT:
            rest += tl.where((cols < V) & (cols != label), z, 0.0)
    highest, total = lane_softmax(top, mass)
    loss = tl.log(total) - (1.0 - alpha) * (chosen - highest)
    if SOFT:
        loss -= alpha * (tl.sum(rest, 0) / (V - 1) - highest)
    tl.store(losses_ptr + row, tl.where(factor == 0.0, 0.0, loss))
    if GRADIENT:
        hit = tl.exp(chosen - highest) / total - (1.0 - alpha)
        other = alpha / (V - 1)
        for start in range(0, V, BLOCK_V):
            cols = start + lanes
            z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            unit = tl.where(cols == label, hit, tl.exp(z - highest) / total - other)
            gradient = tl.where(factor == 0.0, 0.0, factor * unit)
            tl.store(row_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < V)


def _rows(logits: Tensor, factor: Tensor, labels: Tensor, alpha: float, gradient: bool) -> Tensor:
    losses = torch.empty_like(factor)
    vocabulary = logits.shape[1]
    launch(
        _soft_target_rows_kernel, (len(losses),), logits, factor, labels, losses, vocabulary, alpha,
        SOFT=alpha > 0.0, GRADIENT=gradient, BLOCK_V=min(ROW_BLOCK, power_of_two(vocabulary)), warps=8,
    )  # fmt: skip
    return losses


def _supports(hidden, head_weight, head_bias, *_rest) -> str | None:
    return dtype_reason(hidden, head_weight, head_bias)


@soft_target_cross_entropy_op.provider("triton", supports=_supports)
def soft_target_cross_entropy_triton(
    hidden, head_weight, head_bias, weights, labels, alpha, ignore_index, chunk, needs
):  # fmt: skip
    counted, factor, safe = token_factors(labels, weights, ignore_index, head_weight.shape[0], torch.float32)
    rows = functools.partial(_rows, alpha=alpha)
    return linear_loss(rows, hidden, head_weight, head_bias, counted, factor, (safe,), chunk, needs)
