"""The formula of `lora_mix_routed_shared`: `lora_mix_routed` of each linear, the gradients of x added up."""

# T tokens, K in, N out, L linears, E experts, R ranks and k chosen experts of each

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..lora_mix_routed.reference import lora_mix_routed_backward_reference, lora_mix_routed_reference
from ..lora_mix_shared.reference import cut

__all__ = ["lora_mix_routed_shared_backward_reference", "lora_mix_routed_shared_reference"]


def lora_mix_routed_shared_reference(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    router_bias: Sequence[Tensor],
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
) -> list[Tensor]:
    """s [T, L * R]; gates, indices, values, logits, probs, planes of all routers side by side; then y [T, N] of each.

    The tables are [T, L * E] or [T, L * k], the planes [P, L * (3 E + 3)]; noise is [T, L * E]; `bias` and
    `router_bias` may be empty.
    """
    none, choice = [None] * len(weight), (top_k, score, temperature, renormalize, straight_through)
    layers = zip(weight, bias or none, lora_a, lora_b, router_weight, router_bias or none, strict=True)
    found = [
        lora_mix_routed_reference(
            x, *layer, noise_TE, expert_mask, token_mask, seed, *choice, ranks, scaling, trainable, dropout
        )
        for layer, noise_TE in zip(layers, cut(noise, len(weight)), strict=True)
    ]  # fmt: skip
    y, *rest = zip(*found, strict=True)
    return [*(torch.cat(kind, 1) for kind in rest), *y]


def lora_mix_routed_shared_backward_reference(
    dy: Sequence[Tensor],
    d_gates: Optional[Tensor],
    d_values: Optional[Tensor],
    d_logits: Optional[Tensor],
    d_probs: Optional[Tensor],
    d_planes: Optional[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    router_weight: Sequence[Tensor],
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
) -> list[Tensor]:
    """Gradients of x; of all routers, their biases and all A stacked; then each linear's weight, bias, B.

    Shapes [T, K], [L * E, K], [L * E], [L * R, K]; empty where `needs` (x, weight, bias, lora_a, lora_b, router_weight,
    router_bias) says no.
    """
    count, choice = len(weight), (score, temperature, renormalize, straight_through)
    by_linear = [cut(one, count) for one in (d_gates, d_values, d_logits, d_probs, d_planes)]
    saved = [cut(one, count) for one in (s, gates, indices, logits, probs)]
    found = [
        lora_mix_routed_backward_reference(
            d, *grads, x, *layer, seed, *kept, token_mask, *choice, ranks, scaling, trainable, dropout, needs
        )
        for d, grads, layer, kept in zip(
            dy, zip(*by_linear, strict=True), zip(weight, lora_a, lora_b, router_weight, strict=True),
            zip(*saved, strict=True), strict=True,
        )
    ]  # fmt: skip
    dx, dweight, dbias, da, db, drouter, drouter_bias = zip(*found, strict=True)
    dx_TK = sum(dx[1:], start=dx[0]) if needs[0] else x.new_empty(0)
    return [dx_TK, torch.cat(drouter), torch.cat(drouter_bias), torch.cat(da), *dweight, *dbias, *db]
