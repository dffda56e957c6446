"""`masked_adamw_` beside torch's AdamW: no mask, one of eight experts active, half of the entries."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW

from . import peers
from .measuring import Case, race

EXPERTS, RANK = 8, 16


def shapes(tiny: bool, device: torch.device) -> list[tuple[int, int]]:
    """lora_a [R, K] and lora_b [N, R] of the layers of a model."""
    layers, width = (2, 64) if tiny else (224, 4096) if device.type == "cuda" else (60, 2048)
    return [(EXPERTS * RANK, width), (width, EXPERTS * RANK)] * layers


@pytest.mark.parametrize("kind", ["no mask", "one of eight experts", "half of the entries"])
def test_masked_adamw(benchmark, kind, device, rounds, tiny):
    generator = torch.Generator().manual_seed(0)
    sizes = shapes(tiny, device)
    params = [torch.randn(*shape, generator=generator).to(device).requires_grad_() for shape in sizes]
    others = [param.detach().clone().requires_grad_() for param in params]
    for param, other in zip(params, others, strict=True):
        param.grad = torch.randn(param.shape, generator=generator).to(device)
        other.grad = param.grad.clone()
    ours = MaskedAdamW(params, lr=1e-4, weight_decay=0.01)
    active = torch.tensor([place == 3 for place in range(EXPERTS)])
    masks = [None] * len(params)
    if kind == "one of eight experts":
        masks = [Mask.experts(active, (RANK,) * EXPERTS, place % 2) for place in range(len(params))]
    elif kind == "half of the entries":
        masks = [Mask.elements(torch.rand(param.shape, generator=generator) < 0.5) for param in params]
    masks = [None if mask is None else mask.to(device) for mask in masks]
    for param, mask in zip(params, masks, strict=True):
        ours.set_mask(param, mask)
    fused = torch.optim.AdamW(others, lr=1e-4, weight_decay=0.01, fused=True)
    field = {"ours": ours.step, "torch fused": fused.step}
    if kind == "no mask":
        field["torch foreach"] = torch.optim.AdamW(others, lr=1e-4, weight_decay=0.01, foreach=True).step
    else:
        keep = [mask.expand(param.shape).expand(param.shape) for param, mask in zip(params, masks, strict=True)]
        field["mask, fused step, restore"] = lambda: peers.adamw_that_restores(fused, others, keep)
    case = Case(
        f"AdamW over {sum(p.numel() for p in params) / 1e6:.0f} M parameters in {len(params)} tensors, {kind}",
        "default",
    )
    race(case, field, device, max(3, rounds // 2))
    benchmark.pedantic(ours.step, rounds=3)
