"""Calls of `orthogonality_loss`."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample

__all__ = ["backward_samples", "bad_samples", "samples"]

# layers, ranks of the current expert, ranks of the old ones, width
SHAPES = ((1, 1, 1, 1), (3, 4, 8, 24), (2, 3, 5, 17), (4, 8, 16, 40), (1, 2, 0, 9), (5, 1, 7, 64))


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Layers in a batch, one of everything, no old rank, odd sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return [Sample(f"{g} layers r {r} Q {q} K {k}", (normal(g, r, k), normal(g, q, k))) for g, r, q, k in SHAPES]


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same layers with a gradient of the loss."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        Sample(sample.name, (torch.tensor(0.7, dtype=wide, device=device), *sample.args))
        for sample in samples(device, dtype, seed)
    ]


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
