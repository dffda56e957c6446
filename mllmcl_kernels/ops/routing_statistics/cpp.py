"""`routing_statistics` on the CPU: one loop over the planes in C++, and one over a plane's gradient."""

from __future__ import annotations

import torch
from torch.library import Library

from ...layouts import dense_rows
from ..routing_planes.cpp import float_path
from . import _fake, routing_statistics_backward_op, routing_statistics_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "routing_statistics(Tensor planes, Tensor(a!) load, Tensor(b!) importance, Tensor(c!) balance, Tensor(d!) z, "
    "Tensor(e!) entropy, Tensor(f!) sums) -> ()"
)
LIBRARY.define(
    "routing_statistics_backward(Tensor? d_importance, Tensor? d_balance, Tensor? d_z, Tensor? d_entropy, "
    "Tensor sums, Tensor(a!) d_plane) -> ()"
)
OPS = torch.ops.mllmcl_cpu


@routing_statistics_op.provider("cpp", supports=float_path)
def routing_statistics_cpp(planes):
    outputs = _fake(planes)
    OPS.routing_statistics(dense_rows(planes), *outputs)
    return outputs


@routing_statistics_backward_op.provider("cpp", supports=lambda *args: float_path(args[4]))
def routing_statistics_backward_cpp(d_importance, d_balance, d_z, d_entropy, sums):
    d_plane = torch.empty_like(sums)
    d_importance = None if d_importance is None else d_importance.contiguous()
    OPS.routing_statistics_backward(d_importance, d_balance, d_z, d_entropy, sums, d_plane)
    return d_plane
