"""`masked_adamw_` in CUDA C++: one launch over all tensors of a dtype; masked-out numbers are never loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from ...cuda_launch import CHUNK, DTYPE_CODE
from ...device_tables import ChunkTable, KeptTables, chunk_table, masked_by_dtypes
from ...layouts import lie_alike
from . import masked_adamw_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cuda", "FRAGMENT")
LIBRARY.define(
    "masked_adamw(Tensor entries, Tensor chunks, int chunk_size, int param_dtype, bool wide_moments, Tensor? step, "
    "Tensor? lr, Tensor? scale, float step_value, float lr_value, float scale_value, float beta1, float beta2, "
    "float eps, float weight_decay) -> ()"
)


def _supports(params, grads, exp_avgs, exp_avg_sqs, masks, *_rest) -> str | None:
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if p.dtype not in DTYPE_CODE or g.dtype != p.dtype:
            return f"takes float32, bfloat16 and float16 gradients of the parameter's dtype, got {p.dtype}, {g.dtype}"
        if m.dtype not in (p.dtype, torch.float32) or v.dtype != m.dtype:
            return f"takes moments in float32 or the parameter's dtype, got {m.dtype}, {v.dtype}"
    alike = lie_alike(params, exp_avgs, exp_avg_sqs)
    return None if alike else "parameters and moments must lie in memory alike and without gaps"


def _number(value: Tensor | float) -> tuple[Tensor | None, float]:
    """A number on the device stays there; one on the host is passed by value."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return None, float(value)
    return value.to(torch.float64), 0.0


def _launch(table: ChunkTable, param: Tensor, moment: Tensor, numbers: Sequence, options: Sequence[float]) -> None:
    """One launch over tensors of these dtypes; numbers are step, lr and grad_scale, options the rest."""
    there, values = zip(*map(_number, numbers), strict=True)
    torch.ops.mllmcl_cuda.masked_adamw(
        table.rows, table.chunks, CHUNK, DTYPE_CODE[param.dtype], moment.dtype == torch.float32, *there, *values,
        *options,
    )  # fmt: skip


class _Prepared:
    """Further steps over the same parameters and moments."""

    def __init__(self, params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, *_rest) -> None:
        self.tables = KeptTables((params, grads, exp_avgs, exp_avg_sqs), 1, masks, kinds, actives, CHUNK)
        self.params, self.exp_avgs = params, exp_avgs

    def __call__(self, read: Sequence[Sequence[Tensor]], step, lr, grad_scale, *options: float) -> bool:
        if not self.tables.renew(*read):
            return False
        for kept in self.tables.kept:
            first = kept.places[0]
            _launch(kept.table, self.params[first], self.exp_avgs[first], (step, lr, grad_scale), options)
        return True


@masked_adamw_op.provider("cuda", supports=_supports, prepare=_Prepared)
def masked_adamw_cuda(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, *options):
    # what is laid anew is held until the launch is queued: a copy must not be freed before
    for flat, columns in masked_by_dtypes((params, grads, exp_avgs, exp_avg_sqs), (), masks, kinds, actives):
        table = chunk_table(flat, *columns, CHUNK)
        _launch(table, flat[0][0], flat[2][0], (step, lr, grad_scale), options)
