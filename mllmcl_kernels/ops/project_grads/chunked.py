"""`project_grads_` in plain torch, layer by layer: the part that is taken out never exists as a tensor."""

from __future__ import annotations

from ...products import product_nt
from . import project_grads_op

__all__: list[str] = []


@project_grads_op.provider("chunked")
def project_grads_chunked(grads, bases):
    """The second product goes straight into the gradient; what [n, k] coefficients take is all that is added."""
    for grad, basis in zip(grads, bases, strict=True):
        flat, across = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1]), basis.t()
        flat.addmm_(product_nt(flat, across), across, alpha=-1)
        if flat.data_ptr() != grad.data_ptr():
            grad.copy_(flat.view(grad.shape))
