"""`orthogonality_loss` in C++: every old row is read once, for the products and for the gradient."""

from __future__ import annotations

import torch
from torch.library import Library

from . import _fake, orthogonality_loss_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("orthogonality(Tensor[] lora_a, Tensor[] previous_a, Tensor(a!) loss, Tensor(b!) slope) -> ()")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(lora_a, previous_a, _need) -> str | None:
    for tensors in (lora_a, previous_a):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                return f"computes in float32, got {tensor.dtype}"
    return None


@orthogonality_loss_op.provider("cpp", supports=_supports)
def orthogonality_loss_cpp(lora_a, previous_a, need):
    loss, slope = _fake(lora_a, previous_a, need)
    lists = ([tensor.contiguous() for tensor in tensors] for tensors in (lora_a, previous_a))
    torch.ops.mllmcl_cpu.orthogonality(*lists, loss, slope)
    return loss, slope
