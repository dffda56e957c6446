"""What the cases of ops over lists of tensors share: tensors, masks, the check before the clock, the race."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mllmcl_kernels import Mask

from .cases import ListCase
from .measuring import RESULTS, Case, misses, providers_used, race

__all__ = ["draw", "masks_of", "race_lists"]

Lists = dict[str, list[Tensor]]


def masks_of(case: ListCase, generator: torch.Generator) -> list[Mask | None]:
    """A mask for each tensor of the case, on the generator's device."""
    if case.mask == "no mask":
        return [None] * len(case.shapes)
    if case.mask == "half of the entries active":
        draws = (torch.rand(shape, generator=generator, device=generator.device) for shape in case.shapes)
        return [Mask.elements(draw < 0.5) for draw in draws]
    active = torch.arange(case.experts) == 3 % case.experts
    masks = (Mask.experts(active, (case.rank,) * case.experts, dim) for dim in case.dims)
    return [mask.to(generator.device) for mask in masks]


def draw(case: ListCase, generator: torch.Generator, scale: float = 1.0) -> list[Tensor]:
    """Normal numbers in the shapes of the case."""
    drawn = [scale * torch.randn(shape, generator=generator, device=generator.device) for shape in case.shapes]
    if not case.columns:
        return drawn
    return [tensor.t().contiguous().t() if dim else tensor for tensor, dim in zip(drawn, case.dims, strict=True)]


def _restoring(run: Callable, written: list[Tensor], masks: Sequence[Mask | None]) -> Callable[[], object]:
    """`run` with masked-out entries of what it writes put back: a mask by hand."""
    if masks[0] is None:
        return run
    keep = [mask.expand(tensor.shape).expand(tensor.shape) for mask, tensor in zip(masks, written, strict=True)]

    def step() -> None:
        kept = [tensor.clone() for tensor in written]
        run()
        for tensor, mask, old in zip(written, keep, kept, strict=True):
            tensor.copy_(torch.where(mask, tensor, old))

    return step


def race_lists(
    benchmark, case: ListCase, call: Callable, lists: Lists, written: Sequence[str], peers: dict, masks, device, rounds
) -> None:
    """Check `call(**lists, masks=masks)` against its formula in float64, then race it against the peers.

    Each peer takes the lists in their order, and writes into copies of its own of the lists named in `written`.
    """

    def copies(dtype: torch.dtype | None = None) -> Lists:
        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor.clone()

        return {
            name: [copy(tensor) for tensor in tensors] if dtype or name in written else tensors
            for name, tensors in lists.items()
        }

    share = 1 / case.experts if case.mask.startswith("1 of") else 1.0
    bytes_of = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in lists.items()}
    total = sum((2 if name in written else 1) * size for name, size in bytes_of.items())
    record = Case(f"{call.__name__}", f"{case}, float32", bytes=int(share * total))
    RESULTS.append(record)
    mine, plain, truth = copies(), copies(), copies(torch.float64)
    with providers_used() as record.providers:
        call(**mine, masks=masks)
    call(**plain, masks=masks, backend="reference")
    call(**truth, masks=masks)
    ends = [[t for name in written for t in found[name] if t.is_floating_point()] for found in (mine, plain, truth)]
    reason = misses(*ends, [f"tensor {place}" for place in range(len(ends[0]))])
    if reason:
        record.refused["ours"] = reason
    assert reason is None, reason
    field = {"ours": lambda: call(**lists, masks=masks)}
    for name, run in peers.items():
        # by rows, which torch is made for
        own = {key: [tensor.contiguous() for tensor in tensors] for key, tensors in copies().items()}
        step = functools.partial(run, *own.values())
        field[name] = _restoring(step, [tensor for key in written for tensor in own[key]], [*masks] * len(written))
    race(record, field, device, max(3, rounds * 2 // 3))
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(field["ours"], rounds=3)
