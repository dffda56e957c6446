"""The formula of `route` and of its gradient in plain PyTorch; runs in float64 and is the truth of every test."""

# T tokens, D in, E experts, k chosen experts, M rows of the expert mask (1 or T), P planes
# x_TD, weight_ED, logits_TE, probs_TE, gates_TE, indices_Tk, values_Tk, token_mask_T

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..routing_planes.reference import routing_planes_backward_reference, routing_planes_reference

__all__ = ["added", "route_backward_reference", "route_reference", "select_experts"]

# added to the norm of a row by the cosine score, so that a zero row has a direction
COSINE_EPSILON = 1e-12


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = rows.norm(dim=-1, keepdim=True).clamp_min(COSINE_EPSILON)
    return rows / norm, norm


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, score: str, temperature: float) -> Tensor:
    x_TD, weight_ED = _wide(x), _wide(weight)
    if score == "cosine":
        x_TD, weight_ED = _unit(x_TD)[0], _unit(weight_ED)[0]
    logits = x_TD @ weight_ED.t()
    if bias is not None:
        logits = logits + _wide(bias)
    return logits / temperature


def scores_of(logits: Tensor, allowed: Tensor, score: str) -> Tensor:
    """Probabilities [T, E]: softmax over the allowed experts, or their sigmoids; zero off them, NaN in a broken row."""
    if score == "sigmoid":
        probs = torch.sigmoid(logits)
        broken = (~torch.isfinite(logits) & allowed).any(-1, keepdim=True)
        probs = torch.where(broken, torch.full_like(probs, float("nan")), probs)
    else:
        masked = logits.masked_fill(~allowed, float("-inf"))
        probs = torch.softmax(masked, -1)
    return torch.where(allowed, probs, torch.zeros_like(probs))


