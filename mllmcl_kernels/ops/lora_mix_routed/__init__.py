"""`lora_mix_routed`: router, gates and expert mixing in one pass over x, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_flag
from ...dropout import draw_seed
from ...op import Cost, Op
from ..lora_mix import _cost as mix_cost
from ..lora_mix import check_call, in_one_dtype
from ..route import Routing, check_options, check_router, fake_routing, table_bytes, wrap_routing
from .reference import lora_mix_routed_backward_reference, lora_mix_routed_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["lora_mix_routed", "lora_mix_routed_backward_op", "lora_mix_routed_op"]


def _fake(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed, top_k, *_options
):  # fmt: skip
    y, s = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])
    return y, s, *fake_routing(x, router_weight.shape[0], top_k)


def _fake_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, *rest
):  # fmt: skip
    needs = rest[-1]
    like = (x, weight, weight[:, 0], lora_a, lora_b, router_weight, router_weight[:, 0])
    outputs = [x.new_empty(tensor.shape if need else (0,)) for need, tensor in zip(needs, like, strict=True)]
    if needs[4]:
        outputs[4] = torch.empty_like(lora_b, dtype=x.dtype)
    return tuple(outputs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, router_weight, _, _, _, token_mask, seed, _, *options = inputs
    _, s, gates, indices, _, logits, probs, _ = output
    layer = (x, weight, lora_a, lora_b, router_weight)
    ctx.save_for_backward(*layer, seed, s, gates, indices, logits, probs, token_mask)
    ctx.mark_non_differentiable(s, indices)
    # no zeros for what nobody asks about
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx, dy, _ds, d_gates, _d_indices, *d_tables):
    trainable = ctx.options[6]
    # asked for once, since checkpointing gives them once
    saved = ctx.saved_tensors
    x, weight, *_ = saved
    dy = x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else dy
    needs = list(ctx.needs_input_grad[:7])
    needs[3] = needs[3] and any(trainable)
    needs[4] = needs[4] and any(trainable)
    grads = lora_mix_routed_backward_op(dy, d_gates, *d_tables, *saved, *ctx.options, needs, backend=ctx.backend)
    return (*(grad if need else None for need, grad in zip(needs, grads, strict=True)), *([None] * 13))


def _cost(x, weight, bias, lora_a, lora_b, router_weight, *_rest) -> Cost:
    mix = mix_cost(x, weight, bias, lora_a, lora_b, None)
    tokens, experts = x.shape[0], router_weight.shape[0]
    return Cost(flops=mix.flops + 2 * tokens * x.shape[1] * experts, bytes=mix.bytes + table_bytes(tokens, experts))


lora_mix_routed_backward_op = Op(
    name="lora_mix_routed_backward",
    reference=lora_mix_routed_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

lora_mix_routed_op = Op(
    name="lora_mix_routed",
    reference=lora_mix_routed_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("noise",),
    aside=(1,),
    autocast=("x", "weight", "bias", "lora_a", "lora_b", "router_weight", "router_bias"),
)


def lora_mix_routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
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
) -> tuple[Tensor, Routing]:
    """`route` then `lora_mix`, the same numbers, with one pass over x where the provider can.

    Args:
        x, weight, bias, lora_a, lora_b, ranks, scaling, trainable, dropout: as in `lora_mix`.
        router_weight, router_bias: `[E, d_in]` and `[E]` or None; top_k to straight_through: as in `route`.
        The router sees x without dropout.

    Returns:
        y `[..., d_out]` in x's dtype and the Routing. Differentiable in every floating tensor.

    Raises:
        TypeError, ValueError: as `lora_mix` and `route`.

    >>> x, w = torch.randn(2, 3, 8), torch.randn(5, 8)
    >>> a, b, r = torch.randn(4, 8), torch.randn(5, 4), torch.randn(2, 8)
    >>> y, routing = lora_mix_routed(x, w, None, a, b, r, top_k=1)
    >>> y.shape, routing.load.sum()
    (torch.Size([2, 3, 5]), tensor(6.))
    """
    op = "lora_mix_routed"
    check_router(op, x, router_weight, router_bias, ("router_weight", "router_bias"))
    experts = router_weight.shape[0]
    if hasattr(ranks, "__len__"):
        expect(len(ranks) == experts, op, "ranks", f"E = {experts} integers", list(ranks))
    ranks, scaling, trainable, dropout = check_call(
        op, x, weight, bias, lora_a, lora_b, experts, ranks, scaling, trainable, dropout
    )
    drawn, flat_mask, counted, top_k = check_options(
        op, x, experts, top_k, score, temperature, noise, expert_mask, token_mask
    )
    y, _, *routing = lora_mix_routed_op(
        *in_one_dtype(x, weight, bias, lora_a, lora_b, router_weight, router_bias),
        drawn,
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
    return y.view(*x.shape[:-1], weight.shape[0]), wrap_routing(routing, x.shape[:-1], token_mask)
