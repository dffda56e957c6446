"""Matrix products: oneDNN's where it has the faster one, in float32 on a CPU, else torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product_nt"]

#: multiply-adds from which a call of oneDNN pays
LEAST = 1 << 19
#: rows from which oneDNN is ahead where the second matrix lies transposed in memory
LEAST_ROWS = 8


def _has_onednn() -> bool:
    """Whether torch was built with oneDNN and lets it be called on plain tensors (as its compiler does)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


HAS_ONEDNN = _has_onednn()


def product_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias of `[m, k]`, `[n, k]` and `[n]`, all of one dtype."""
    rows, depth = a.shape
    pays = rows * depth * b.shape[0] >= LEAST and (rows >= LEAST_ROWS or b.is_contiguous())
    fits = HAS_ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and torch._C._get_mkldnn_enabled()
    if pays and fits:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())
