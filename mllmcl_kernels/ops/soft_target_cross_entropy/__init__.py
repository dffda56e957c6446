"""`soft_target_cross_entropy`: a linear head and cross entropy with softened labels, logits held in chunks."""

from __future__ import annotations

from torch import Tensor

from ...checks import expect
from ...op import Op
from ..linear_loss import (
    check_head,
    check_labels,
    check_options,
    fake_linear_loss,
    linear_loss_backward,
    linear_loss_cost,
    reduced,
    setup_context,
)
from .reference import soft_target_cross_entropy_reference
from .samples import bad_samples, samples

__all__ = ["soft_target_cross_entropy", "soft_target_cross_entropy_op"]


def _fake(hidden, head_weight, head_bias, weights, labels, alpha, ignore_index, chunk, needs):
    return fake_linear_loss(hidden, head_weight, needs)


def _backward(ctx, d_total, d_losses, *_grads):
    return linear_loss_backward(soft_target_cross_entropy_op, ctx, d_total, d_losses)


def _cost(hidden, head_weight, head_bias, weights, labels, alpha, ignore_index, chunk, needs):
    return linear_loss_cost(hidden, head_weight, needs, labels)


soft_target_cross_entropy_op = Op(
    name="soft_target_cross_entropy",
    reference=soft_target_cross_entropy_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=setup_context,
    backward=_backward,
    constants=("weights",),
    aside=(1, 2, 3, 4),
    autocast=("hidden", "head_weight", "head_bias"),
)


def soft_target_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    head_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of a linear head's prediction with labels that leave a share alpha to the other tokens.

        loss = - sum over v of q_v log softmax(hidden W^T + b)_v
        q    = 1 - alpha on the label, alpha / (V - 1) elsewhere

    The logits `[tokens, V]` never exist at once. alpha = 0 is `F.cross_entropy`. `F.cross_entropy`'s label_smoothing
    spreads its share over all V entries instead: label_smoothing = e is alpha = e (V - 1) / V.

    Args:
        hidden: `[..., d]`, float32, bfloat16, float16 or float64; logits are rounded to its dtype, as those of a model
            are, everything after them is float32 or better.
        head_weight, head_bias: the head, `[V, d]` and `[V]` or None; cast to hidden's dtype. Without requires_grad, as
            when the head is frozen, no work is done for their gradients.
        labels: integers `[...]`, each the token that hidden at its place has to predict (shifting is the caller's).
        alpha: the share of the target that the label does not get, in [0, 1).
        ignore_index: tokens with this label do not count, whatever their hidden holds. On the CPU they cost nothing; on
            other devices they go through the head, so leave them out of hidden where the host knows them.
        reduction: "mean" over the tokens that count, "sum", or "none" for a loss for each token `[...]`. The first two
            compute the gradients along with the loss (two products with a frozen head), "none" in the backward (three).
        chunk: how many tokens' logits are held at once; None chooses.
        backend: "reference" (holds all logits), "chunked", "triton", or None to choose.

    Returns:
        The loss in float32 or better. Differentiable in hidden, head_weight and head_bias, once. No tokens, or none
        that count: the loss is 0 and so is every gradient.

    Raises:
        TypeError, ValueError: wrong types, shapes or devices, alpha outside of [0, 1), and, on the CPU, a label outside
            of 0..V-1 with its position. On other devices nobody waits to look: such a label makes the loss NaN.

    Source: Srivastava et al., Improving Multimodal LLMs Using Continual Learning (2024). Their mean also divides by the
    ignored tokens; this one does not.

    >>> hidden, head, labels = torch.randn(2, 3, 8), torch.randn(50, 8), torch.tensor([[1, 2, -100], [4, -100, 5]])
    >>> soft_target_cross_entropy(hidden, head, labels, alpha=0.01).shape
    torch.Size([])
    """
    op = "soft_target_cross_entropy"
    check_head(op, hidden, head_weight, head_bias)
    flat = check_labels(op, hidden, labels)
    share = isinstance(alpha, (int, float)) and 0.0 <= alpha < 1.0
    expect(share, op, "alpha", "a share in [0, 1)", alpha)
    check_options(op, ignore_index, reduction, chunk)
    arguments = (None, flat, float(alpha), ignore_index, chunk)
    counted = flat != ignore_index
    return reduced(soft_target_cross_entropy_op, hidden, head_weight, head_bias, arguments, counted, reduction, backend)
