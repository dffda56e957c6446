"""`importance_update_`: running means or maxima of |grad| or grad^2, and whose maximum each entry holds."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_lists, expect_number, expect_tensor
from ...masks import Mask, flatten_masks
from ...op import Cost, Op
from .reference import importance_update_reference
from .samples import bad_samples, samples

__all__ = ["importance_update_", "importance_update_op"]


def _cost(importances, grads, owners, *_rest) -> Cost:
    lists = (importances, importances, grads, owners, owners)
    total = sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)
    return Cost(flops=4 * sum(importance.numel() for importance in importances), bytes=total)


importance_update_op = Op(
    name="importance_update_",
    reference=importance_update_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("importances", "owners"),
)


def _check_owners(op: str, owners: Sequence[Tensor], importances: Sequence[Tensor]) -> None:
    expect(len(owners) == len(importances), op, "owners", f"as many as importances = {len(importances)}", len(owners))
    for index, (owner, importance) in enumerate(zip(owners, importances, strict=True)):
        right = isinstance(owner, Tensor) and owner.dtype == torch.uint8 and owner.shape == importance.shape
        if not right or owner.device != importance.device:
            label = f"owners[{index}]"
            expect_tensor(op, label, owner)
            expect(owner.dtype == torch.uint8, op, label, "of dtype uint8", owner.dtype, TypeError)
            shape = list(importance.shape)
            expect(list(owner.shape) == shape, op, label, f"of the importance's shape {shape}", list(owner.shape))
            expect(owner.device == importance.device, op, label, f"on {importance.device}", owner.device)


@torch.no_grad()
def importance_update_(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    power: int = 2,
    reduce: str = "mean",
    count: float | Tensor | None = None,
    owners: Sequence[Tensor] | None = None,
    task: int | None = None,
    masks: Sequence[Mask | None] | None = None,
    backend: str | None = None,
) -> None:
    """Take gradients into importances, in place, on the entries that the masks allow.

        x = |grad|^power
        reduce="mean":  importance += (x - importance) / count
        reduce="max":   importance = max(importance, x),  owner = task where that made it larger

    A masked-out entry keeps importance and owner bit for bit. What is compared is x in the importance's dtype.

    Args:
        importances, grads: lists of equal length, shapes alike; importances may be of another dtype than gradients.
        power: 2 for squares (EWC), 1 for absolute values (MAS, or importances that are joined by "max").
        reduce: "mean" over calls or "max".
        count: for "mean", the number of this call from 1 on, a number or a one-element tensor (one on the device is
            never read by the host). None is 1: importances become x.
        owners: for "max", uint8 maps of the importances' shapes, or None. task: the id written there, 0 to 255.
        masks: a `Mask` or None for each tensor, or None for no mask at all.
        backend: "reference", "cpp", "triton", or None to choose.

    Raises:
        TypeError, ValueError: lists of different length, shapes or devices that differ, a mask that does not fit, a
            power, reduce, count, task or map out of place.

    Source: Kirkpatrick et al. (1612.00796), Aljundi et al. (1711.09601); He et al. (2311.16206) for maxima with owners.

    >>> importance, owner = torch.tensor([1.0, 1.0]), torch.zeros(2, dtype=torch.uint8)
    >>> importance_update_([importance], [torch.tensor([3.0, 0.5])], reduce="max", owners=[owner], task=4)
    >>> importance, owner
    (tensor([9., 1.]), tensor([4, 0], dtype=torch.uint8))
    """
    op = "importance_update_"
    expect_lists(op, {"importances": importances, "grads": grads})
    expect(power in (1, 2), op, "power", "1 or 2", power)
    expect(reduce in ("mean", "max"), op, "reduce", '"mean" or "max"', repr(reduce))
    larger = reduce == "max"
    expect(count is None or not larger, op, "count", 'None with reduce="max"', count)
    expect(owners is None or larger, op, "owners", 'None with reduce="mean"', type(owners).__name__)
    expect((task is None) == (owners is None), op, "task", "given with owners, and only there", task)
    if owners is not None:
        expect(isinstance(task, numbers.Integral), op, "task", "an id in 0..255", repr(task), TypeError)
        expect(0 <= task <= 255, op, "task", "an id in 0..255", task)
        _check_owners(op, owners, importances)
    number = expect_number(op, "count", 1.0 if count is None else count, "at least 1", 1)
    flat = flatten_masks(op, importances, masks)
    if importances:
        lists = (list(importances), list(grads), list(owners or ()))
        importance_update_op(*lists, *flat, power, larger, number, int(task or 0), backend=backend)
