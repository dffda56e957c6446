"""`orthogonality_loss`: sum |A_t A_old^T| over all layers, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_device, expect_floating, expect_tensor
from ...op import Cost, Op
from .reference import orthogonality_loss_backward_reference, orthogonality_loss_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["orthogonality_loss", "orthogonality_loss_op"]

# G layers of one shape, r ranks of the current expert, Q ranks of the old experts, K width


def _cost(lora_a, previous_a) -> Cost:
    layers, rank, width = lora_a.shape
    old = previous_a.shape[1]
    numbers = layers * width * (rank + old)
    return Cost(flops=2 * layers * rank * old * width, bytes=numbers * lora_a.element_size())


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_loss):
    lora_a, previous_a = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None
    return orthogonality_loss_backward_op(d_loss, lora_a, previous_a, backend=ctx.backend), None


orthogonality_loss_backward_op = Op(
    name="orthogonality_loss_backward",
    reference=orthogonality_loss_backward_reference,
    package=__name__,
    fake=lambda d_loss, lora_a, previous_a: torch.empty_like(lora_a),
    samples=backward_samples,
)

orthogonality_loss_op = Op(
    name="orthogonality_loss",
    reference=orthogonality_loss_reference,
    package=__name__,
    fake=lambda lora_a, previous_a: lora_a.new_empty((), dtype=torch.promote_types(lora_a.dtype, torch.float32)),
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("previous_a",),
)


def _check(op: str, lora_a: Sequence[Tensor], previous_a: Sequence[Tensor]) -> None:
    expect(len(lora_a) > 0, op, "lora_a", "at least one tensor", 0)
    expect(len(previous_a) == len(lora_a), op, "previous_a", f"as many as lora_a = {len(lora_a)}", len(previous_a))
    for index, (new, old) in enumerate(zip(lora_a, previous_a, strict=True)):
        for name, tensor in ((f"lora_a[{index}]", new), (f"previous_a[{index}]", old)):
            expect_tensor(op, name, tensor)
            expect_floating(op, name, tensor)
            expect_device(op, name, tensor, lora_a[0].device)
            expect(tensor.dim() == 2, op, name, "a matrix [ranks, d_in]", list(tensor.shape))
        fits = old.shape[1] == new.shape[1]
        expect(fits, op, f"previous_a[{index}]", f"[Q, d_in] with d_in = {new.shape[1]}", list(old.shape))


def orthogonality_loss(
    lora_a: Tensor | Sequence[Tensor], previous_a: Tensor | Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """How far the current experts' input directions are from orthogonal to those of the old ones.

        loss = sum over layers, i, j of |A_t A_old^T|_ij

    Args:
        lora_a: A of the current expert, `[r, d_in]`, or a sequence with one for each layer.
        previous_a: A of all old experts of the same layers, stacked, `[Q, d_in]`; Q = 0 adds nothing. It is a constant.
        backend: "reference", or None to choose. Layers of one shape share one batched product.

    Returns:
        A scalar in float32 or better; differentiable in lora_a, where an exact zero has gradient zero.

    Raises:
        TypeError, ValueError: no tensors, counts that differ, widths that do not fit.

    Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning (2023), O-LoRA.

    >>> orthogonality_loss(torch.eye(4)[:2], torch.tensor([[0.5, 0.0, 3.0, 0.0]]))
    tensor(0.5000)
    """
    op = "orthogonality_loss"
    news, olds = ([value] if isinstance(value, Tensor) else list(value) for value in (lora_a, previous_a))
    _check(op, news, olds)
    alike: dict[tuple, list[int]] = {}
    for place, (new, old) in enumerate(zip(news, olds, strict=True)):
        alike.setdefault((new.shape, old.shape, new.dtype), []).append(place)
    parts = []
    for places in alike.values():
        new_GrK = torch.stack([news[place] for place in places])
        old_GQK = torch.stack([olds[place].detach() for place in places]).to(new_GrK.dtype)
        parts.append(orthogonality_loss_op(new_GrK, old_GQK, backend=backend))
    return torch.stack(parts).sum()
