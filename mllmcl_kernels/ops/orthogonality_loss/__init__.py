"""`orthogonality_loss`: sum |A_t A_old^T| over all layers, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ...checks import (
    are_floating,
    as_list,
    dtypes_in,
    expect,
    expect_device,
    expect_floating,
    expect_tensor,
    shapes_of,
)
from ...op import Cost, Op
from .reference import orthogonality_loss_reference
from .samples import bad_samples, samples

__all__ = ["orthogonality_loss", "orthogonality_loss_op"]

# r ranks of the current expert, Q ranks of the old experts, K width


def _cost(lora_a, previous_a, need) -> Cost:
    pairs = list(zip(lora_a, previous_a, strict=True))
    products = sum(2 * new.numel() * old.shape[0] for new, old in pairs)
    numbers = sum((1 + need) * new.numel() + old.numel() for new, old in pairs)
    return Cost(flops=(1 + need) * products, bytes=numbers * lora_a[0].element_size())


def _fake(lora_a, previous_a, need):
    wide = torch.promote_types(lora_a[0].dtype, torch.float32)
    size = sum(new.numel() for new in lora_a) if need else 0
    return lora_a[0].new_empty((), dtype=wide), lora_a[0].new_empty(size, dtype=wide)


def _setup_context(ctx, inputs, output) -> None:
    lora_a, previous_a, need = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.shapes, ctx.dtype = shapes_of(lora_a), lora_a[0].dtype
    # without the gradient on the way it is made from the inputs
    ctx.save_for_backward(*([output[1]] if need else [*lora_a, *previous_a]))


@functools.cache
def _alike(shape: torch.Size) -> Tensor:
    """One number that says what a gradient looks like."""
    return torch.empty(()).expand(shape)


def _backward(ctx, d_loss, _d_slope):
    layers, saved = len(ctx.shapes), ctx.saved_tensors
    slope = saved[0]
    if len(saved) > 1:
        slope = orthogonality_loss_op(list(saved[:layers]), list(saved[layers:]), True, backend=ctx.backend)[1]
    slope = (slope * d_loss).to(ctx.dtype)
    if type(slope) is Tensor:
        grads = list(_unflatten_dense_tensors(slope, list(map(_alike, ctx.shapes))))
    else:
        sizes = [shape.numel() for shape in ctx.shapes]
        grads = [part.view(shape) for part, shape in zip(slope.split(sizes), ctx.shapes, strict=True)]
    return grads, [None] * layers, None


orthogonality_loss_op = Op(
    name="orthogonality_loss",
    reference=orthogonality_loss_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("previous_a",),
    aside=(1,),
)


def _check(op: str, lora_a: Sequence[Tensor], previous_a: Sequence[Tensor]) -> None:
    expect(len(lora_a) > 0, op, "lora_a", "at least one tensor", 0)
    expect(len(previous_a) == len(lora_a), op, "previous_a", f"as many as lora_a = {len(lora_a)}", len(previous_a))
    if _fits(lora_a, previous_a):
        return
    device = getattr(lora_a[0], "device", None)
    for index, pair in enumerate(zip(lora_a, previous_a, strict=True)):
        _refuse(op, index, *pair, device)


def _fits(lora_a: Sequence[Tensor], previous_a: Sequence[Tensor]) -> bool:
    """Whether all are floating matrices on one device, of equal width layer by layer; by means of C alone."""
    if not are_floating(lora_a, previous_a):
        return False
    shapes = [shapes_of(tensors) for tensors in (lora_a, previous_a)]
    return set(map(len, chain(*shapes))) == {2} and all(new[1] == old[1] for new, old in zip(*shapes, strict=True))


def _refuse(op: str, index: int, new: object, old: object, device: torch.device) -> None:
    for name, tensor in ((f"lora_a[{index}]", new), (f"previous_a[{index}]", old)):
        expect_tensor(op, name, tensor)
        expect_floating(op, name, tensor)
        expect_device(op, name, tensor, device)
        expect(tensor.dim() == 2, op, name, "a matrix [ranks, d_in]", list(tensor.shape))
    width = new.shape[1]
    expect(old.shape[1] == width, op, f"previous_a[{index}]", f"[Q, d_in] with d_in = {width}", list(old.shape))


def orthogonality_loss(
    lora_a: Tensor | Sequence[Tensor], previous_a: Tensor | Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """How far the current experts' input directions are from orthogonal to those of the old ones.

        loss = sum over layers, i, j of |A_t A_old^T|_ij

    Args:
        lora_a: A of the current expert, `[r, d_in]`, or a sequence with one for each layer.
        previous_a: A of all old experts of the same layers, stacked, `[Q, d_in]`; Q = 0 adds nothing. It is a constant.
        backend: "reference", "cpp", "triton", or None to choose. All layers of one dtype share one call.

    Returns:
        A scalar in float32 or better; differentiable in lora_a, where an exact zero has gradient zero.

    Raises:
        TypeError, ValueError: no tensors, counts that differ, widths that do not fit.

    Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning (2023), O-LoRA.

    >>> orthogonality_loss(torch.eye(4)[:2], torch.tensor([[0.5, 0.0, 3.0, 0.0]]))
    tensor(0.5000)
    """
    op = "orthogonality_loss"
    news, olds = as_list(op, "lora_a", lora_a), as_list(op, "previous_a", previous_a)
    _check(op, news, olds)
    alike: dict[torch.dtype, list[int]] = {}
    for place, new in enumerate(news):
        alike.setdefault(new.dtype, []).append(place)
    parts = []
    for dtype, places in alike.items():
        now = torch.is_grad_enabled() and any(news[place].requires_grad for place in places)
        others = [olds[place] for place in places]
        if any(old.requires_grad for old in others) or dtypes_in(others) != {dtype}:
            others = [old.detach().to(dtype) for old in others]
        parts.append(orthogonality_loss_op([news[place] for place in places], others, now, backend=backend)[0])
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
