"""The formula of `distillation_loss` in plain PyTorch; runs in float64 and is the truth of every test."""

# T tokens, D width of hidden, V vocabulary, K entries of a cached teacher (K + 1 with the rest as one more)
# hidden_TD, head_weight_VD, head_bias_V, weights_T, counted_T, teacher_TV or teacher_TK with indices_TK, losses_T

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..linear_loss import may_look, wide_dtype, wide_logits

__all__ = ["distillation_loss_reference", "teacher_factors", "with_rest"]

# what the probabilities of a cached teacher may sum to beyond 1: rounding of a cache in half precision
ROUNDING = 0.02


def teacher_factors(
    hidden: Tensor,
    weights: Tensor | None,
    teacher: Tensor,
    indices: Tensor | None,
    counted: Tensor | None,
    entries: int,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Which tokens count, those of weight 0 do not; the factor of each; the indices with 0 where they are none.

    The factor is NaN where a cached teacher is none. On the CPU, and with MLLMCL_DEBUG=1 everywhere, that is an error
    which names the first.
    """
    dtype = wide_dtype(hidden.dtype)
    tokens = hidden.shape[0]
    factor = torch.ones(tokens, dtype=dtype, device=hidden.device) if weights is None else weights.to(dtype)
    if weights is not None:
        counted = factor != 0 if counted is None else counted & (factor != 0)
    if indices is None:
        return counted, factor, None
    outside = (indices < 0) | (indices >= entries)
    twice = torch.sort(indices, -1).values.diff(dim=-1) == 0
    total = teacher.to(dtype).exp().sum(-1)
    wrong = torch.stack((outside.any(-1), twice.any(-1), total > 1.0 + ROUNDING))
    if counted is not None:
        wrong = wrong & counted
    if may_look(hidden.device) and bool(wrong.any()):
        where = int(wrong.any(0).to(torch.uint8).argmax())
        told = (
            f"indices in 0..{entries - 1}, got {indices[where].tolist()}",
            f"distinct indices, got {indices[where].tolist()}",
            "values that are log-probabilities at this temperature, got probabilities that sum to "
            f"{float(total[where]):.4g}",
        )
        kind = int(wrong[:, where].to(torch.uint8).argmax())
        raise ValueError(f"distillation_loss: teacher must have {told[kind]} at position {where}")
    factor = factor.masked_fill(wrong.any(0), float("nan"))
    return counted, factor, torch.where(outside, 0, indices)


def with_rest(log_p: Tensor, entries: int) -> Tensor:
    """Log-probabilities `[T, K + 1]`: those of K entries and what is left for the other V - K together."""
    rest = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat((log_p, (torch.zeros_like(rest) if log_p.shape[-1] == entries else rest).log()), -1)


def _student_with_rest(log_q: Tensor, indices: Tensor) -> Tensor:
    """The same of the student, whose log-probabilities `[T, V]` are all known."""
    chosen = log_q.gather(-1, indices)
    if indices.shape[-1] == log_q.shape[-1]:
        return torch.cat((chosen, torch.full_like(chosen[:, :1], float("-inf"))), -1)
    others = log_q.scatter(-1, indices, float("-inf"))
    return torch.cat((chosen, torch.logsumexp(others, -1, keepdim=True)), -1)


def distillation_loss_reference(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Optional[Tensor],
    weights: Optional[Tensor],
    teacher: Tensor,
    indices: Optional[Tensor],
    counted: Optional[Tensor],
    temperature: float,
    chunk: Optional[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total = sum of weights * losses, losses [T], and the gradients of total that `needs` asks for.

    q = softmax((hidden W^T + b) / temperature);  p = softmax(teacher / temperature), or exp(teacher) on its K indices
    and one more entry, the rest, for the mass of all others, in p as in q
    loss = temperature^2 sum of p (log p - log q), 0 where a token does not count or weighs 0
    dlogits = weight * temperature * (q_v - p_v);  of the rest weight * temperature * q_v (1 - p_rest / q_rest)
    dhidden = dlogits W;  dW = dlogits^T hidden;  db = sum over tokens of dlogits
    """
    logits = wide_logits(hidden, head_weight, head_bias)
    counted, factor, safe = teacher_factors(hidden, weights, teacher, indices, counted, head_weight.shape[0])
    log_q = torch.log_softmax(logits / temperature, -1)
    teacher = teacher.to(logits.dtype)
    if safe is None:
        log_p, log_student = torch.log_softmax(teacher / temperature, -1), log_q
        p = log_p.exp()
        unit = log_q.exp() - p
    else:
        log_p, log_student = with_rest(teacher, head_weight.shape[0]), _student_with_rest(log_q, safe)
        p = log_p.exp()
        # q_v (1 - p_rest / q_rest) without a quotient of small numbers
        of_rest = (log_q - log_student[:, -1:]).exp() * (log_student.exp() - p)[:, -1:]
        unit = of_rest.scatter(-1, safe, (log_student.exp() - p)[:, :-1])
    # nothing is nothing where the logarithms are infinite
    losses = temperature**2 * torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_student)).sum(-1)
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    losses = torch.where(counted, losses, 0.0).masked_fill(counted & factor.isnan(), float("nan"))
    total = (losses * torch.where(counted, factor, 0.0)).sum()
    dlogits = torch.where(counted[:, None], temperature * unit * factor[:, None], 0.0).to(hidden.dtype)
    known = torch.where(counted[:, None], hidden, torch.zeros_like(hidden))
    return (
        total,
        losses,
        dlogits @ head_weight if needs[0] else hidden.new_empty(0),
        dlogits.t() @ known if needs[1] else hidden.new_empty(0),
        dlogits.sum(0) if needs[2] else hidden.new_empty(0),
    )
