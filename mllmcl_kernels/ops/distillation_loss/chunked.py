"""`distillation_loss` in plain torch, a chunk of the student's logits at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..linear_loss import linear_loss, write_gradient
from . import distillation_loss_op
from .reference import teacher_factors, with_rest

__all__ = ["distillation_loss_chunked"]


def _full_rows(logits: Tensor, factor: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Tensor:
    """Losses `[C]` against all logits of the teacher `[C, V]`."""
    z = logits.to(factor.dtype).div_(temperature)
    # not less the rounded logsumexp, whose error all entries would share
    log_q = torch.log_softmax(z, -1)
    log_p = torch.log_softmax(teacher.to(factor.dtype) / temperature, -1)
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)
    if gradient:
        torch.exp(log_q, out=z)
        write_gradient(z.sub_(p).mul_(temperature * factor[:, None]), logits, factor)
    return temperature**2 * terms.sum(-1)


def _top_rows(
    logits: Tensor, factor: Tensor, teacher: Tensor, indices: Tensor, temperature: float, gradient: bool
) -> Tensor:
    """Losses `[C]` against log-probabilities `[C, K]` and the rest as one more entry."""
    z = logits.to(factor.dtype).div_(temperature)
    chosen = z.gather(1, indices)
    # what is left sums without a difference of nearly equal numbers
    rest = torch.logsumexp(z.scatter_(1, indices, float("-inf")), -1, keepdim=True)
    log_q = torch.log_softmax(torch.cat((chosen, rest), -1), -1)
    log_p = with_rest(teacher.to(factor.dtype), z.shape[1])
    p = log_p.exp()
    if gradient:
        unit = (log_q.exp() - p) * (temperature * factor[:, None])
        of_rest = torch.softmax(z, -1).mul_(unit[:, -1:])
        write_gradient(of_rest.scatter_(1, indices, unit[:, :-1]), logits, factor)
    return temperature**2 * (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(-1)


@distillation_loss_op.provider("chunked")
def distillation_loss_chunked(
    hidden, head_weight, head_bias, weights, teacher, indices, counted, temperature, chunk, needs
):  # fmt: skip
    counted, factor, safe = teacher_factors(hidden, weights, teacher, indices, counted, head_weight.shape[0])
    rows = functools.partial(_full_rows if safe is None else _top_rows, temperature=temperature)
    given = (teacher,) if safe is None else (teacher, safe)
    return linear_loss(rows, hidden, head_weight, head_bias, counted, factor, given, chunk, needs)
