"""Calls of `routing_statistics` that the tests and opcheck draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from ..routing_planes.reference import routing_planes_reference
from ..routing_planes.samples import samples as table_samples

__all__ = ["backward_samples", "bad_samples", "samples"]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The planes of tables: padding, one and no token, no token that counts, many planes, rows without numbers."""
    found = [(sample.name, routing_planes_reference(*sample.args)) for sample in table_samples(device, dtype, seed)]
    name, planes = found[0]
    # columns of a wider table, as those of routers side by side
    apart = torch.cat([planes, planes], 1)[:, planes.shape[1] :]
    return [*(Sample(name, (planes,)) for name, planes in found), Sample(f"{name}, apart", (apart,))]


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side, one after the other with all gradients and with some."""
    from .reference import routing_statistics_reference

    # gradients of importance, balance, z and entropy that came
    kinds = ((1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 0, 1))
    calls = []
    for place, sample in enumerate(samples(device, dtype, seed)):
        _, *outputs, sums = routing_statistics_reference(*sample.args)
        generator = torch.Generator().manual_seed(seed + 1000 + place)
        grads = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(device, sums.dtype) if there else None
            for out, there in zip(outputs, kinds[place % len(kinds)], strict=True)
        ]
        calls.append(Sample(sample.name, (*grads, sums)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the functions that raise; what `routing_planes` checks is checked by the same code."""
    from . import routing_statistics, statistics_of

    def call(planes):
        return lambda: statistics_of(planes)

    table, slots = torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.int32)
    return [
        BadSample("no tensor", call([1.0]), TypeError, r"routing_statistics: planes must be a Tensor, got list"),
        BadSample(
            "integers", call(torch.zeros(2, 9, dtype=torch.int32)), TypeError, r"planes must be of dtype float32"
        ),
        BadSample("width", call(torch.zeros(2, 8)), ValueError, r"planes must be \[P, 3 E \+ 3\], got \[2, 8\]"),
        BadSample("tables", lambda: routing_statistics(table, table[0], table, slots), ValueError, r"probs must be"),
    ]
