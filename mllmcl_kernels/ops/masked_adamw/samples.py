"""Calls of `masked_adamw_`."""

from __future__ import annotations

import torch

from ...masks import Mask, flatten_masks
from ...op import BadSample, Sample
from ..mask_grads.samples import masked_tensors

__all__ = ["bad_samples", "samples"]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Every kind of mask at once with history, a first step, wide moments, a scale, no mask at all."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = (
        ("with history", 7.0, 0.5, 0.01, True),
        ("first step", 1.0, 1.0, 0.0, True),
        ("no masks", 3.0, 1.0, 0.1, False),
    )
    for name, step, scale, decay, masked in cases:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors, masks = masked_tensors(generator)
        params = [tensor.to(device, dtype) for tensor in tensors]
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device, dtype) for p in params]
        first = step == 1.0
        m, v = ([torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2))
        if not first:
            for p, q, g in zip(m, v, grads, strict=True):
                p.copy_(0.1 * g)
                q.copy_(g * g)
        chosen = [None if mask is None or not masked else mask.to(device) for mask in masks]
        numbers = (torch.tensor(value, dtype=torch.float64) for value in (step, 1e-2, scale))
        flat = flatten_masks("samples", params, chosen)
        calls.append(Sample(name, (params, grads, m, v, *flat, *numbers, 0.9, 0.999, 1e-8, decay)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import masked_adamw_

    def call(count=1, grad=None, masks=None, **options):
        params = [torch.ones(4, 2) for _ in range(count)]
        grads = [torch.ones(4, 2) if grad is None else grad]
        moments = [[torch.zeros(4, 2)], [torch.zeros(4, 2)]]
        return lambda: masked_adamw_(params, grads, *moments, masks, **({"step": 1, "lr": 0.1} | options))

    return [
        BadSample("counts", call(count=2), ValueError, r"grads must be as many as params = 2, got 1"),
        BadSample(
            "grad shape",
            call(grad=torch.ones(2, 4)),
            ValueError,
            r"grads\[0\] must be of params\[0\]'s shape \[4, 2\], got \[2, 4\]",
        ),
        BadSample("grad none", call(grad="zero"), TypeError, r"grads\[0\] must be a Tensor, got str"),
        BadSample("step zero", call(step=0), ValueError, r"step must be at least 1, got 0"),
        BadSample("lr negative", call(lr=-1.0), ValueError, r"lr must be >= 0, got -1\.0"),
        BadSample("beta", call(betas=(1.0, 0.9)), ValueError, r"betas must be two numbers in \[0, 1\)"),
        BadSample("eps", call(eps=-1e-8), ValueError, r"eps must be >= 0"),
        BadSample("weight decay", call(weight_decay=-0.1), ValueError, r"weight_decay must be >= 0"),
        BadSample(
            "masks count", call(masks=[]), ValueError, r"masks must be None or one for each of the 1 tensors, got 0"
        ),
        BadSample(
            "mask shape",
            call(masks=[Mask.rows(torch.ones(3, dtype=torch.bool))]),
            ValueError,
            r"masks\[0\] must be \[4\]",
        ),
    ]
