"""`distillation_loss` in Triton: logits of a chunk by cuBLAS, then loss and gradient of a row in a program.

The gradient overwrites the logits. Student and teacher are read twice, the second time out of L2.
"""

# C tokens of a chunk, V vocabulary, K entries of a cached teacher
# logits_CV, factor_C, teacher_CV or teacher_CK with indices_CK, losses_C

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_tools import LOWEST, ROW_BLOCK, dtype_reason, lane_softmax, lane_softmax_step, launch, power_of_two
from ..linear_loss import linear_loss
from . import distillation_loss_op
from .reference import teacher_factors

__all__ = ["distillation_loss_triton"]


@triton.jit
def _divergence(p, log_p, log_q):
    """p (log p - log q), nothing where p is nothing."""
    return tl.where(p == 0.0, 0.0, p * (log_p - log_q))


@triton.jit
def _full_rows_kernel(
    logits_ptr, factor_ptr, teacher_ptr, losses_ptr, V, temperature, stride_teacher,
    GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of this program's row against all logits of the teacher, its gradient over the student's."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr, u_ptr = logits_ptr + row * V, teacher_ptr + row * stride_teacher
    factor = tl.load(factor_ptr + row)
    lanes = tl.arange(0, BLOCK_V)
    top_z, top_u = tl.full((BLOCK_V,), LOWEST, tl.float32), tl.full((BLOCK_V,), LOWEST, tl.float32)
    mass_z, mass_u = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    # a row that does not count is not read
    end = tl.where(factor == 0.0, 0, V)
    for start in range(0, end, BLOCK_V):
        cols = start + lanes
        z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
        u = tl.load(u_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
        top_z, mass_z = lane_softmax_step(top_z, mass_z, z)
        top_u, mass_u = lane_softmax_step(top_u, mass_u, u)
    highest_z, total_z = lane_softmax(top_z, mass_z)
    highest_u, total_u = lane_softmax(top_u, mass_u)
    terms = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, end, BLOCK_V):
        cols = start + lanes
        z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
        u = tl.load(u_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
        z, u = z - highest_z, u - highest_u
        q, p = tl.exp(z) / total_z, tl.exp(u) / total_u
        terms += _divergence(p, u - tl.log(total_u), z - tl.log(total_z))
        if GRADIENT:
            gradient = temperature * factor * (q - p)
            tl.store(z_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < V)
    if GRADIENT:
        for start in range(end, V, BLOCK_V):
            cols = start + lanes
            tl.store(z_ptr + cols, tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty), mask=cols < V)
    tl.store(losses_ptr + row, temperature * temperature * tl.sum(terms, 0))


@triton.jit
def _top_rows_kernel(
    logits_ptr, factor_ptr, chosen_ptr, teacher_ptr, unit_ptr, losses_ptr, V, K, temperature,
    WHOLE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr, PAD_K: tl.constexpr,
):  # fmt: skip
    """Loss of this program's row against K log-probabilities and the rest; the gradient of the rest over the logits,
    that of the K chosen into unit. The K logits are in `chosen`, their places among the logits hold minus infinity.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    factor = tl.load(factor_ptr + row)
    slots = tl.arange(0, PAD_K)
    there = slots < K
    chosen = tl.load(chosen_ptr + row * K + slots, mask=there, other=float("-inf")) / temperature
    log_p = tl.load(teacher_ptr + row * K + slots, mask=there, other=float("-inf")).to(tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    top, mass = tl.full((BLOCK_V,), LOWEST, tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    # a row that does not count is not read
    for start in range(0, tl.where(factor == 0.0, 0, V), BLOCK_V):
        cols = start + lanes
        z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
        top, mass = lane_softmax_step(top, mass, z)
    highest, total = lane_softmax(top, mass)
    rest = highest + tl.log(total)
    # the student's distribution over the chosen and the rest
    most = tl.maximum(tl.max(chosen, 0), rest)
    norm = tl.log(tl.sum(tl.exp(chosen - most), 0) + tl.exp(rest - most))
    log_q, log_q_rest = chosen - most - norm, rest - most - norm
    p = tl.exp(log_p)
    left = 1.0 - tl.sum(p, 0)
    # written so that NaN stays
    p_rest = tl.where(left < 0.0, 0.0, left)
    if WHOLE:
        p_rest = 0.0 * p_rest
    loss = tl.sum(_divergence(p, log_p, log_q), 0) + _divergence(p_rest, tl.log(p_rest), log_q_rest)
    tl.store(losses_ptr + row, tl.where(factor == 0.0, 0.0, temperature * temperature * loss))
    if GRADIENT:
        scale = temperature * factor
        unit = tl.where(factor == 0.0, 0.0, scale * (tl.exp(log_q) - p))
        tl.store(unit_ptr + row * K + slots, unit, mask=there)
        share = scale * (tl.exp(log_q_rest) - p_rest)
        for start in range(0, V, BLOCK_V):
            cols = start + lanes
            z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) / temperature
            gradient = tl.where(factor == 0.0, 0.0, share * (tl.exp(z - highest) / total))
            tl.store(row_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < V)


def _full_rows(logits: Tensor, factor: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Tensor:
    losses = torch.empty_like(factor)
    vocabulary = logits.shape[1]
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    launch(
        _full_rows_kernel, (len(losses),), logits, factor, teacher, losses, vocabulary, temperature, teacher.stride(0),
        GRADIENT=gradient, BLOCK_V=min(ROW_BLOCK, power_of_two(vocabulary)), warps=8,
    )  # fmt: skip
    return losses


def _top_rows(
    logits: Tensor, factor: Tensor, teacher: Tensor, indices: Tensor, temperature: float, gradient: bool
) -> Tensor:
    """Gather and scatter of the few entries by torch: no program reads what another thread of it has just written."""
    losses = torch.empty_like(factor)
    vocabulary, entries = logits.shape[1], indices.shape[1]
    chosen = logits.gather(1, indices).float()
    unit = torch.empty_like(chosen)
    logits.scatter_(1, indices, float("-inf"))
    launch(
        _top_rows_kernel, (len(losses),), logits, factor, chosen, teacher.contiguous(), unit, losses,
        vocabulary, entries, temperature, WHOLE=entries == vocabulary, GRADIENT=gradient,
        BLOCK_V=min(ROW_BLOCK, power_of_two(vocabulary)), PAD_K=power_of_two(entries), warps=8,
    )  # fmt: skip
    if gradient:
        logits.scatter_(1, indices, unit.to(logits.dtype))
    return losses


def _supports(hidden, head_weight, head_bias, weights, teacher, *_rest) -> str | None:
    return dtype_reason(hidden, head_weight, head_bias) or dtype_reason(teacher)


@distillation_loss_op.provider("triton", supports=_supports)
def distillation_loss_triton(
    hidden, head_weight, head_bias, weights, teacher, indices, counted, temperature, chunk, needs
):  # fmt: skip
    counted, factor, safe = teacher_factors(hidden, weights, teacher, indices, counted, head_weight.shape[0])
    rows = functools.partial(_full_rows if safe is None else _top_rows, temperature=temperature)
    given = (teacher,) if safe is None else (teacher, safe)
    return linear_loss(rows, hidden, head_weight, head_bias, counted, factor, given, chunk, needs)
