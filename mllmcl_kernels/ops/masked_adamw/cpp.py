"""`masked_adamw_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch.library import Library

from . import masked_adamw_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "masked_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor[] masks, "
    "int[] kinds, int[] actives, Tensor step, Tensor lr, Tensor grad_scale, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(params, grads, exp_avgs, exp_avg_sqs, masks, *_rest) -> str | None:
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if p.dtype not in DTYPES or m.dtype not in DTYPES:
            return f"computes in float32, got {p.dtype} and {m.dtype}"
        if g.dtype != p.dtype or v.dtype != m.dtype:
            return "gradients need the parameter's dtype, and both moments one dtype"
        if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            return "parameters and moments have to be contiguous"
    return None


@masked_adamw_op.provider("cpp", supports=_supports)
def masked_adamw_cpp(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, *options):
    numbers = (number.to(torch.float64) for number in (step, lr, grad_scale))
    grads = [grad.contiguous() for grad in grads]
    torch.ops.mllmcl_cpu.masked_adamw(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, *numbers, *options)
