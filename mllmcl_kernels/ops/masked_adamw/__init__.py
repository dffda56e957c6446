"""`masked_adamw_`: one AdamW step over all tensors that leaves masked-out entries bit for bit as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect_betas, expect_lists, expect_number, expect_real
from ...masks import Mask, flatten_masks
from ...op import Cost, Op
from .reference import masked_adamw_reference
from .samples import bad_samples, samples

__all__ = ["masked_adamw_", "masked_adamw_op"]


def _cost(params, grads, exp_avgs, exp_avg_sqs, masks, kinds, *_rest) -> Cost:
    total = 0
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        total += p.numel() * (2 * p.element_size() + g.element_size() + 2 * m.element_size() + 2 * v.element_size())
    return Cost(flops=12 * sum(p.numel() for p in params), bytes=total)


masked_adamw_op = Op(
    name="masked_adamw_",
    reference=masked_adamw_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("params", "exp_avgs", "exp_avg_sqs"),
)


@torch.no_grad()
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Mask | None] | None,
    *,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """One AdamW step, in place, on the entries that the masks allow.

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps)

    A masked-out entry keeps parameter and both moments bit for bit: no decay, no momentum drift. With masks=None the
    step equals `torch.optim.AdamW`'s.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length, shapes alike; moments may be wider than parameters.
        masks: a `Mask` or None for each parameter, or None for no mask at all.
        step: the number of this step, from 1. lr, grad_scale: numbers or one-element tensors (a tensor on the device
            is never read by the host). The gradient is multiplied by grad_scale.
        backend: "reference", "cpp", "triton", "cuda", or None to choose.

    Raises:
        TypeError, ValueError: lists of different length, shapes or devices that differ, a mask that does not fit,
            step < 1, a negative lr, eps or weight_decay, betas outside [0, 1).

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (2019).

    >>> p, g = torch.ones(4), torch.ones(4)
    >>> state = torch.zeros(4), torch.zeros(4)
    >>> mask = Mask.elements(torch.tensor([True, True, False, False]))
    >>> masked_adamw_([p], [g], [state[0]], [state[1]], [mask], step=1, lr=0.5)
    >>> p
    tensor([0.5000, 0.5000, 1.0000, 1.0000])
    """
    op = "masked_adamw_"
    expect_lists(op, {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs})
    flat = flatten_masks(op, params, masks)
    numbers = (
        expect_number(op, "step", step, "at least 1", 1),
        expect_number(op, "lr", lr, ">= 0", 0),
        expect_number(op, "grad_scale", grad_scale),
    )
    beta1, beta2 = expect_betas(op, betas)
    eps = expect_real(op, "eps", eps, ">= 0", lambda value: value >= 0.0)
    weight_decay = expect_real(op, "weight_decay", weight_decay, ">= 0", lambda value: value >= 0.0)
    if params:
        lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs))
        masked_adamw_op(*lists, *flat, *numbers, beta1, beta2, eps, weight_decay, backend=backend)
