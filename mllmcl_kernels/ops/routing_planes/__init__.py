"""`routing_planes`: what a router's statistics are made of, summed over blocks of rows, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import expect, expect_device, expect_floating, expect_mask, expect_shape, expect_tensor
from ...op import Cost, Op
from .reference import PLANE_ROWS, routing_planes_backward_reference, routing_planes_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["PLANE_ROWS", "fake_planes", "routing_planes", "routing_planes_backward_op", "routing_planes_op"]

# T tokens, E experts, k chosen experts, P planes


def fake_planes(table: Tensor, count: int = 1) -> Tensor:
    """Empty planes of `count` routers side by side, whose tables are like this one `[T, count * E]`."""
    return table.new_empty(-(-table.shape[0] // PLANE_ROWS), 3 * table.shape[1] + 3 * count)


def _fake(logits, probs, gates, indices, token_mask):
    return fake_planes(gates)


def _fake_backward(d_planes, logits, probs, token_mask):
    return tuple(probs.new_empty(probs.shape) for _ in range(3))


def _setup_context(ctx, inputs, output) -> None:
    logits, probs, _, _, token_mask = inputs
    ctx.save_for_backward(logits, probs, token_mask)


def _backward(ctx, d_planes):
    grads = routing_planes_backward_op(d_planes, *ctx.saved_tensors, backend=ctx.backend)
    return (*(grad if need else None for need, grad in zip(ctx.needs_input_grad, grads, strict=False)), None, None)


def _cost(logits, probs, gates, indices, token_mask) -> Cost:
    tables = (logits, probs, gates, indices)
    # an exponential and a logarithm are ten operations each
    return Cost(flops=30 * gates.numel(), bytes=sum(table.numel() * table.element_size() for table in tables))


routing_planes_backward_op = Op(
    name="routing_planes_backward",
    reference=routing_planes_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

routing_planes_op = Op(
    name="routing_planes",
    reference=routing_planes_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(op: str, logits, probs, gates, indices, token_mask) -> None:
    expect_tensor(op, "gates", gates)
    expect(gates.dim() >= 1, op, "gates", "of shape [..., E]", list(gates.shape))
    lead = tuple(gates.shape[:-1])
    for name, table in (("logits", logits), ("probs", probs), ("gates", gates)):
        expect_tensor(op, name, table)
        expect_floating(op, name, table)
        expect_shape(op, name, table, "[..., E]", gates.shape)
        expect_device(op, name, table, gates.device)
    expect_tensor(op, "indices", indices)
    expect(indices.dtype == torch.int32, op, "indices", "of dtype int32", indices.dtype, TypeError)
    expect_device(op, "indices", indices, gates.device)
    fits = indices.dim() == gates.dim() and tuple(indices.shape[:-1]) == lead
    expect(fits, op, "indices", f"[..., k] with ... = {list(lead)}", list(indices.shape))
    if token_mask is not None:
        expect_mask(op, "token_mask", token_mask, lead, gates.device)


def routing_planes(
    logits: Tensor,
    probs: Tensor,
    gates: Tensor,
    indices: Tensor,
    token_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sums of a routing's tables over blocks of rows: what `route` leaves beside the tables it makes.

    Args:
        logits, probs, gates: `[..., E]`, float32, or float64 by the reference.
        indices: `[..., k]` int32, -1 for no expert.
        token_mask: bool, broadcastable to `[...]`; False counts in nothing.
        backend: "reference", "cpp", "triton", or None to choose.

    Returns:
        planes `[P, 3 E + 3]`, one for every PLANE_ROWS tokens in their order, in the tables' dtype: of each expert how
        often it was chosen, its gates and its probabilities; then of the tokens (log sum exp logits)^2, entropy and
        number. Differentiable in logits, probs and gates.

    Raises:
        TypeError, ValueError: tables of different shapes or devices, indices or masks of other dtypes.

    >>> gates = torch.tensor([[0.75, 0.0], [0.0, 0.5]])
    >>> routing_planes(gates, gates, gates, torch.tensor([[0], [1]], dtype=torch.int32))[:, :4]
    tensor([[1.0000, 1.0000, 0.7500, 0.5000]])
    """
    _check("routing_planes", logits, probs, gates, indices, token_mask)
    lead, experts = gates.shape[:-1], gates.shape[-1]
    tables = [table.reshape(-1, experts) for table in (logits, probs, gates)]
    slots = indices.reshape(-1, indices.shape[-1])
    mask = None if token_mask is None else token_mask.expand(lead).reshape(-1)
    return routing_planes_op(*tables, slots, mask, backend=backend)
