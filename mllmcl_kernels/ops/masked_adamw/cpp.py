"""`masked_adamw_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...checks import DTYPE, differ, list_reason
from ...cpu_tables import list_table
from . import masked_adamw_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "masked_adamw(Tensor table, Tensor step, Tensor lr, Tensor grad_scale, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()"
)


def _supports(params, grads, exp_avgs, exp_avg_sqs, masks, *_rest) -> str | None:
    written = (params, exp_avgs, exp_avg_sqs)
    reason = list_reason((*written, grads), "parameters and moments", *written)
    if reason is None and differ(DTYPE, params, grads):
        reason = "gradients need the parameter's dtype"
    if reason is None and differ(DTYPE, exp_avgs, exp_avg_sqs):
        reason = "both moments need one dtype"
    return reason


@masked_adamw_op.provider("cpp", supports=_supports)
def masked_adamw_cpp(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, *options):
    numbers = (number.to(torch.float64) for number in (step, lr, grad_scale))
    grads = list(map(Tensor.contiguous, grads))
    table = list_table((params, exp_avgs, exp_avg_sqs, grads), masks, kinds, actives)
    torch.ops.mllmcl_cpu.masked_adamw(table, *numbers, *options)
