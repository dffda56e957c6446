"""`masked_adamw_` in C++: one parallel loop over chunks of all tensors; masked-out rows are never touched."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from ...cpu_tables import KeptTable, list_reason, list_table
from . import masked_adamw_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "masked_adamw(Tensor table, Tensor step, Tensor lr, Tensor grad_scale, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()"
)


def _supports(params, grads, exp_avgs, exp_avg_sqs, masks, *_rest) -> str | None:
    written = (params, exp_avgs, exp_avg_sqs)
    pairs = {
        "gradients need the parameter's dtype": (params, grads),
        "both moments need one dtype": (exp_avgs, exp_avg_sqs),
    }
    return list_reason((*written, grads), "parameters and moments", *written, pairs=pairs)


class _Prepared:
    """Further steps over the same parameters and moments."""

    def __init__(self, params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, *_rest) -> None:
        self.lists = KeptTable((params, exp_avgs, exp_avg_sqs), (grads,), masks, kinds, actives)
        self.buffer = bytearray(3 * 8)
        self.numbers = torch.frombuffer(self.buffer, dtype=torch.float64).unbind()

    def __call__(self, read: Sequence[Sequence[Tensor]], *numbers_and_options) -> bool:
        if not self.lists.renew(read):
            return False
        numbers = map(self._number, range(3), numbers_and_options[:3])
        torch.ops.mllmcl_cpu.masked_adamw.default(self.lists.table, *numbers, *numbers_and_options[3:])
        return True

    def _number(self, place: int, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(torch.float64)
        struct.pack_into("d", self.buffer, 8 * place, value)
        return self.numbers[place]


@masked_adamw_op.provider("cpp", supports=_supports, prepare=_Prepared)
def masked_adamw_cpp(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, actives, step, lr, grad_scale, *options):
    numbers = (number.to(torch.float64) for number in (step, lr, grad_scale))
    table, _held = list_table((params, exp_avgs, exp_avg_sqs), (grads,), masks, kinds, actives)
    torch.ops.mllmcl_cpu.masked_adamw(table, *numbers, *options)
