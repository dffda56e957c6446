"""`project_grads_`: take the part inside a subspace out of every gradient, all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import FLOATS, expect, expect_floating, expect_lists, expect_tensor
from ...op import Cost, Op
from .reference import project_grads_reference
from .samples import bad_samples, samples

__all__ = ["project_grads_", "project_grads_op"]


def _cost(grads, bases) -> Cost:
    flops = sum(4 * grad.numel() * basis.shape[1] for grad, basis in zip(grads, bases, strict=True))
    numbers = sum(2 * grad.numel() + basis.numel() for grad, basis in zip(grads, bases, strict=True))
    return Cost(flops=flops, bytes=numbers * grads[0].element_size())


project_grads_op = Op(
    name="project_grads_",
    reference=project_grads_reference,
    package=__name__,
    fake=lambda *_args: None,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    mutates=("grads",),
)


def _check_basis(op: str, index: int, grad: Tensor, basis: Tensor) -> None:
    label = f"bases[{index}]"
    expect_tensor(op, label, basis, optional=True)
    if basis.dtype not in FLOATS:
        expect_floating(op, label, basis)
    fits = grad.dim() >= 1 and basis.dim() == 2 and basis.shape[0] == grad.shape[-1]
    if not fits:
        expect(False, op, label, f"[d, k] with d = {list(grad.shape)[-1:]} as in grads[{index}]", list(basis.shape))
    if basis.device != grad.device:
        expect(False, op, label, f"on {grad.device} like grads[{index}]", basis.device)


@torch.no_grad()
def project_grads_(grads: Sequence[Tensor], bases: Sequence[Tensor | None], *, backend: str | None = None) -> None:
    """Project every gradient onto the complement of a subspace of its input space, in place.

        g = g - (g M) M^T

    Args:
        grads: floating tensors `[..., d]`.
        bases: for each gradient an M `[d, k]` with orthonormal columns, cast to the gradient's dtype; k may differ.
            None or k = 0 leaves the gradient as it is.
        backend: "reference", "chunked", "cpp", "triton", or None to choose.

    Raises:
        TypeError, ValueError: what is no floating tensor, counts that differ, a basis whose rows do not fit.

    Source: Saha et al., Gradient Projection Memory (2021).

    >>> grad = torch.ones(2, 3)
    >>> project_grads_([grad], [torch.eye(3)[:, :1]])
    >>> grad
    tensor([[0., 1., 1.],
            [0., 1., 1.]])
    """
    op = "project_grads_"
    expect_lists(op, {"grads": grads})
    expect(len(bases) == len(grads), op, "bases", f"as many as grads = {len(grads)}", len(bases))
    chosen: list[Tensor] = []
    subspaces: list[Tensor] = []
    for index, (grad, basis) in enumerate(zip(grads, bases, strict=True)):
        if basis is None:
            continue
        _check_basis(op, index, grad, basis)
        if basis.shape[1]:
            chosen.append(grad)
            subspaces.append(basis if basis.dtype == grad.dtype else basis.to(grad.dtype))
    if chosen:
        project_grads_op(chosen, subspaces, backend=backend)
