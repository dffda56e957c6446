"""`routing_statistics`: load, importance and auxiliary losses of a router, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import expect, expect_device, expect_floating, expect_mask, expect_shape, expect_tensor
from ...op import Cost, Op
from .reference import routing_statistics_backward_reference, routing_statistics_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["Statistics", "routing_statistics", "routing_statistics_backward_op", "routing_statistics_op"]

# T tokens, E experts, k chosen experts


class Statistics(NamedTuple):
    """load `[E]`, importance `[E]`, and three losses without dimensions."""

    load: Tensor
    importance: Tensor
    balance: Tensor
    z: Tensor
    entropy: Tensor


def _fake(logits, probs, gates, indices, token_mask):
    return tuple(gates.new_empty(shape) for shape in (gates.shape[1:], gates.shape[1:], (), (), (), ()))


def _fake_backward(d_importance, d_balance, d_z, d_entropy, logits, probs, token_mask, load, count, needs):
    return tuple(probs.new_empty(probs.shape if need else (0,)) for need in needs)


def _setup_context(ctx, inputs, output) -> None:
    logits, probs, _, _, token_mask = inputs
    load, *_, count = output
    ctx.save_for_backward(logits, probs, token_mask, load, count)
    ctx.mark_non_differentiable(load, count)
    # a loss that nobody uses costs no zeros
    ctx.set_materialize_grads(False)


def _backward(ctx, _d_load, d_importance, d_balance, d_z, d_entropy, _d_count):
    reached = (d_z is not None, d_balance is not None or d_entropy is not None, d_importance is not None)
    needs = [need and reach for need, reach in zip(ctx.needs_input_grad[:3], reached, strict=True)]
    grads = routing_statistics_backward_op(
        d_importance, d_balance, d_z, d_entropy, *ctx.saved_tensors, needs, backend=ctx.backend
    )
    return (*(grad if need else None for need, grad in zip(needs, grads, strict=True)), None, None)


def _cost(logits, probs, gates, indices, token_mask) -> Cost:
    tables = (logits, probs, gates, indices)
    # an exponential and a logarithm are ten operations each
    return Cost(flops=30 * gates.numel(), bytes=sum(table.numel() * table.element_size() for table in tables))


routing_statistics_backward_op = Op(
    name="routing_statistics_backward",
    reference=routing_statistics_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

routing_statistics_op = Op(
    name="routing_statistics",
    reference=routing_statistics_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    aside=(0, 5),
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


def routing_statistics(
    logits: Tensor,
    probs: Tensor,
    gates: Tensor,
    indices: Tensor,
    token_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Statistics:
    """What `Routing` tells of all tokens together, in one pass over its tables.

    Args:
        logits, probs, gates: `[..., E]`, float32, or float64 by the reference.
        indices: `[..., k]` int32, -1 for no expert.
        token_mask: bool, broadcastable to `[...]`; False counts in nothing.
        backend: "reference", "cpp", "triton", or None to choose.

    Returns:
        Statistics; importance is differentiable in gates, balance and entropy in probs, z in logits, load in nothing.

    Raises:
        TypeError, ValueError: tables of different shapes or devices, indices or masks of other dtypes.

    >>> logits = torch.zeros(3, 2)
    >>> probs = logits.softmax(-1)
    >>> routing_statistics(logits, probs, probs, torch.tensor([[0], [1], [-1]], dtype=torch.int32)).load
    tensor([1., 1.])
    """
    _check("routing_statistics", logits, probs, gates, indices, token_mask)
    lead, experts = gates.shape[:-1], gates.shape[-1]
    tables = [table.reshape(-1, experts) for table in (logits, probs, gates)]
    slots = indices.reshape(-1, indices.shape[-1])
    mask = None if token_mask is None else token_mask.expand(lead).reshape(-1)
    return Statistics(*routing_statistics_op(*tables, slots, mask, backend=backend)[:5])
