"""`MaskedAdamW` beside torch's AdamW: no mask, one of the experts active, half of the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from mllmcl_kernels import Mask, MaskedAdamW

from . import packages, peers
from .cases import ListCase
from .lists import draw, masks_of
from .measuring import RESULTS, Case, misses, providers_used, race

OPTIONS = {"lr": 1e-4, "weight_decay": 0.01}
#: parameter, gradient, two moments read; parameter and moments written
PASSES = 7


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """By rows, which torch's optimizers are made for."""
    rows = torch.contiguous_format
    found = [tensor.detach().clone(memory_format=rows).requires_grad_() for tensor in tensors]
    for new, old in zip(found, tensors, strict=True):
        new.grad = old.grad.clone(memory_format=rows)
    return found


def refused(params: list[Tensor], masks: list[Mask | None]) -> str | None:
    """Two steps on a few of the tensors against torch's AdamW in float32 and float64; frozen entries bit for bit."""
    few = params[:6]
    mine, usual = copies(few), copies(few)
    truth = [param.detach().double().requires_grad_() for param in few]
    keep = [
        torch.ones_like(param, dtype=torch.bool) if mask is None else mask.expand(param.shape).expand(param.shape)
        for param, mask in zip(few, masks, strict=False)
    ]
    for new, old in zip(truth, few, strict=True):
        new.grad = old.grad.double()
    ours = MaskedAdamW(mine, **OPTIONS)
    for param, mask in zip(mine, masks, strict=False):
        ours.set_mask(param, mask)
    rest = [torch.optim.AdamW(tensors, **OPTIONS) for tensors in (usual, truth)]
    for _ in range(2):
        for optimizer in (ours, *rest):
            optimizer.step()
    for new, old, mask in zip(mine, few, keep, strict=True):
        if not torch.equal(new.detach()[~mask], old.detach()[~mask]):
            return "a frozen entry moved"
    active = [[t.detach()[mask] for t, mask in zip(ts, keep, strict=True)] for ts in (mine, usual, truth)]
    return misses(*active, [f"parameter {place}" for place in range(len(few))])


def contestants(params: list[Tensor], masks: list[Mask | None], record: Case) -> dict:
    """Every optimizer on parameters of its own, which all start alike."""
    ours = MaskedAdamW(params, **OPTIONS)
    for param, mask in zip(params, masks, strict=True):
        ours.set_mask(param, mask)
    field = {"ours": ours.step, "torch fused": torch.optim.AdamW(copies(params), **OPTIONS, fused=True).step}
    if masks[0] is None:
        field["torch foreach"] = torch.optim.AdamW(copies(params), **OPTIONS, foreach=True).step
        for name, make in (("optimi", packages.optimi_adamw), ("bitsandbytes", packages.bitsandbytes_adamw)):
            packages.add_optional(
                field, record.refused, name, name, params[0].device, lambda make=make: make(copies(params), OPTIONS)
            )
        field["torch for-loop"] = torch.optim.AdamW(copies(params), **OPTIONS, foreach=False, fused=False).step
    else:
        others = copies(params)
        keep = [mask.expand(param.shape).expand(param.shape) for param, mask in zip(params, masks, strict=True)]
        fused = torch.optim.AdamW(others, **OPTIONS, fused=True)
        field["mask, fused, restore"] = peers.Restoring(fused, others, keep).step
    return field


def test_masked_adamw(benchmark, adamw_case: ListCase, device, rounds):
    case = adamw_case
    generator = torch.Generator(device).manual_seed(0)
    params, grads = draw(case, generator), draw(case, generator)
    for param, grad in zip(params, grads, strict=True):
        param.requires_grad_().grad = grad
    masks = masks_of(case, generator)
    share = 1 / case.experts if case.mask.startswith("1 of") else 1.0
    record = Case("masked_adamw_", f"{case}, float32", bytes=int(share * PASSES * 4 * sum(p.numel() for p in params)))
    RESULTS.append(record)
    with providers_used() as record.providers:
        reason = refused(params, masks)
    if reason:
        record.refused["ours"] = reason
    assert reason is None, reason
    field = contestants(params, masks, record)
    race(record, field, device, max(3, rounds * 2 // 3))
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(field["ours"], rounds=3)
