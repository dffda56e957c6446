"""`routing_statistics` on the CPU: one pass over the rows in C++, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...layouts import dense_rows
from . import _fake, _fake_backward, routing_statistics_backward_op, routing_statistics_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "routing_statistics(Tensor logits, Tensor probs, Tensor gates, Tensor indices, Tensor? mask, Tensor(a!) load, "
    "Tensor(b!) importance, Tensor(c!) balance, Tensor(d!) z, Tensor(e!) entropy, Tensor(f!) count) -> ()"
)
LIBRARY.define(
    "routing_statistics_backward(Tensor? d_importance, Tensor? d_balance, Tensor? d_z, Tensor? d_entropy, "
    "Tensor logits, Tensor probs, Tensor? mask, Tensor load, Tensor count, "
    "Tensor(a!) d_logits, Tensor(b!) d_probs, Tensor(c!) d_gates) -> ()"
)
OPS = torch.ops.mllmcl_cpu


def _float_path(*tables: Tensor) -> str | None:
    foreign = next((table.dtype for table in tables if table.dtype != torch.float32), None)
    return None if foreign is None else f"computes in float32, got {foreign}"


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


@routing_statistics_op.provider("cpp", supports=lambda logits, probs, gates, *_rest: _float_path(logits, probs, gates))
def routing_statistics_cpp(logits, probs, gates, indices, token_mask):
    outputs = _fake(logits, probs, gates, indices, token_mask)
    tables = map(dense_rows, (logits, probs, gates, indices))
    OPS.routing_statistics(*tables, _bytes(token_mask), *outputs)
    return outputs


@routing_statistics_backward_op.provider(
    "cpp", supports=lambda a, b, c, d, logits, probs, *_rest: _float_path(logits, probs)
)
def routing_statistics_backward_cpp(
    d_importance, d_balance, d_z, d_entropy, logits, probs, token_mask, load, count, needs
):
    grads = _fake_backward(None, None, None, None, logits, probs, None, None, None, needs)
    d_importance = None if d_importance is None else d_importance.contiguous()
    OPS.routing_statistics_backward(
        d_importance,
        d_balance,
        d_z,
        d_entropy,
        dense_rows(logits),
        dense_rows(probs),
        _bytes(token_mask),
        load,
        count,
        *grads,
    )
    return grads
