"""`masked_adamw_` in CUDA C++: one launch over all tensors of a dtype; masked-out numbers are never loaded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...cuda_tables import CHUNK, DTYPE_CODE, entry, tables
from ...layouts import laid_like, laid_masks, lie_alike
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


def _number(value: Tensor) -> tuple[Tensor | None, float]:
    """A number on the device stays there; one on the host is passed by value."""
    if value.device.type == "cpu":
        return None, float(value)
    return value.to(torch.float64), 0.0


@masked_adamw_op.provider("cuda", supports=_supports)
def masked_adamw_cuda(
    params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, beta1, beta2, eps, weight_decay
):  # fmt: skip
    # held until the launch is queued: a copy must not be freed before
    grads, masks = laid_like(params, grads), laid_masks(params, masks, kinds)
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, ...]]] = {}
    for p, g, m, v, mask, kind, active in zip(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, strict=True):
        pointers = (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr())
        by_dtype.setdefault((p.dtype, m.dtype), []).append(entry(p, pointers, mask, kind, active))
    numbers = [_number(value) for value in (step, lr, grad_scale)]
    for (dtype, moments), entries in by_dtype.items():
        torch.ops.mllmcl_cuda.masked_adamw(
            *tables(tuple(entries), params[0].device), CHUNK, DTYPE_CODE[dtype], moments == torch.float32,
            *(tensor for tensor, _ in numbers), *(value for _, value in numbers), beta1, beta2, eps, weight_decay,
        )  # fmt: skip
