"""The formula of `lora_mix` and of its gradient in plain PyTorch; runs in float64 and is the truth of every test."""

# T tokens, K in, N out, E experts, R sum of ranks, G rows of gates (T is a multiple of G)
# x_TK, weight_NK, a_RK, b_NR, gates_GE or ids_G, s_TR = dropout(x) A^T, y_TN

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dropout import drop, keep_mask
from ...layouts import by_columns

__all__ = ["expert_of_rank", "lora_mix_backward_reference", "lora_mix_reference", "rank_gates", "rank_owner"]


def expert_of_rank(ranks: Sequence[int]) -> list[int]:
    """The expert that owns each of the R ranks."""
    return [expert for expert, rank in enumerate(ranks) for _ in range(rank)]


def rank_owner(ranks: Sequence[int], device: torch.device) -> Tensor:
    """The same as an int64 tensor [R]."""
    return torch.tensor(expert_of_rank(ranks), dtype=torch.int64, device=device)


def _scale_R(ranks: Sequence[int], scaling: Sequence[float], like: Tensor) -> Tensor:
    values = [scaling[expert] for expert in expert_of_rank(ranks)]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def rank_gates(
    gates: Tensor | None, ranks: Sequence[int], scaling: Sequence[float], tokens: int, like: Tensor
) -> Tensor:
    """The factor of every rank of every token: [T, R] (or [1, R] without gates), in float32 or better."""
    wide = like.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    scale_R = _scale_R(ranks, scaling, wide)
    if gates is None:
        return scale_R[None]
    owner_R = rank_owner(ranks, like.device)
    if gates.is_floating_point():
        factor_GR = gates.to(wide.dtype).index_select(1, owner_R) * scale_R
    else:
        factor_GR = torch.where(gates[:, None] == owner_R[None], scale_R, torch.zeros_like(scale_R))
    rows = gates.shape[0]
    return factor_GR.repeat_interleave(tokens // rows if rows else 0, dim=0)


def lora_mix_reference(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Optional[Tensor],
    seed: Optional[Tensor],
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + ((drop(x) A^T) * G) B^T and s = drop(x) A^T, which backward needs."""
    s_TR = F.linear(drop(x, seed, dropout), lora_a)
    factor = rank_gates(gates, ranks, scaling, x.shape[0], x)
    mixed_TR = (s_TR * factor).to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(mixed_TR, lora_b), s_TR


def lora_mix_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Optional[Tensor],
    seed: Optional[Tensor],
    s: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    trainable: Sequence[bool],
    dropout: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, lora_a, lora_b, gates; an empty tensor where `needs` says no.

    u = dy B;  ds = u * G;  dx = dy W + drop'(ds A);  dA = ds^T drop(x);  dB = dy^T (s * G);
    dG_e = scaling_e * sum over the ranks of e of u * s, summed over the tokens that share the gate.
    Rows of dA and columns of dB that belong to a frozen expert are zero.
    """
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    tokens = x.shape[0]
    factor = rank_gates(gates, ranks, scaling, tokens, x)
    u_TR = F.linear(dy, lora_b.t())
    ds_TR = (u_TR * factor).to(x.dtype)
    trains = [trainable[expert] for expert in expert_of_rank(ranks)]
    trains_R = torch.tensor(trains, dtype=torch.bool, device=x.device)
    empty = x.new_empty(0)
    dx = dweight = dbias = da = db = dgates = empty
    if needs_x:
        through_lora = ds_TR @ lora_a
        if dropout > 0.0:
            keep = keep_mask(seed, tokens, x.shape[1], dropout)
            through_lora = torch.where(keep, through_lora * (1.0 / (1.0 - dropout)), torch.zeros_like(through_lora))
        dx = dy @ weight + through_lora
    if needs_weight:
        dweight = dy.t() @ x
    if needs_bias:
        dbias = dy.sum(0)
    if needs_a:
        da = (ds_TR.t() @ drop(x, seed, dropout)) * trains_R[:, None]
    if needs_b:
        db = (dy.t() @ (s * factor).to(x.dtype)) * trains_R[None]
        db = db.t().contiguous().t() if by_columns(lora_b) else db.contiguous()
    if needs_gates:
        dgates = _gate_gradient(u_TR, s, gates, ranks, scaling)
    return dx, dweight, dbias, da, db, dgates


def _gate_gradient(u: Tensor, s: Tensor, gates: Tensor, ranks: Sequence[int], scaling: Sequence[float]) -> Tensor:
    rows, experts = gates.shape
    product_TR = u.to(gates.dtype) * s.to(gates.dtype) * _scale_R(ranks, scaling, gates)
    per_expert_TE = torch.zeros(u.shape[0], experts, dtype=gates.dtype, device=u.device)
    per_expert_TE.index_add_(1, rank_owner(ranks, u.device), product_TR)
    return per_expert_TE.view(rows, u.shape[0] // max(rows, 1), experts).sum(1)
