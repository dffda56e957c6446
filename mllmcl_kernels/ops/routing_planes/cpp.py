"""`routing_planes` on the CPU: one pass over the rows in C++, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...layouts import dense_rows, mask_bytes
from . import _fake_backward, fake_planes, routing_planes_backward_op, routing_planes_op

__all__ = ["float_path"]

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "routing_planes(Tensor logits, Tensor probs, Tensor gates, Tensor indices, Tensor? mask, Tensor(a!) planes) -> ()"
)
LIBRARY.define(
    "routing_planes_backward(Tensor d_planes, Tensor logits, Tensor probs, Tensor? mask, "
    "Tensor(a!) d_logits, Tensor(b!) d_probs, Tensor(c!) d_gates) -> ()"
)
OPS = torch.ops.mllmcl_cpu


def float_path(*tables: Tensor) -> str | None:
    """Why these tables are none for C++, None where they are."""
    foreign = next((table.dtype for table in tables if table.dtype != torch.float32), None)
    return None if foreign is None else f"computes in float32, got {foreign}"


@routing_planes_op.provider("cpp", supports=lambda logits, probs, gates, *_rest: float_path(logits, probs, gates))
def routing_planes_cpp(logits, probs, gates, indices, token_mask):
    planes = fake_planes(gates)
    OPS.routing_planes(*map(dense_rows, (logits, probs, gates, indices)), mask_bytes(token_mask), planes)
    return planes


@routing_planes_backward_op.provider(
    "cpp", supports=lambda d_planes, logits, probs, *_rest: float_path(d_planes, logits, probs)
)
def routing_planes_backward_cpp(d_planes, logits, probs, token_mask):
    grads = _fake_backward(d_planes, logits, probs, token_mask)
    OPS.routing_planes_backward(*map(dense_rows, (d_planes, logits, probs)), mask_bytes(token_mask), *grads)
    return grads