def select_experts(probs: Tensor, ranking: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """The k best allowed experts of each row [T, k] int64: distinct, ties to the lowest index, -1 where none is left.

    A row with a NaN probability takes its lowest allowed experts.
    """
    experts = probs.shape[-1]
    order = -torch.arange(experts, dtype=ranking.dtype, device=probs.device)
    broken = torch.isnan(probs).any(-1, keepdim=True)
    key = torch.where(broken, order, ranking)
    # a stable descending sort with forbidden experts moved behind all others
    sorted_by_key = torch.sort(torch.nan_to_num(key), dim=-1, descending=True, stable=True).indices
    behind = (~allowed.gather(-1, sorted_by_key)).to(torch.uint8)
    position = torch.sort(behind, dim=-1, stable=True).indices
    best = sorted_by_key.gather(-1, position)[:, :top_k]
    return torch.where(allowed.gather(-1, best), best, torch.full_like(best, -1))


def _chosen(indices: Tensor, experts: int) -> Tensor:
    """bool [T, E] from indices [T, k] with -1 for none."""
    chosen = torch.zeros(indices.shape[0], experts + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(1, torch.where(indices < 0, experts, indices).to(torch.int64), True)
    return chosen[:, :experts]


def _allowed(expert_mask: Tensor | None, logits: Tensor) -> Tensor:
    if expert_mask is None:
        return torch.ones_like(logits, dtype=torch.bool)
    return expert_mask.expand(logits.shape)


def gates_of(
    logits: Tensor, noise: Tensor | None, expert_mask: Tensor | None, top_k: int, score: str, renormalize: bool,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gates, indices, values, probs from the logits."""
    allowed = _allowed(expert_mask, logits)
    noisy = logits if noise is None else logits + noise.to(logits.dtype)
    probs = scores_of(noisy, allowed, score)
    indices = select_experts(probs, noisy, allowed, top_k)
    chosen = _chosen(indices, logits.shape[-1])
    gates = torch.where(chosen, torch.ones_like(probs) if straight_through else probs, torch.zeros_like(probs))
    if straight_through:
        # a row without numbers stays without numbers
        gates = torch.where(chosen & torch.isnan(probs), probs, gates)
    if renormalize:
        total = gates.sum(-1, keepdim=True)
        gates = torch.where(chosen, gates / total, torch.zeros_like(gates))
    values = gates.gather(-1, indices.clamp_min(0))
    values = torch.where(indices < 0, torch.zeros_like(values), values)
    return gates, indices.to(torch.int32), values, probs


def route_reference(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    noise: Optional[Tensor],
    expert_mask: Optional[Tensor],
    token_mask: Optional[Tensor],
    top_k: int,
    score: str,
    temperature: float,
    renormalize: bool,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gates [T, E], indices [T, k] int32, values [T, k], logits [T, E], probs [T, E] and planes [P, 3 E + 3].

    All in float32 or better; the planes are those of `routing_planes`.
    """
    logits = _logits(x, weight, bias, score, temperature)
    gates, indices, values, probs = gates_of(logits, noise, expert_mask, top_k, score, renormalize, straight_through)
    planes = routing_planes_reference(logits, probs, gates, indices, token_mask)
    return gates, indices, values, logits, probs, planes


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients of the same tensor, None where neither came."""
    return other if one is None else one if other is None else one + other


def logits_gradient(
    d_gates: Tensor | None, d_values: Tensor | None, d_logits: Tensor | None, d_probs: Tensor | None,
    d_planes: Tensor | None, gates: Tensor, indices: Tensor, logits: Tensor, probs: Tensor, token_mask: Tensor | None,
    score: str, renormalize: bool, straight_through: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the logits [T, E] from those of the outputs, None for what did not come.

    With h the gradient of gates and values together: a kept gate p passes h; a renormalised gate p / sum passes
    (h - sum(h * gate)) / sum of the kept p; a straight-through gate passes h to every p as if the gate were soft.
    Softmax then gives p * (d - sum(p * d)), sigmoid p * (1 - p) * d.
    """
    if d_planes is not None:
        sums = routing_planes_backward_reference(d_planes, logits, probs, token_mask)
        d_logits, d_probs, d_gates = map(added, (d_logits, d_probs, d_gates), sums)
    experts = gates.shape[-1]
    chosen = _chosen(indices, experts)
    h = torch.zeros_like(gates) if d_gates is None else d_gates
    if d_values is not None:
        spread = torch.zeros(gates.shape[0], experts + 1, dtype=gates.dtype, device=gates.device)
        spread.scatter_add_(1, torch.where(indices < 0, experts, indices).to(torch.int64), d_values)
        h = h + spread[:, :experts]
    zero = torch.zeros_like(h)
    if straight_through:
        d = h
    elif renormalize:
        total = torch.where(chosen, probs, zero).sum(-1, keepdim=True)
        d = torch.where(chosen, (h - torch.where(chosen, h * gates, zero).sum(-1, keepdim=True)) / total, zero)
    else:
        d = torch.where(chosen, h, zero)
    d = added(d, d_probs)
    if score == "sigmoid":
        through = probs * (1.0 - probs) * d
    else:
        through = probs * (d - (probs * d).sum(-1, keepdim=True))
    return added(through, d_logits)


def route_backward_reference(
    d_gates: Optional[Tensor],
    d_values: Optional[Tensor],
    d_logits: Optional[Tensor],
    d_probs: Optional[Tensor],
    d_planes: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    indices: Tensor,
    logits: Tensor,
    probs: Tensor,
    token_mask: Optional[Tensor],
    score: str,
    temperature: float,
    renormalize: bool,
    straight_through: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias in x's dtype, zero from what is None; an empty tensor where `needs` says no."""
    tables = (d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask)
    dl = logits_gradient(*tables, score, renormalize, straight_through)
    dl = dl / temperature
    dx, dweight = logits_backward(dl, x, weight, score, needs[0], needs[1])
    dbias = dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
    return dx, dweight, dbias


def logits_backward(
    dl: Tensor, x: Tensor, weight: Tensor, score: str, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Through x W^T, or through the product of the unit rows for the cosine score."""
    x_TD, weight_ED = _wide(x), _wide(weight)
    if score == "cosine":
        (x_TD, x_norm), (weight_ED, weight_norm) = _unit(x_TD), _unit(weight_ED)
    dx = dweight = x.new_empty(0)
    if needs_x:
        dx = dl @ weight_ED
        if score == "cosine":
            dx = (dx - x_TD * (x_TD * dx).sum(-1, keepdim=True)) / x_norm
        dx = dx.to(x.dtype)
    if needs_weight:
        dweight = dl.t() @ x_TD
        if score == "cosine":
            dweight = (dweight - weight_ED * (weight_ED * dweight).sum(-1, keepdim=True)) / weight_norm
        dweight = dweight.to(x.dtype)
    return dx, dweight
