"""`routing_statistics`: load, importance and auxiliary losses of a router from its planes, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...checks import expect, expect_floating, expect_tensor
from ...op import Cost, Op
from ..routing_planes import routing_planes
from .reference import routing_statistics_backward_reference, routing_statistics_reference
from .samples import backward_samples, bad_samples, samples

__all__ = [
    "Statistics",
    "routing_statistics",
    "routing_statistics_backward_op",
    "routing_statistics_op",
    "statistics_of",
]

# P planes, E experts


class Statistics(NamedTuple):
    """load `[E]`, importance `[E]`, and three losses without dimensions."""

    load: Tensor
    importance: Tensor
    balance: Tensor
    z: Tensor
    entropy: Tensor


def _fake(planes):
    width = planes.shape[1]
    experts = (width - 3) // 3
    return tuple(planes.new_empty(shape) for shape in ((experts,), (experts,), (), (), (), (width,)))


def _fake_backward(d_importance, d_balance, d_z, d_entropy, sums):
    return sums.new_empty(sums.shape)


def _setup_context(ctx, inputs, output) -> None:
    load, *_, sums = output
    ctx.planes = inputs[0].shape[0]
    ctx.save_for_backward(sums)
    ctx.mark_non_differentiable(load, sums)
    # a loss that nobody uses costs no zeros
    ctx.set_materialize_grads(False)


def _backward(ctx, _d_load, d_importance, d_balance, d_z, d_entropy, _d_sums):
    grads = (d_importance, d_balance, d_z, d_entropy)
    d_plane = routing_statistics_backward_op(*grads, *ctx.saved_tensors, backend=ctx.backend)
    return (d_plane.expand(ctx.planes, -1),)


def _cost(planes) -> Cost:
    return Cost(flops=planes.numel(), bytes=planes.numel() * planes.element_size())


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


def statistics_of(planes: Tensor, *, backend: str | None = None) -> Statistics:
    """Statistics from the planes `[P, 3 E + 3]` that `route` and `routing_planes` leave.

    importance and the losses are differentiable in planes, load is not.
    """
    op = "routing_statistics"
    expect_tensor(op, "planes", planes)
    expect_floating(op, "planes", planes)
    fits = planes.dim() == 2 and planes.shape[1] >= 3 and planes.shape[1] % 3 == 0
    expect(fits, op, "planes", "[P, 3 E + 3]", list(planes.shape))
    return Statistics(*routing_statistics_op(planes, backend=backend)[:5])


def routing_statistics(
    logits: Tensor,
    probs: Tensor,
    gates: Tensor,
    indices: Tensor,
    token_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Statistics:
    """What `Routing` tells of all tokens together, from tables alone.

    Args:
        logits, probs, gates, indices, token_mask, backend: as in `routing_planes`.

    Returns:
        Statistics; importance is differentiable in gates, balance and entropy in probs, z in logits, load in nothing.

    Raises:
        TypeError, ValueError: as `routing_planes`.

    >>> logits = torch.zeros(3, 2)
    >>> probs = logits.softmax(-1)
    >>> routing_statistics(logits, probs, probs, torch.tensor([[0], [1], [-1]], dtype=torch.int32)).load
    tensor([1., 1.])
    """
    return statistics_of(routing_planes(logits, probs, gates, indices, token_mask, backend=backend), backend=backend)
