"""Calls of `ema_update_`."""

from __future__ import annotations

import torch

from ...masks import ELEMENTS, NONE, Mask, flatten_masks
from ...op import BadSample, Sample
from ..mask_grads.samples import masked_tensors
from .reference import CONSTANT, DEMA, PEMA

__all__ = ["bad_samples", "samples"]

RANKS = (3, 4, 0, 6)


def _stacks(generator: torch.Generator) -> tuple[list[torch.Tensor], list[Mask | None], list[int]]:
    """Tensors of 13 slices along dimension 0, 1 or 2, masks of every kind, across the slices too; one is large."""
    total = sum(RANKS)
    shapes = [(total, 9), (33, total), (3, total, 5), (700, total), (total,), (2, 3, total)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    masks = [
        Mask.experts(torch.tensor([True, False, True, True]), RANKS, 0),
        Mask.rows(torch.arange(33) % 3 > 0),
        Mask.elements(torch.rand(3, total, 5, generator=generator) < 0.5),
        None,
        Mask.owner(torch.arange(total).to(torch.uint8) % 2, 1),
        Mask.rows(torch.arange(total) % 5 > 0, dim=2),
    ]
    return tensors, masks, [0, 1, 1, 1, 0, 2]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Every mode at every granularity with masks of every kind, wide averages, weights that fall back, no masks."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def add(name: str, mode: int, group: int | str, *, masked: bool = True, average=dtype, factor: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed + len(calls))
        stacked = group in ("expert", "row")
        tensors, masks, dims = _stacks(generator) if stacked else (*masked_tensors(generator), [])

        def draw(scale: float) -> list[torch.Tensor]:
            drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors)
            return [(scale * value).to(device, dtype) for value in drawn]

        averages, params = [tensor.to(device, average) for tensor in tensors], draw(2.0)
        grads, before = (draw(1.0), draw(2.0)) if mode == DEMA else ([], [])
        squares = [value.square() for value in draw(1.0)] if mode == PEMA else []
        chosen = [mask.to(device) if mask is not None and masked else None for mask in masks]
        flat = flatten_masks("samples", averages, chosen)
        groups = dims if stacked else [group] * len(tensors)
        lists = (averages, params, grads, before, squares, *flat)
        ranks = list(RANKS) if group == "expert" else []
        calls.append(Sample(name, (*lists, mode, 0.125, factor, groups, ranks)))

    add("constant", CONSTANT, NONE)
    for mode, word in ((DEMA, "dema"), (PEMA, "pema")):
        for group in (NONE, "expert", "row", ELEMENTS):
            told = {NONE: "tensor", ELEMENTS: "element"}.get(group, group)
            add(f"{word} by {told}", mode, group)
    add("dema falls back", DEMA, NONE, factor=1e6)
    add("dema by expert without masks, wide averages", DEMA, "expert", masked=False, average=wide)
    add("pema by element without masks, wide averages", PEMA, ELEMENTS, masked=False, average=wide)
    add("constant without masks, wide averages", CONSTANT, NONE, masked=False, average=wide)
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import ema_update_

    def call(average=None, param=None, **options):
        pair = [torch.zeros(4, 2) if average is None else average], [torch.ones(4, 2) if param is None else param]
        return lambda: ema_update_(*pair, **options)

    one = [torch.ones(4, 2)]
    dema = {"mode": "dema", "grads": one, "previous_grads": one}
    return [
        BadSample("neither", call(), ValueError, r"decay or mode must be one of the two, got None and None"),
        BadSample("both", call(decay=0.9, mode="dema"), ValueError, r"decay or mode must be one of the two"),
        BadSample("mode", call(mode="fast"), ValueError, r"mode must be \"dema\" or \"pema\", got 'fast'"),
        BadSample("decay", call(decay=1.5), ValueError, r"decay must be in \[0, 1\], got 1\.5"),
        BadSample(
            "decay by row",
            call(decay=0.5, granularity="row"),
            ValueError,
            r"granularity must be None or \"tensor\" with decay, got 'row'",
        ),
        BadSample("no grads", call(mode="dema"), ValueError, r"grads must be given with mode='dema', got NoneType"),
        BadSample("idle grads", call(decay=0.9, grads=one), ValueError, r"grads must be None with mode=None, got list"),
        BadSample("no squares", call(mode="pema"), ValueError, r"squared_grads must be given with mode='pema'"),
        BadSample(
            "counts",
            call(mode="dema", grads=one, previous_grads=[]),
            ValueError,
            r"previous_grads must be as many as averages = 1, got 0",
        ),
        BadSample(
            "shape",
            call(param=torch.ones(2, 4), decay=0.5),
            ValueError,
            r"params\[0\] must be of averages\[0\]'s shape \[4, 2\], got \[2, 4\]",
        ),
        BadSample("no tensor", call(param=1.0, decay=0.5), TypeError, r"params\[0\] must be a Tensor, got float"),
        BadSample(
            "integers",
            call(average=torch.zeros(4, 2, dtype=torch.int64), decay=0.5),
            TypeError,
            r"averages\[0\] must be of dtype float32",
        ),
        BadSample(
            "granularity",
            call(**dema, granularity="layer"),
            ValueError,
            r"granularity must be one of tensor, expert, row, element, got 'layer'",
        ),
        BadSample("no ranks", call(**dema, granularity="expert"), ValueError, r"ranks must be given with granularity"),
        BadSample(
            "ranks",
            call(**dema, granularity="expert", ranks=(1, 2)),
            ValueError,
            r"ranks must be 4 in sum, the length of dimension 0 of averages\[0\], got 3",
        ),
        BadSample(
            "dim",
            call(**dema, granularity="row", dim=2),
            ValueError,
            r"dim must be a dimension of averages\[0\] below 2, got 2",
        ),
        BadSample("dims", call(**dema, granularity="row", dim=[0, 1]), ValueError, r"dim must be a number or one for"),
        BadSample("base weight", call(**dema, base_weight=0.0), ValueError, r"base_weight must be in \(0, 1\], got 0"),
        BadSample("factor", call(**dema, factor=0.0), ValueError, r"factor must be positive, got 0"),
        BadSample(
            "mask shape",
            call(decay=0.5, masks=[Mask.rows(torch.ones(3, dtype=torch.bool))]),
            ValueError,
            r"masks\[0\] must be \[4\]",
        ),
    ]
