"""Calls of `orthogonality_loss`."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample

__all__ = ["bad_samples", "samples"]

# of each layer: ranks of the current expert, ranks of the old ones, width
CALLS = (
    ((1, 1, 1),),
    ((4, 8, 24), (4, 8, 24), (4, 8, 16)),
    ((3, 5, 17), (2, 7, 9)),
    ((8, 16, 40), (5, 0, 8), (16, 3, 33)),
    ((2, 0, 9),),
    ((1, 7, 64), (9, 2, 16)),
    ((16, 32, 48), (32, 16, 64)),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """One of everything, layers alike and unlike, no old rank, odd sizes, with and without the gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    found = []
    for place, layers in enumerate(CALLS):
        lists = [normal(r, k) for r, _, k in layers], [normal(q, k) for _, q, k in layers]
        name = " and ".join(f"r {r} Q {q} K {k}" for r, q, k in layers)
        found.append(Sample(name, (*lists, place % 3 != 2)))
    return found


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import orthogonality_loss

    a = torch.ones(2, 4)

    def call(new, old):
        return lambda: orthogonality_loss(new, old)

    return [
        BadSample("nothing", call([], []), ValueError, r"lora_a must be at least one tensor, got 0"),
        BadSample("count", call([a], [a, a]), ValueError, r"previous_a must be as many as lora_a = 1, got 2"),
        BadSample("width", call(a, torch.ones(2, 3)), ValueError, r"previous_a\[0\] must be \[Q, d_in\] with d_in = 4"),
        BadSample("vector", call(torch.ones(4), a), ValueError, r"lora_a\[0\] must be a matrix \[ranks, d_in\]"),
        BadSample("integer", call(a, a.int()), TypeError, r"previous_a\[0\] must be of dtype"),
    ]
