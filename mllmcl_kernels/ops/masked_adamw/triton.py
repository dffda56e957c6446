"""`masked_adamw_` in Triton: one launch over all tensors that share their four dtypes.

The mask is read first; what it forbids is neither read nor written. step, lr and grad_scale are read on the device
where they live there, and passed by value where they live on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device_tables import ChunkTable, KeptTables, chunk_table, masked_by_dtypes
from ...triton_tools import CHUNK, chunk_constants, chunk_mask, chunk_of, dtypes_reason, launch, lives_there
from . import masked_adamw_op

__all__: list[str] = []

BLOCK = 1024


@triton.jit
def _masked_adamw_kernel(
    p_like_ptr, g_like_ptr, m_like_ptr, v_like_ptr, rows_ptr, chunks_ptr, step_ptr, lr_ptr, scale_ptr,
    correction1, correction2_root, lr, scale, beta1, beta2, rest1, rest2, eps, weight_decay,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    STEP_THERE: tl.constexpr, LR_THERE: tl.constexpr, SCALE_THERE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW on one chunk of one tensor; the `like` pointers give the dtypes."""
    if STEP_THERE:
        # 1 - beta^step cancels for early steps: in float64
        step = tl.load(step_ptr).to(tl.float64)
        correction1 = (1.0 - tl.exp(step * LOG_BETA1)).to(tl.float32)
        correction2_root = tl.sqrt_rn((1.0 - tl.exp(step * LOG_BETA2)).to(tl.float32))
    if LR_THERE:
        lr = tl.load(lr_ptr).to(tl.float32)
    if SCALE_THERE:
        scale = tl.load(scale_ptr).to(tl.float32)
    decay = 1.0 - lr * weight_decay
    size = lr / correction1

    row_ptr, first, end = chunk_of(rows_ptr, chunks_ptr, WIDTH, CHUNK)
    p_ptr = tl.load(row_ptr).to(p_like_ptr.dtype)
    g_ptr = tl.load(row_ptr + 1).to(g_like_ptr.dtype)
    m_ptr = tl.load(row_ptr + 2).to(m_like_ptr.dtype)
    v_ptr = tl.load(row_ptr + 3).to(v_like_ptr.dtype)
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        keep = chunk_mask(row_ptr, entries, entries < end, WIDTH, WIDE)
        g = tl.load(g_ptr + entries, mask=keep, other=0.0).to(tl.float32) * scale
        m = tl.load(m_ptr + entries, mask=keep, other=0.0).to(tl.float32) * beta1 + g * rest1
        v = tl.load(v_ptr + entries, mask=keep, other=0.0).to(tl.float32) * beta2 + g * g * rest2
        p = tl.load(p_ptr + entries, mask=keep, other=0.0).to(tl.float32)
        denominator = tl.div_rn(tl.sqrt_rn(v), correction2_root) + eps
        p = p * decay - tl.div_rn(size * m, denominator)
        tl.store(p_ptr + entries, p.to(p_like_ptr.dtype.element_ty), mask=keep)
        tl.store(m_ptr + entries, m.to(m_like_ptr.dtype.element_ty), mask=keep)
        tl.store(v_ptr + entries, v.to(v_like_ptr.dtype.element_ty), mask=keep)


def _supports(params, grads, exp_avgs, exp_avg_sqs, *_rest) -> str | None:
    return dtypes_reason(params, grads, exp_avgs, exp_avg_sqs)


def _logarithm(beta: float) -> float:
    # exp(step * this) is 0 for every step, as 0^step is
    return math.log(beta) if beta > 0.0 else -1e4


def _numbers(step, lr, grad_scale, beta1: float, beta2: float, device: torch.device) -> dict:
    """Which of the three, tensors or plain numbers, live on the device, and the values of the others."""
    there = [lives_there(value, device) for value in (step, lr, grad_scale)]
    count = 1.0 if there[0] else float(step)
    return {
        "there": there,
        "values": (
            1.0 - beta1**count,
            math.sqrt(1.0 - beta2**count),
            1.0 if there[1] else float(lr),
            1.0 if there[2] else float(grad_scale),
        ),
    }


def _launch(
    like: Sequence[Tensor], table: ChunkTable, numbers: Sequence[Tensor | float], options: Sequence[float]
) -> None:
    """One launch; `like` are tensors of the dtypes, numbers are step, lr and grad_scale, options the rest."""
    beta1, beta2, eps, weight_decay = options
    known = _numbers(*numbers, beta1, beta2, table.rows.device)
    pointers = [value if there else table.rows for value, there in zip(numbers, known["there"], strict=True)]
    launch(
        _masked_adamw_kernel, (len(table.chunks),), *like, table.rows, table.chunks, *pointers, *known["values"],
        beta1, beta2, 1.0 - beta1, 1.0 - beta2, eps, weight_decay,
        LOG_BETA1=_logarithm(beta1), LOG_BETA2=_logarithm(beta2),
        STEP_THERE=known["there"][0], LR_THERE=known["there"][1], SCALE_THERE=known["there"][2],
        **chunk_constants(table), BLOCK=BLOCK, warps=4,
    )  # fmt: skip


class _Prepared:
    """Further steps over the same parameters and moments."""

    def __init__(self, params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, *_rest) -> None:
        self.tables = KeptTables((params, grads, exp_avgs, exp_avg_sqs), 1, masks, kinds, actives, CHUNK)
        self.staying = params, exp_avgs, exp_avg_sqs

    def __call__(self, read: Sequence[Sequence[Tensor]], step, lr, grad_scale, *options: float) -> bool:
        (grads,), (params, means, squares) = read, self.staying
        if not self.tables.renew(grads):
            return False
        for kept in self.tables.kept:
            first = kept.places[0]
            like = params[first], grads[first], means[first], squares[first]
            _launch(like, kept.table, (step, lr, grad_scale), options)
        return True


@masked_adamw_op.provider("triton", supports=_supports, prepare=_Prepared)
def masked_adamw_triton(
    params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, *options
):  # fmt: skip
    """One launch for each combination of dtypes; no host wait for numbers that live on the device."""
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    for flat, columns in masked_by_dtypes(lists, (0, 2, 3), masks, kinds, actives):
        table = chunk_table(flat, *columns, CHUNK)
        _launch([tensors[0] for tensors in flat], table, (step, lr, grad_scale), options)
