"""`lora_mix_routed_shared` in Triton: ranks and routers of all linears are columns of one pass over x.

That pass leaves float32 planes; a kernel over them makes the gates of all routers, another s and s * G. With dropout,
which routers do not see, and with cosine scores, which need norms, each router reads x for itself. Backward: one pass
over each dy in rank space, one kernel for the gradient of all logits, then the products with [ds | dlogits] as one.
"""

# T tokens, K in, N out, L linears, E experts and R ranks of each

from __future__ import annotations

import torch

from ...triton_expand import add_product
from ...triton_tools import Gating, dtype_reason
from ..lora_mix.triton import input_gradient, mix_ranks, shrink_planes, trainable_runs
from ..lora_mix_routed.triton import merged_weights
from ..lora_mix_shared.reference import cut
from ..lora_mix_shared.triton import (
    add_mixed,
    layer_gradients,
    lora_mix_shared_triton,
    rank_gradients_of_all,
    stacked_gradient,
    sum_of_base,
)
from ..route.reference import logits_backward
from ..route.triton import MOST_EXPERTS, gates_from_logits_triton, logits_gradient_triton, route_triton
from . import lora_mix_routed_shared_backward_op, lora_mix_routed_shared_op
from .tables import routed_in_turn

__all__: list[str] = []


def _supports(x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, *_rest) -> str | None:
    if router_weight[0].shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {router_weight[0].shape[0]}"
    if noise is not None and noise.dtype == torch.float64:
        return "triton takes noise in float32, got torch.float64"
    return dtype_reason(x, *weight, *bias, *lora_a, *lora_b, *router_weight, *router_bias)


@lora_mix_routed_shared_op.provider("triton", supports=_supports)
def lora_mix_routed_shared_triton(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed, top_k,
    score, temperature, renormalize, straight_through, ranks, scaling, trainable, dropout,
):  # fmt: skip
    count, tokens = len(weight), x.shape[0]
    if score == "cosine" or dropout > 0.0:
        options = (expert_mask, token_mask, top_k, score, temperature, renormalize, straight_through)
        routing = routed_in_turn(route_triton, x, router_weight, router_bias, noise, *options)
        mix = (x, weight, bias, lora_a, lora_b, routing[0], seed, ranks, scaling, trainable, dropout)
        s, *found = lora_mix_shared_triton(*mix)
        return [s, *routing, *found]
    total = count * lora_a[0].shape[0]
    planes = shrink_planes(x, torch.cat([*lora_a, *router_weight]))
    logits = planes[:, :, total:].sum(0)
    if router_bias:
        logits += torch.cat(router_bias)
    choice = (noise, expert_mask, token_mask, top_k, score, renormalize, straight_through)
    routing = gates_from_logits_triton(logits / temperature, *choice, count)
    s, mixed = x.new_empty(tokens, total), x.new_empty(tokens, total)
    mix_ranks(planes, s, mixed, planes.shape[0], Gating.of(routing[0], ranks * count, scaling * count, x))
    return [s, *routing, *add_mixed(x, weight, bias, mixed, lora_b)]


def _supports_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates, *_rest
) -> str | None:
    if router_weight[0].shape[0] > MOST_EXPERTS:
        return f"triton routes to at most {MOST_EXPERTS} experts, got {router_weight[0].shape[0]}"
    reason = dtype_reason(d_gates, d_values, d_logits, d_probs, d_planes, gates)
    return reason or dtype_reason(*dy, x, *weight, *lora_a, *lora_b, *router_weight, s)


@lora_mix_routed_shared_backward_op.provider("triton", supports=_supports_backward)
def lora_mix_routed_shared_backward_triton(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates,
    indices, logits, probs, token_mask, score, temperature, renormalize, straight_through, ranks, scaling, trainable,
    dropout, needs,
):  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_router, needs_router_bias = needs
    count, total, experts = len(weight), s.shape[1], gates.shape[1]
    in_one = dropout == 0.0 and score != "cosine"
    # [ds | dlogits] of all linears is one tensor, so that dx takes one product, and the weights another
    extended = x.new_empty(x.shape[0], total + experts)
    ds = extended[:, :total]
    mixed, through_mix = rank_gradients_of_all(dy, lora_b, s, ds, gates, ranks, scaling, needs_b, True)
    tables = (d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask)
    options = (score, temperature, renormalize, straight_through)
    dl = logits_gradient_triton(*tables, *options, count, more=through_mix)
    dx, da, drouter = (x.new_empty(0) for _ in range(3))
    if in_one:
        extended[:, total:] = dl
        rows = torch.cat([*lora_a, *router_weight]).t()
        if needs_x:
            dx = sum_of_base(add_product(dy[0], weight[0].t(), None, extended, rows), dy[1:], weight[1:])
        runs = trainable_runs(ranks * count, trainable * count)
        da, drouter = merged_weights(extended, x, runs, total, needs_a, needs_router)
    else:
        stacked = torch.cat(lora_a)
        if needs_x:
            dx = sum_of_base(input_gradient(dy[0], weight[0], ds, stacked, seed, dropout), dy[1:], weight[1:])
        each = zip(cut(dl, count), router_weight, strict=True)
        pairs = [logits_backward(one, x, router, score, needs_x, needs_router) for one, router in each]
        for through_router, _ in pairs if needs_x else ():
            dx += through_router
        drouter = torch.cat([one for _, one in pairs]) if needs_router else drouter
        da = stacked_gradient(x, ds, stacked, seed, ranks, trainable, dropout, count) if needs_a else da
    drouter_bias = dl.sum(0).to(x.dtype) if needs_router_bias else x.new_empty(0)
    rest = layer_gradients(dy, x, mixed, lora_b, ranks, trainable, needs_weight, needs_bias, needs_b)
    return [dx, drouter, drouter_bias, da, *rest]
