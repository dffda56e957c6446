"""`mask_grads_`: zero the gradient of every masked-out entry, all tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_lists
from ...masks import Mask, flatten_masks
from ...op import Cost, Op
from .reference import mask_grads_reference
from .samples import bad_samples, samples

__all__ = ["mask_grads_", "mask_grads_op"]


def _cost(grads, *_rest) -> Cost:
    return Cost(flops=0, bytes=sum(2 * grad.numel() * grad.element_size() for grad in grads))


mask_grads_op = Op(
    name="mask_grads_",
    reference=mask_grads_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("grads",),
)


@torch.no_grad()
def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Mask | None], *, backend: str | None = None) -> None:
    """Set the gradient of every masked-out entry to zero, in place.

    This alone does not freeze anything: momentum, second moments and decoupled weight decay still move an entry whose
    gradient is zero. `masked_adamw_` and `MaskedAdamW` do freeze.

    Args:
        grads: floating tensors of any shape.
        masks: one `Mask` or None (leave as it is) for each.
        backend: "reference", "cpp", "triton", "cuda", or None to choose.

    Raises:
        TypeError, ValueError: what is no floating tensor, counts that differ, a mask that does not fit its tensor.

    >>> grad = torch.ones(4, 2)
    >>> mask_grads_([grad], [Mask.rows(torch.tensor([True, False, False, True]))])
    >>> grad.sum(1)
    tensor([2., 0., 0., 2.])
    """
    op = "mask_grads_"
    expect_lists(op, {"grads": grads})
    expect(masks is not None, op, "masks", "one Mask or None for each gradient", None, TypeError)
    flat = flatten_masks(op, grads, masks)
    if grads:
        mask_grads_op(list(grads), *flat, backend=backend)
