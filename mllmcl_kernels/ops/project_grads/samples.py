"""Calls of `project_grads_`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...op import BadSample, Sample

__all__ = ["bad_samples", "basis_of", "samples"]


def basis_of(generator: torch.Generator, width: int, count: int) -> Tensor:
    """`[width, count]` float64 with orthonormal columns."""
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q.contiguous()


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Layers of unequal width, subspaces of unequal size, more than two dimensions, strided, no row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def bases(*shapes: tuple[int, int]) -> list[Tensor]:
        return [basis_of(generator, *shape).to(device, dtype) for shape in shapes]

    return [
        Sample("unequal layers", ([normal(7, 12), normal(5, 33), normal(12)], bases((12, 3), (33, 33), (12, 1)))),
        Sample("strided and deep", ([normal(12, 6).t(), normal(2, 3, 12)], bases((12, 5), (12, 2)))),
        Sample("many rows", ([normal(19, 40), normal(64, 16), normal(3, 8)], bases((40, 24), (16, 16), (8, 6)))),
        Sample("no row", ([normal(0, 4)], bases((4, 2)))),
    ]


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import project_grads_

    grad, basis = torch.ones(4, 2), torch.eye(2)

    def call(grads, bases):
        return lambda: project_grads_(grads, bases)

    return [
        BadSample("no tensor", call([1.0], [None]), TypeError, r"grads\[0\] must be a Tensor, got float"),
        BadSample("count", call([grad], []), ValueError, r"bases must be as many as grads = 1, got 0"),
        BadSample("no basis", call([grad], ["x"]), TypeError, r"bases\[0\] must be a Tensor or None, got str"),
        BadSample("width", call([grad], [torch.eye(3)]), ValueError, r"bases\[0\] must be \[d, k\] with d = \[2\]"),
        BadSample("dtype", call([grad], [basis.int()]), TypeError, r"bases\[0\] must be of dtype"),
        BadSample("device", call([grad], [basis.to("meta")]), ValueError, r"bases\[0\] must be on cpu like grads\[0\]"),
    ]
