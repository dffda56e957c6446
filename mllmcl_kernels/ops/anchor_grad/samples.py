"""Calls of `anchor_grad_`."""

from __future__ import annotations

import torch

from ...masks import Mask, flatten_masks
from ...op import BadSample, Sample
from ..mask_grads.samples import masked_tensors

__all__ = ["bad_samples", "samples"]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Masks of every kind, no masks, importances in bfloat16 beside wider tensors."""
    calls = []
    half = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for name, masked, kept in (("every kind", True, dtype), ("no masks", False, dtype), ("half", True, half)):
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors, masks = masked_tensors(generator)

        def draw(to: torch.dtype, tensors=tensors, generator=generator) -> list[torch.Tensor]:
            drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors)
            return [value.to(device, to) for value in drawn]

        grads = [tensor.to(device, dtype) for tensor in tensors]
        lists = (grads, draw(dtype), draw(dtype), [value.abs() for value in draw(kept)])
        chosen = [mask.to(device) if mask is not None and masked else None for mask in masks]
        flat = flatten_masks("samples", grads, chosen)
        calls.append(Sample(name, (*lists, *flat, torch.tensor(0.75, dtype=torch.float64))))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import anchor_grad_

    def call(count=1, anchor=None, importance=None, strength=1.0, **options):
        grads, params = ([torch.ones(4, 2) for _ in range(count)] for _ in range(2))
        anchors = [torch.ones(4, 2) if anchor is None else anchor]
        importances = [torch.ones(4, 2) if importance is None else importance]
        return lambda: anchor_grad_(grads, params, anchors, importances, strength, **options)

    return [
        BadSample("counts", call(count=2), ValueError, r"anchors must be as many as grads = 2, got 1"),
        BadSample(
            "shape",
            call(anchor=torch.ones(2, 4)),
            ValueError,
            r"anchors\[0\] must be of grads\[0\]'s shape \[4, 2\], got \[2, 4\]",
        ),
        BadSample("no tensor", call(importance=1.0), TypeError, r"importances\[0\] must be a Tensor, got float"),
        BadSample(
            "integers",
            call(importance=torch.ones(4, 2, dtype=torch.int64)),
            TypeError,
            r"importances\[0\] must be of dtype float32",
        ),
        BadSample(
            "two strengths",
            call(strength=torch.ones(2)),
            ValueError,
            r"strength must be a number or a tensor with one element, got \[2\]",
        ),
        BadSample("no strength", call(strength=float("nan")), ValueError, r"strength must be a number, got nan"),
        BadSample(
            "mask shape",
            call(masks=[Mask.rows(torch.ones(3, dtype=torch.bool))]),
            ValueError,
            r"masks\[0\] must be \[4\]",
        ),
    ]
