"""`project_grads_` in C++: up to sixteen rows of a gradient share each pass over its basis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...checks import are_contiguous
from ...cpu_tables import list_reason
from . import project_grads_op

__all__: list[str] = []

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("project_grads(Tensor(a!)[] grads, Tensor[] bases) -> ()")


#: beyond these the products of torch, which work through blocks of either matrix, are as fast or faster
MOST_OF_BASIS, MOST_ROWS = 2**19, 256


def _supports(grads, bases) -> str | None:
    if max(map(Tensor.numel, bases)) > MOST_OF_BASIS:
        return f"a basis of more than {MOST_OF_BASIS} numbers does not stay in the cache"
    rows = sum(grad.numel() // max(grad.shape[-1], 1) for grad in grads) // len(grads)
    if rows > MOST_ROWS:
        return f"gradients of {rows} rows on average, over {MOST_ROWS}, are products for a library"
    return list_reason((grads, bases), "gradients", grads) if are_contiguous(grads) else "gradients must lie in rows"


@project_grads_op.provider("cpp", supports=_supports)
def project_grads_cpp(grads, bases):
    """Every gradient as rows, a view."""
    rows = [grad if grad.dim() == 2 else grad.view(-1, grad.shape[-1]) for grad in grads]
    torch.ops.mllmcl_cpu.project_grads(rows, [basis.contiguous() for basis in bases])
