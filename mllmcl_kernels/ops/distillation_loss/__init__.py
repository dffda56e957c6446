"""`distillation_loss`: a linear head held to a teacher's distribution, logits held in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_floating, expect_shape, expect_tensor
from ...op import Op
from ..linear_loss import (
    check_head,
    check_labels,
    check_options,
    fake_linear_loss,
    is_integer,
    linear_loss_backward,
    linear_loss_cost,
    reduced,
    setup_context,
    wide_dtype,
)
from .reference import distillation_loss_reference
from .samples import bad_samples, samples

__all__ = ["distillation_loss", "distillation_loss_op", "teacher_top_k"]


def _fake(hidden, head_weight, head_bias, weights, teacher, indices, counted, temperature, chunk, needs):
    return fake_linear_loss(hidden, head_weight, needs)


def _backward(ctx, d_total, d_losses, *_grads):
    return linear_loss_backward(distillation_loss_op, ctx, d_total, d_losses)


def _cost(hidden, head_weight, head_bias, weights, teacher, indices, counted, temperature, chunk, needs):
    return linear_loss_cost(hidden, head_weight, needs, teacher, indices)


distillation_loss_op = Op(
    name="distillation_loss",
    reference=distillation_loss_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=setup_context,
    backward=_backward,
    constants=("weights", "teacher"),
    aside=(1, 2, 3, 4),
    autocast=("hidden", "head_weight", "head_bias"),
)


def teacher_top_k(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """What `distillation_loss` needs of a teacher, to be kept: the k largest logits, and what all others weigh.

    Args:
        logits: `[..., V]`, the teacher's.
        k: entries to keep, 1..V.
        temperature: the one that the loss will be called with: what is left out cannot be heated later.

    Returns:
        values `[..., k]`, logits in float32 or better, their indices `[..., k]` int32, and rest `[...]`, the one logit
        that weighs as much as all others together: temperature * logsumexp(others / temperature).

    >>> values, indices, rest = teacher_top_k(torch.randn(2, 3, 50), 8, temperature=2.0)
    >>> values.shape, indices.dtype, rest.shape
    (torch.Size([2, 3, 8]), torch.int32, torch.Size([2, 3]))
    """
    op = "teacher_top_k"
    expect_tensor(op, "logits", logits)
    expect_floating(op, "logits", logits)
    expect(logits.dim() >= 1, op, "logits", "of shape [..., V]", list(logits.shape))
    whole = isinstance(k, int) and 1 <= k <= logits.shape[-1]
    expect(whole, op, "k", f"an integer in 1..V = {logits.shape[-1]}", k)
    _check_temperature(op, temperature)
    wide = logits.to(wide_dtype(logits.dtype))
    values, indices = wide.topk(k, -1)
    others = wide.scatter(-1, indices, float("-inf")) / temperature
    return values, indices.to(torch.int32), temperature * others.logsumexp(-1)


def _check_temperature(op: str, temperature) -> None:
    positive = isinstance(temperature, (int, float)) and 0.0 < temperature < float("inf")
    expect(positive, op, "temperature", "a positive number", temperature)


def _check_teacher(op: str, hidden: Tensor, teacher, vocabulary: int, temperature: float):
    """The teacher's logits `[T, V]`, or log-probabilities and int64 indices `[T, K]`."""
    several = isinstance(teacher, (tuple, list))
    kind = f"{type(teacher).__name__} of {len(teacher)}" if several else type(teacher).__name__
    tensors = tuple(teacher) if several else (teacher,)
    fits = len(tensors) in ((2, 3) if several else (1,)) and all(isinstance(tensor, Tensor) for tensor in tensors)
    expect(fits, op, "teacher", "a Tensor, (values, indices) or (values, indices, rest)", kind, TypeError)
    expect_floating(op, "teacher", tensors[0])
    for tensor in tensors:
        expect(tensor.device == hidden.device, op, "teacher", f"on {hidden.device} like hidden", tensor.device)
    lead, values = hidden.shape[:-1], tensors[0].detach()
    if not several:
        expect_shape(op, "teacher", values, "[..., V]", (*lead, vocabulary))
        return values.reshape(-1, vocabulary), None
    indices = tensors[1]
    fits = values.dim() == hidden.dim() and values.shape[:-1] == lead and 1 <= values.shape[-1] <= vocabulary
    expect(fits, op, "teacher's values", f"[..., k] with k in 1..V = {vocabulary}", list(values.shape))
    expect(is_integer(indices), op, "teacher's indices", "of an integer dtype", indices.dtype, TypeError)
    expect_shape(op, "teacher's indices", indices, "[..., k] like its values", values.shape)
    entries, wide = values.shape[-1], wide_dtype(hidden.dtype)
    known = values.to(wide)
    if len(tensors) == 3:
        expect_floating(op, "teacher's rest", tensors[2])
        expect_shape(op, "teacher's rest", tensors[2], "[...] of hidden [..., d]", lead)
        known = torch.cat((known, tensors[2].detach().to(wide)[..., None]), -1)
    log_p = torch.log_softmax(known / temperature, -1)[..., :entries]
    return log_p.reshape(-1, entries), indices.reshape(-1, entries).to(torch.int64)


def distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    teacher: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    head_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of a linear head's prediction from a teacher's, on the tokens that count.

        loss = temperature^2 * sum over v of p_v (log p_v - log q_v)
        q    = softmax((hidden W^T + b) / temperature),    p = softmax(teacher / temperature)

    The student's logits `[tokens, V]` never exist at once. A cached teacher gives its k largest logits: p is their
    softmax, q stays the student's softmax over all tokens. With rest, which `teacher_top_k` gives too, p is the
    teacher's own, and all other tokens are one more entry on both sides: p_rest = 1 - sum of the k p, and q_rest the
    student's mass on the same others. This is the divergence of the two distributions with the others taken together:
    never above the full one, and zero where the student agrees.

    Args:
        hidden: `[..., d]`, float32, bfloat16, float16 or float64; logits are rounded to its dtype, as those of a model
            are, everything after them is float32 or better.
        head_weight, head_bias: the student's head, `[V, d]` and `[V]` or None; cast to hidden's dtype. Without
            requires_grad, as when the head is frozen, no work is done for their gradients.
        teacher: logits `[..., V]` of any floating dtype (minus infinity forbids a token); or values `[..., k]`, the
            logits of k tokens, with their distinct indices `[..., k]`, as torch.topk gives them; or both with rest
            `[...]`, as `teacher_top_k` gives them at this temperature. No gradient flows into it.
        temperature: divides both logits; its square keeps the gradient's size.
        labels: integers `[...]`; tokens whose label is ignore_index do not count, nothing else is read from them. None:
            all count.
        ignore_index, reduction, chunk: as in `soft_target_cross_entropy`.
        backend: "reference" (holds all logits), "chunked", "triton", or None to choose.

    Returns:
        The loss in float32 or better. Differentiable in hidden, head_weight and head_bias, once. No tokens, or none
        that count: the loss is 0 and so is every gradient.

    Raises:
        TypeError, ValueError: wrong types, shapes or devices, a temperature that is not positive, and, on the CPU, a
            cached teacher with an index out of range or twice, with its position. On other devices nobody waits to
            look: such a teacher makes the loss NaN.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015); Li and Hoiem, Learning without
    Forgetting (2016).

    >>> hidden, head, old_logits = torch.randn(2, 3, 8), torch.randn(50, 8), torch.randn(2, 3, 50)
    >>> cached = teacher_top_k(old_logits, 8, temperature=2.0)
    >>> full, top = (distillation_loss(hidden, head, teacher, temperature=2.0) for teacher in (old_logits, cached))
    >>> bool(top <= full)
    True
    """
    op = "distillation_loss"
    check_head(op, hidden, head_weight, head_bias)
    _check_temperature(op, temperature)
    values, indices = _check_teacher(op, hidden, teacher, head_weight.shape[0], temperature)
    check_options(op, ignore_index, reduction, chunk)
    counted = None if labels is None else check_labels(op, hidden, labels) != ignore_index
    arguments = (None, values, indices, counted, float(temperature), chunk)
    return reduced(distillation_loss_op, hidden, head_weight, head_bias, arguments, counted, reduction, backend)
