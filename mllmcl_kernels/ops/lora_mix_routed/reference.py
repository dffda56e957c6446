"""The formula of `lora_mix_routed`: `route`, then `lora_mix`."""

# T tokens, K in, N out, E experts, R sum of ranks, k chosen experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from ..lora_mix.reference import lora_mix_backward_reference, lora_mix_reference
from ..route.reference import added, route_backward_reference, route_reference

__all__ = ["lora_mix_routed_backward_reference", "lora_mix_routed_reference"]


def lora_mix_routed_reference(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    router_weight: Tensor,
    router_bias: Optional[Tensor],
    noise: Optional[Tensor],
    expert_mask: Optional[Tensor],
    token_mask: Optional[Tensor],
    seed: Optional[Tensor],
    top_k: int,
    score: str,
    temperature: float,
    renormalize: bool,
    straight_through: bool,
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, N], s [T, R], and gates, indices, values, logits, probs, planes of the router."""
    choice = (noise, expert_mask, token_mask, top_k, score, temperature, renormalize, straight_through)
    routing = route_reference(x, router_weight, router_bias, *choice)
    y, s = lora_mix_reference(x, weight, bias, lora_a, lora_b, routing[0], seed, ranks, scaling, trainable, dropout)
    return y, s, *routing


def lora_mix_routed_backward_reference(
    dy: Tensor,
    d_gates: Optional[Tensor],
    d_values: Optional[Tensor],
    d_logits: Optional[Tensor],
    d_probs: Optional[Tensor],
    d_planes: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router_weight: Tensor,
    seed: Optional[Tensor],
    s: Tensor,
    gates: Tensor,
    indices: Tensor,
    logits: Tensor,
    probs: Tensor,
    token_mask: Optional[Tensor],
    score: str,
    temperature: float,
    renormalize: bool,
    straight_through: bool,
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, lora_a, lora_b, router_weight, router_bias; empty where `needs` says no."""
    dx, dweight, dbias, da, db, through_mix = lora_mix_backward_reference(
        dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, [*needs[:5], True]
    )
    dx_router, drouter, drouter_bias = route_backward_reference(
        added(d_gates, through_mix), d_values, d_logits, d_probs, d_planes, x, router_weight, gates, indices, logits,
        probs, token_mask, score, temperature, renormalize, straight_through, [needs[0], needs[5], needs[6]],
    )  # fmt: skip
    if needs[0]:
        dx = dx + dx_router
    return dx, dweight, dbias, da, db, drouter, drouter_bias
