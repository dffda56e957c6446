"""Calls of `importance_update_`."""

from __future__ import annotations

import torch

from ...masks import Mask, flatten_masks
from ...op import BadSample, Sample
from ..mask_grads.samples import masked_tensors

__all__ = ["bad_samples", "samples"]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Both powers and both ways to join with masks of every kind, with and without owners, wide importances."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = (
        ("mean of squares", 2, False, True, dtype),
        ("mean of magnitudes, no masks, wide", 1, False, False, wide),
        ("larger magnitudes with owners", 1, True, True, dtype),
        ("larger squares with owners, no masks, wide", 2, True, False, wide),
        ("larger squares", 2, True, True, dtype),
    )
    for name, power, larger, masked, kept in cases:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors, masks = masked_tensors(generator)
        grads = [tensor.to(device, dtype) for tensor in tensors]
        # half or twice the new value: no rounding decides which one is larger
        factors = [torch.where(torch.rand(t.shape, generator=generator) < 0.5, 0.5, 2.0) for t in tensors]
        importances = [
            torch.empty_like(grad, dtype=kept).copy_(grad.double().abs() ** power * factor.to(device))
            for grad, factor in zip(grads, factors, strict=True)
        ]
        owners = [torch.full_like(grad, 200, dtype=torch.uint8) for grad in grads]
        chosen = [mask.to(device) if mask is not None and masked else None for mask in masks]
        flat = flatten_masks("samples", importances, chosen)
        count = torch.tensor(1.0 if larger else 4.0, dtype=torch.float64)
        lists = (importances, grads, owners if "owners" in name else [])
        calls.append(Sample(name, (*lists, *flat, power, larger, count, 7)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import importance_update_

    def call(grad=None, **options):
        grads = [torch.ones(4, 2) if grad is None else grad]
        return lambda: importance_update_([torch.zeros(4, 2)], grads, **options)

    owners = [torch.zeros(4, 2, dtype=torch.uint8)]
    return [
        BadSample(
            "shape",
            call(torch.ones(2, 4), count=1),
            ValueError,
            r"grads\[0\] must be of importances\[0\]'s shape \[4, 2\], got \[2, 4\]",
        ),
        BadSample("power", call(power=3, count=1), ValueError, r"power must be 1 or 2, got 3"),
        BadSample("reduce", call(reduce="sum", count=1), ValueError, r"reduce must be \"mean\" or \"max\", got 'sum'"),
        BadSample(
            "idle count", call(reduce="max", count=1), ValueError, r"count must be None with reduce=\"max\", got 1"
        ),
        BadSample("count zero", call(count=0), ValueError, r"count must be at least 1, got 0"),
        BadSample("idle owners", call(count=1, owners=owners), ValueError, r"owners must be None with reduce=\"mean\""),
        BadSample("no task", call(reduce="max", owners=owners), ValueError, r"task must be given with owners"),
        BadSample("task", call(reduce="max", owners=owners, task=256), ValueError, r"task must be an id in 0\.\.255"),
        BadSample(
            "owner dtype",
            call(reduce="max", owners=[torch.zeros(4, 2)], task=1),
            TypeError,
            r"owners\[0\] must be of dtype uint8, got torch\.float32",
        ),
        BadSample(
            "owner shape",
            call(reduce="max", owners=[owners[0][:2]], task=1),
            ValueError,
            r"owners\[0\] must be of the importance's shape \[4, 2\], got \[2, 2\]",
        ),
        BadSample(
            "mask shape",
            call(count=1, masks=[Mask.rows(torch.ones(3, dtype=torch.bool))]),
            ValueError,
            r"masks\[0\] must be \[4\]",
        ),
    ]
