"""`lora_mix_routed` on the CPU: the router is E more rows of A, so that one product reads x."""

from __future__ import annotations

import torch
from torch import Tensor

from ...products import add_product_nt, product_nt
from ..lora_mix.cpp import OPS as RANK_OPS
from ..lora_mix.cpp import (
    by_rank,
    float_path,
    lora_gradients,
    lora_mix_backward_cpp,
    lora_mix_cpp,
    mixed_ranks,
    rank_tables,
)
from ..route.cpp import gates_from_logits, logits_gradient, route_backward_cpp, route_cpp
from ..route.reference import added
from . import lora_mix_routed_backward_op, lora_mix_routed_op

__all__ = ["joined_gradients", "one_product"]


def one_product(x: Tensor, score: str, dropout: float) -> bool:
    """Whether router and experts see the same x in the same precision."""
    return x.dtype == torch.float32 and score != "cosine" and dropout == 0.0


def _supports(x, weight, bias, lora_a, lora_b, router_weight, router_bias, *_rest) -> str | None:
    return float_path(x, weight, bias, lora_a, lora_b, router_weight, router_bias)


def _supports_backward(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, *_rest
) -> str | None:  # fmt: skip
    return float_path(dy, x, weight, lora_a, lora_b)


@lora_mix_routed_op.provider("cpp", supports=_supports)
def lora_mix_routed_cpp(
    x, weight, bias, lora_a, lora_b, router_weight, router_bias, noise, expert_mask, token_mask, seed, top_k,
    score, temperature, renormalize, straight_through, ranks, scaling, trainable, dropout,
):  # fmt: skip
    masks = (noise, expert_mask, token_mask)
    if not one_product(x, score, dropout):
        choice = (*masks, top_k, score, temperature, renormalize, straight_through)
        routing = route_cpp(x, router_weight, router_bias, *choice)
        y, s = lora_mix_cpp(x, weight, bias, lora_a, lora_b, routing[0], seed, ranks, scaling, trainable, dropout)
        return y, s, *routing
    x = x.contiguous()
    both = product_nt(x, torch.cat([lora_a, router_weight]))
    rank = lora_a.shape[0]
    s, logits = both[:, :rank].contiguous(), both[:, rank:]
    if router_bias is not None:
        logits = logits + router_bias
    logits = (logits / temperature).contiguous()
    routing = gates_from_logits(logits, *masks, top_k, score, renormalize, straight_through)
    y = product_nt(x, weight, bias)
    add_product_nt(y, mixed_ranks(s, routing[0], ranks, scaling), lora_b)
    return y, s, *routing


@lora_mix_routed_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_routed_backward_cpp(
    dy, d_gates, d_values, d_logits, d_probs, d_planes, x, weight, lora_a, lora_b, router_weight, seed, s, gates,
    indices, logits, probs, token_mask, score, temperature, renormalize, straight_through, ranks, scaling, trainable,
    dropout, needs,
):  # fmt: skip
    options = (score, temperature, renormalize, straight_through)
    others, saved = (d_values, d_logits, d_probs, d_planes), (gates, indices, logits, probs, token_mask)
    if not one_product(x, score, dropout):
        dx, dweight, dbias, da, db, through = lora_mix_backward_cpp(
            dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, [*needs[:5], True]
        )
        dx_router, drouter, drouter_bias = route_backward_cpp(
            added(d_gates, through), *others, x, router_weight, *saved, *options, [needs[0], needs[5], needs[6]]
        )  # fmt: skip
        return dx.add_(dx_router) if needs[0] else dx, dweight, dbias, da, db, drouter, drouter_bias
    dy, x = dy.contiguous(), x.contiguous()
    empty = x.new_empty(0)
    u, rank, experts = product_nt(dy, lora_b.t()), lora_a.shape[0], router_weight.shape[0]
    # [ds | dl] is one tensor, so that dx takes one product, and dA and dW_r another
    extended = u.new_empty(u.shape[0], rank + experts)
    mixed, through = torch.empty_like(u), torch.empty_like(gates)
    tables = rank_tables(ranks, scaling)
    RANK_OPS.rank_gate_backward(u, s.contiguous(), gates.contiguous(), *tables, extended[:, :rank], mixed, through)
    dl = logits_gradient(added(d_gates, through), *others, *saved, *options)
    extended[:, rank:] = dl
    dx = dweight = dbias = empty
    if needs[0]:
        dx = product_nt(dy, weight.t())
        add_product_nt(dx, extended, torch.cat([lora_a, router_weight]).t())
    if needs[1]:
        dweight = product_nt(dy.t(), x.t())
    if needs[2]:
        dbias = dy.sum(0)
    da, drouter = joined_gradients(extended, x, ranks, trainable, needs[3], needs[5])
    _, db = lora_gradients(dy, x, mixed, mixed, lora_b, ranks, trainable, False, needs[4])
    return dx, dweight, dbias, da, db, drouter, dl.sum(0) if needs[6] else empty


def joined_gradients(
    extended: Tensor, x: Tensor, ranks, trainable, needs_a: bool, needs_router: bool
) -> tuple[Tensor, Tensor]:
    """dA and dW_r from [ds | dl]^T x; zero in dA where an expert does not train."""
    rank = sum(ranks)
    if needs_a and needs_router:
        both = by_rank(extended, x, [*ranks, extended.shape[1] - rank], [*trainable, True])
        return both[:rank], both[rank:].clone()
    da = by_rank(extended[:, :rank], x, ranks, trainable) if needs_a else x.new_empty(0)
    return da, product_nt(extended[:, rank:].t(), x.t()) if needs_router else x.new_empty(0)
