"""`anchor_grad_`: the gradient of a quadratic pull towards anchors, added to gradients without an autograd graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect_lists, expect_number
from ...masks import Mask, flatten_masks
from ...op import Cost, Op
from .reference import anchor_grad_reference
from .samples import bad_samples, samples

__all__ = ["anchor_grad_", "anchor_grad_op"]


def _cost(grads, params, anchors, importances, *_rest) -> Cost:
    lists = (grads, grads, params, anchors, importances)
    total = sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)
    return Cost(flops=4 * sum(grad.numel() for grad in grads), bytes=total)


anchor_grad_op = Op(
    name="anchor_grad_",
    reference=anchor_grad_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("grads",),
)


@torch.no_grad()
def anchor_grad_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor],
    strength: float | Tensor,
    *,
    masks: Sequence[Mask | None] | None = None,
    backend: str | None = None,
) -> None:
    """Add the gradient of a quadratic pull towards the anchors, in place, on the entries that the masks allow.

        grad += strength importance (param - anchor)

    This is the gradient of strength / 2 sum importance (param - anchor)^2. A masked-out entry keeps its gradient bit
    for bit.

    Args:
        grads, params, anchors, importances: lists of equal length, shapes alike, each tensor of a dtype of its own.
        strength: a number or a one-element tensor (one on the device is never read by the host).
        masks: a `Mask` or None for each tensor, or None for no mask at all.
        backend: "reference", "cpp", "triton", or None to choose.

    Raises:
        TypeError, ValueError: lists of different length, shapes or devices that differ, a mask that does not fit, a
            strength that is no number.

    Source: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks (1612.00796).

    >>> grad, param, anchor = torch.zeros(2), torch.tensor([1.0, 2.0]), torch.zeros(2)
    >>> anchor_grad_([grad], [param], [anchor], [torch.tensor([0.5, 2.0])], 10.0)
    >>> grad
    tensor([ 5., 40.])
    """
    op = "anchor_grad_"
    expect_lists(op, {"grads": grads, "params": params, "anchors": anchors, "importances": importances})
    number = expect_number(op, "strength", strength)
    flat = flatten_masks(op, grads, masks)
    if grads:
        lists = (list(grads), list(params), list(anchors), list(importances))
        anchor_grad_op(*lists, *flat, number, backend=backend)
