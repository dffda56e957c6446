"""`ema_update_`: averages follow their parameters, with one weight for a tensor, an expert, a row or an entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_lists, expect_real
from ...masks import ELEMENTS, NONE, Mask, flatten_masks
from ...op import Cost, Op
from .reference import CONSTANT, DEMA, PEMA, ema_update_reference
from .samples import bad_samples, samples

__all__ = ["ema_update_", "ema_update_op"]

MODES = {None: CONSTANT, "dema": DEMA, "pema": PEMA}
GRANULARITIES = ("tensor", "expert", "row", "element")


def _cost(averages, params, grads, previous_grads, squared_grads, *_rest) -> Cost:
    lists = (averages, averages, params, grads, previous_grads, squared_grads)
    total = sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)
    return Cost(flops=3 * sum(average.numel() for average in averages), bytes=total)


ema_update_op = Op(
    name="ema_update_",
    reference=ema_update_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("averages",),
)


def _groups(op: str, averages: Sequence[Tensor], granularity: str, dim: int | Sequence[int], ranks) -> list[int]:
    """Of each tensor the dimension whose slices have a weight, or NONE or ELEMENTS."""
    expect(granularity in GRANULARITIES, op, "granularity", f"one of {', '.join(GRANULARITIES)}", repr(granularity))
    expect((ranks is not None) == (granularity == "expert"), op, "ranks", 'given with granularity="expert"', ranks)
    if granularity in ("tensor", "element"):
        return [NONE if granularity == "tensor" else ELEMENTS] * len(averages)
    dims = [dim] * len(averages) if isinstance(dim, int) else list(dim)
    expect(len(dims) == len(averages), op, "dim", f"a number or one for each of the {len(averages)} tensors", len(dims))
    slices = None if ranks is None else sum(ranks)
    for index, (average, place) in enumerate(zip(averages, dims, strict=True)):
        if not 0 <= place < average.dim():
            expect(False, op, "dim", f"a dimension of averages[{index}] below {average.dim()}", place)
        if slices is not None and average.shape[place] != slices:
            rows = average.shape[place]
            expect(False, op, "ranks", f"{rows} in sum, the length of dimension {place} of averages[{index}]", slices)
    return dims


def _wanted(op: str, mode: str | None, given: dict[str, Sequence[Tensor] | None]) -> dict[str, Sequence[Tensor]]:
    """The lists that the mode reads; all of them and no other have to be given."""
    needs = {None: (), "dema": ("grads", "previous_grads"), "pema": ("squared_grads",)}[mode]
    for name, tensors in given.items():
        told = "given" if name in needs else "None"
        expect((tensors is not None) == (name in needs), op, name, f"{told} with mode={mode!r}", type(tensors).__name__)
    return {name: given[name] for name in needs}


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | None = None,
    mode: str | None = None,
    grads: Sequence[Tensor] | None = None,
    previous_grads: Sequence[Tensor] | None = None,
    squared_grads: Sequence[Tensor] | None = None,
    granularity: str | None = None,
    dim: int | Sequence[int] = 0,
    ranks: Sequence[int] | None = None,
    base_weight: float = 0.01,
    factor: float = 2.0,
    masks: Sequence[Mask | None] | None = None,
    backend: str | None = None,
) -> None:
    """Move averages towards their parameters, in place, on the entries that the masks allow.

        average += w d,    d = param - average
        decay:  w = 1 - decay
        "dema": w = factor (1 + sum|g|) / (sum|d| sum|g - g_before|) where that lies in (0, 1), else base_weight
        "pema": w = clip(base_weight (D / mean|d|) (C / mean F), base_weight / 10, 1)

    Sums and means are over a group of entries, and each group has its own weight; D and C are the means of |d| and F
    over the whole tensor. Masked-out entries keep their bits and count nowhere. Nothing waits for the device.

    Args:
        averages, params: lists of equal length, shapes alike; averages may be wider than parameters.
        decay: the constant rule, in [0, 1]. mode: "dema" or "pema". One of the two has to be given.
        grads, previous_grads: for "dema", gradients of this step and of the one before.
        squared_grads: for "pema", running means of the squared gradients (F); without them those of `grads` alone.
        granularity: what has a weight of its own: "tensor" (default of "dema"), "expert", "row" or "element" (default
            of "pema").
        dim: for "expert" and "row", the dimension of the slices, one for all or one for each tensor.
        ranks: for "expert", how many consecutive slices each expert owns.
        base_weight: fallback of "dema", and weight of an average entry in "pema"; in (0, 1].
        factor: of "dema".
        masks: a `Mask` or None for each tensor, or None for no mask at all.
        backend: "reference", "cpp", "triton", or None to choose.

    Raises:
        TypeError, ValueError: lists of different length, shapes or devices that differ, a mask that does not fit, lists
            that the mode does not read or lacks, ranks that do not sum up to the dimension, numbers out of range.

    Source: Qiao et al., Large Continual Instruction Assistant (2410.10868) for "dema".

    >>> average, param = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    >>> ema_update_([average], [param], decay=0.5, masks=[Mask.elements(torch.tensor([True, True, False]))])
    >>> average
    tensor([0.5000, 1.0000, 0.0000])
    """
    op = "ema_update_"
    if (decay is None) == (mode is None):
        expect(False, op, "decay or mode", "one of the two", f"{decay} and {mode!r}")
    expect(mode in MODES, op, "mode", '"dema" or "pema"', repr(mode))
    if mode == "pema" and squared_grads is None and grads is not None:
        squared_grads, grads = [grad.detach().square() for grad in grads], None
    given = {"grads": grads, "previous_grads": previous_grads, "squared_grads": squared_grads}
    read = _wanted(op, mode, given)
    base_weight = expect_real(op, "base_weight", base_weight, "in (0, 1]", lambda value: 0.0 < value <= 1.0)
    factor = expect_real(op, "factor", factor, "positive", lambda value: value > 0.0)
    if mode is None:
        decay = expect_real(op, "decay", decay, "in [0, 1]", lambda value: 0.0 <= value <= 1.0)
        expect(granularity in (None, "tensor"), op, "granularity", 'None or "tensor" with decay', repr(granularity))
        if ranks is None and ema_update_op.at_once((averages, params), masks, 1.0 - decay, backend=backend):
            return
    expect_lists(op, {"averages": averages, "params": params, **read})
    default = "element" if mode == "pema" else "tensor"
    groups = _groups(op, averages, default if granularity is None else granularity, dim, ranks)
    flat = flatten_masks(op, averages, masks)
    if averages:
        lists = (list(averages), list(params), *(list(read.get(name, ())) for name in given))
        weight = 1.0 - decay if mode is None else base_weight
        ema_update_op(*lists, *flat, MODES[mode], weight, factor, groups, list(ranks or ()), backend=backend)
