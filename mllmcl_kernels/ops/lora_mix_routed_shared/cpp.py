"""`lora_mix_routed_shared` on the CPU: ranks and routers of all linears are rows of one product over x."""

from __future__ import annotations

import torch

from ...products import product_nt
from ..lora_mix.cpp import float_path, mixed_ranks
from ..lora_mix_routed.cpp import joined_gradients, one_product
from ..lora_mix_shared.cpp import (
    add_mixed,
    input_gradient,
    layer_gradients,
    lora_mix_shared_cpp,
    rank_gradients,
    stacked_gradient,
)
from ..lora_mix_shared.reference import cut
from ..route.cpp import gates_from_logits, logits_gradient, product_gradient, route_cpp
from ..route.reference import added
from . import lora_mix_routed_shared_backward_op, lora_mix_routed_shared_op
from .tables import routed_in_turn

__all__: list[str] = []


def _supports(x, weight, bias, lora_a, lora_b, router_weight, router_bias, *_rest) -> str | None:
    return float_path(x, *weight, *bias, *lora_a, *lora_b, *router_weight, *router_bias)


def _supports_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, *_rest
) -> str | None:  # fmt: skip
    return float_path(*dy, x, *weight, *lora_a, *lora_b)


@lora_mix_routed_shared_op.provider("cpp", supports=_supports)
def lora_mix_routed_shared_cpp(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed, top_k,
    score, temperature, renormalize, straight_through, ranks, scaling, trainable, dropout,
):  # fmt: skip
    count = len(weight)
    if not one_product(x, score, dropout):
        options = (expert_mask, token_mask, top_k, score, temperature, renormalize, straight_through)
        routing = routed_in_turn(route_cpp, x, router_weight, router_bias, noise, *options)
        mix = (x, weight, bias, lora_a, lora_b, routing[0], seed, ranks, scaling, trainable, dropout)
        s, *found = lora_mix_shared_cpp(*mix)
        return [s, *routing, *found]
    x = x.contiguous()
    both = product_nt(x, torch.cat([*lora_a, *router_weight]))
    total = count * lora_a[0].shape[0]
    s, logits = both[:, :total].contiguous(), both[:, total:]
    if router_bias:
        logits = logits + torch.cat(router_bias)
    logits = (logits / temperature).contiguous()
    choice = (noise, expert_mask, token_mask, top_k, score, renormalize, straight_through)
    routing = gates_from_logits(logits, *choice, count)
    mixed = mixed_ranks(s, routing[0], ranks * count, scaling * count)
    return [s, *routing, *add_mixed(x, weight, bias, mixed, lora_b, 1.0)]


@lora_mix_routed_shared_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_routed_shared_backward_cpp(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates,
    indices, logits, probs, token_mask, score, temperature, renormalize, straight_through, ranks, scaling, trainable,
    dropout, needs,
):  # fmt: skip
    needs_x, *needs_layers, needs_router, needs_router_bias = needs
    count, total, needs_a = len(weight), s.shape[1], needs_layers[2]
    dy, x = [one.contiguous() for one in dy], x.contiguous()
    # [ds | dl] is one tensor, so that dx takes one product, and all A and routers another
    extended = s.new_empty(s.shape[0], total + gates.shape[1])
    ds = extended[:, :total]
    mixed, through = rank_gradients(dy, lora_b, s, gates, ranks, scaling, True, ds)
    tables = (added(d_gates, through), d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask)
    dl = logits_gradient(*tables, score, temperature, renormalize, straight_through, count)
    dx, da, drouter = (x.new_empty(0) for _ in range(3))
    if one_product(x, score, dropout):
        extended[:, total:] = dl
        if needs_x:
            dx = input_gradient(dy, weight, extended, torch.cat([*lora_a, *router_weight]), None, 0.0)
        da, drouter = joined_gradients(extended, x, ranks * count, trainable * count, needs_a, needs_router)
    else:
        dx = input_gradient(dy, weight, ds.contiguous(), torch.cat(lora_a), seed, dropout) if needs_x else dx
        da = stacked_gradient(ds, x, seed, ranks, trainable, dropout) if needs_a else da
        each = zip(cut(dl, count), router_weight, strict=True)
        pairs = [product_gradient(one, x, router, score, needs_x, needs_router) for one, router in each]
        for through_router, _ in pairs if needs_x else ():
            dx.add_(through_router)
        drouter = torch.cat([drouter for _, drouter in pairs]) if needs_router else drouter
    drouter_bias = dl.sum(0).to(x.dtype) if needs_router_bias else x.new_empty(0)
    return [dx, drouter, drouter_bias, da, *layer_gradients(dy, x, mixed, lora_b, ranks, trainable, needs_layers)]
