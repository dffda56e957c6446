"""`lora_mix_routed_shared`: linears that share their input, each with its router, in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...checks import expect, expect_flag, expect_tensor
from ...dropout import draw_seed
from ...op import Cost, Op
from ..lora_mix_routed import _cost as routed_cost
from ..lora_mix_shared import (
    all_biases,
    check_linears,
    check_lists,
    fake_gradients,
    layer_gradients,
    layer_needs,
    layers_in_one_dtype,
    output_gradients,
)
from ..route import Routing, check_options, check_router, fake_routing, wrap_routing
from .reference import lora_mix_routed_shared_backward_reference, lora_mix_routed_shared_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["lora_mix_routed_shared", "lora_mix_routed_shared_backward_op", "lora_mix_routed_shared_op"]


def _fake(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed, top_k, *_options
) -> list[Tensor]:  # fmt: skip
    count = len(weight)
    s = x.new_empty(x.shape[0], count * lora_a[0].shape[0])
    routings = fake_routing(x, router_weight[0].shape[0], top_k, count)
    return [s, *routings, *(x.new_empty(x.shape[0], one.shape[0]) for one in weight)]


def _fake_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, *rest
) -> list[Tensor]:  # fmt: skip
    needs_x, *needs, needs_router, needs_router_bias = rest[-1]
    experts = len(weight) * router_weight[0].shape[0]
    return [
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty((experts, x.shape[1]) if needs_router else (0,)),
        x.new_empty(experts if needs_router_bias else 0),
        *fake_gradients(x, needs, weight, lora_a, lora_b),
    ]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, router_weight, _, _, _, token_mask, seed, _, *options = inputs
    s, gates, indices, _, logits, probs, *_ = output
    ctx.count, ctx.options = len(weight), options
    layers = (*weight, *lora_a, *lora_b, *router_weight)
    ctx.save_for_backward(x, *layers, seed, s, gates, indices, logits, probs, token_mask)
    ctx.mark_non_differentiable(s, indices)
    # no zeros for what nobody asks about
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    count, trainable = ctx.count, ctx.options[6]
    x, *saved = ctx.saved_tensors
    layers = [list(saved[at : at + count]) for at in range(0, 4 * count, count)]
    wants_x, *wanted, wants_router, wants_router_bias = ctx.needs_input_grad[:7]
    needs = layer_needs(wanted, trainable)
    # without biases there is no list to tell
    wants_router_bias = wants_router_bias if isinstance(wants_router_bias, list) else []
    needs_routers = [any(wants_router), any(wants_router_bias)]
    _, d_gates, _, d_values, d_logits, d_probs, d_planes, *dy = grads
    tables = (d_gates, d_values, d_logits, d_probs, d_planes)
    dx, drouter, drouter_bias, *rest = lora_mix_routed_shared_backward_op(
        output_gradients(dy, x, layers[0]), *tables, x, *layers, *saved[4 * count :], *ctx.options,
        [wants_x, *needs, *needs_routers], backend=ctx.backend,
    )  # fmt: skip
    found = layer_gradients(rest, wanted, needs)
    for wants, stacked in ((wants_router, drouter), (wants_router_bias, drouter_bias)):
        parts = stacked.chunk(count) if any(wants) else [None] * count
        found.append([part if want else None for want, part in zip(wants, parts, strict=False)])
    return (dx if wants_x else None, *found, *([None] * 13))


def _cost(x, weight, bias, lora_a, lora_b, router_weight, *_rest) -> Cost:
    layers = zip(weight, lora_a, lora_b, router_weight, strict=True)
    costs = [routed_cost(x, one, None, a, b, router) for one, a, b, router in layers]
    again = (len(weight) - 1) * x.numel() * x.element_size()
    return Cost(flops=sum(cost.flops for cost in costs), bytes=sum(cost.bytes for cost in costs) - again)


lora_mix_routed_shared_backward_op = Op(
    name="lora_mix_routed_shared_backward",
    reference=lora_mix_routed_shared_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

lora_mix_routed_shared_op = Op(
    name="lora_mix_routed_shared",
    reference=lora_mix_routed_shared_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("noise",),
    aside=(0,),
    autocast=("x", "weight", "bias", "lora_a", "lora_b", "router_weight", "router_bias"),
)


def _check_routers(op: str, x: Tensor, weight, router_weight, router_bias) -> int:
    """Check the routers of all linears; the number of experts."""
    check_lists(op, weight, (("router_weight", router_weight), ("router_bias", router_bias)))
    for at, (one, bias) in enumerate(zip(router_weight, router_bias or [None] * len(weight), strict=True)):
        check_router(op, x, one, bias, (f"router_weight[{at}]", f"router_bias[{at}]"))
        rows, first = one.shape[0], router_weight[0].shape[0]
        expect(rows == first, op, f"router_weight[{at}]", f"of E = {first} rows like router_weight[0]", rows)
    return router_weight[0].shape[0]


def lora_mix_routed_shared(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    router_bias: Sequence[Tensor | None] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    scaling: float | Sequence[float] = 1.0,
    trainable: Sequence[bool] | None = None,
    dropout: float = 0.0,
    top_k: int | None = None,
    score: str = "softmax",
    temperature: float = 1.0,
    renormalize: bool = False,
    noise: float = 0.0,
    expert_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    straight_through: bool = False,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Routing]]:
    """`lora_mix_routed` of L linears that share x, such as q, k and v of attention, with one pass over x where it can.

    Args:
        x, weight, bias, lora_a, lora_b, ranks, scaling, trainable, dropout: as in `lora_mix_shared`.
        router_weight, router_bias: L routers, `[E, d_in]` and `[E]` or None each, or None for no bias at all.
        top_k to straight_through: as in `route`, the same for every router; noise is drawn for each.
        The routers see x without dropout.

    Returns:
        L tensors y_l `[..., d_out_l]` in x's dtype and L Routings. Differentiable in every floating tensor.

    Raises:
        TypeError, ValueError: as `lora_mix_shared` and `route`, with the place in the list.

    >>> x, weight = torch.randn(2, 3, 8), [torch.randn(5, 8), torch.randn(7, 8)]
    >>> a, b = [torch.randn(4, 8) for _ in range(2)], [torch.randn(5, 4), torch.randn(7, 4)]
    >>> y, routings = lora_mix_routed_shared(x, weight, None, a, b, [torch.randn(2, 8) for _ in range(2)], top_k=1)
    >>> y[1].shape, routings[1].load.sum()
    (torch.Size([2, 3, 7]), tensor(6.))
    """
    op = "lora_mix_routed_shared"
    expect_tensor(op, "x", x)
    check_lists(op, weight, ())
    experts, count, lead = _check_routers(op, x, weight, router_weight, router_bias), len(weight), x.shape[:-1]
    if hasattr(ranks, "__len__"):
        expect(len(ranks) == experts, op, "ranks", f"E = {experts} integers", list(ranks))
    ranks, scaling, trainable, dropout = check_linears(
        op, x, weight, bias, lora_a, lora_b, experts, (ranks, scaling, trainable, dropout)
    )
    _, flat_mask, counted, top_k = check_options(
        op, x, experts, top_k, score, temperature, 0.0, expert_mask, token_mask
    )
    # one row of noise for every router
    wide = x.new_empty(lead.numel() * count, 0)
    drawn, *_ = check_options(op, wide, experts, None, score, temperature, noise, None, None)
    biases, router_biases = all_biases(weight, bias), all_biases(router_weight, router_bias)
    rows, layers = layers_in_one_dtype(x, weight, biases, lora_a, lora_b, router_weight, router_biases)
    _, *found = lora_mix_routed_shared_op(
        rows,
        *layers,
        None if drawn is None else drawn.view(lead.numel(), count * experts),
        flat_mask,
        counted,
        draw_seed(x.device) if dropout > 0.0 else None,
        top_k,
        score,
        float(temperature),
        expect_flag(op, "renormalize", renormalize),
        expect_flag(op, "straight_through", straight_through),
        ranks,
        scaling,
        trainable,
        dropout,
        backend=backend,
    )
    tables = [table.unflatten(1, (count, -1)).unbind(1) for table in found[:6]]
    routings = [wrap_routing(outputs, lead, token_mask) for outputs in zip(*tables, strict=True)]
    return [y.view(*lead, y.shape[1]) for y in found[6:]], routings
