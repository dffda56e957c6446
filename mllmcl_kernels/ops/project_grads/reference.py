"""`project_grads_` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

__all__ = ["project_grads_reference"]


def project_grads_reference(grads: list[Tensor], bases: list[Tensor]) -> None:
    """g = g - (g M) M^T."""
    for grad, basis in zip(grads, bases, strict=True):
        grad.sub_((grad @ basis) @ basis.t())
