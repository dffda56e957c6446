"""Matrix products in float32 on a CPU by whichever library is the faster one there, else torch's own."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor
from torch.library import Library

from .library import machine_reason

__all__ = ["add_product_nt", "has_few_rows", "product_nt"]

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define("few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()")

#: multiply-adds from which a call of oneDNN pays
LEAST = 1 << 19
#: rows from which oneDNN is ahead where the second matrix lies transposed in memory
LEAST_ROWS = 8
#: depth of a product from which oneDNN and a sum behind it are ahead of torch's product that adds
LEAST_DEPTH = 160
#: entries of the second matrix from which it does not stay in a core's cache
LEAST_MEMORY = 1 << 20


def _has_onednn() -> bool:
    """Whether torch was built with oneDNN and lets it be called on plain tensors (as its compiler does)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:
        return "GenuineIntel" in platform.processor()


HAS_ONEDNN = _has_onednn()
#: MKL keeps its best code for its maker's processors
IS_MKL_AT_HOME = torch.backends.mkl.is_available() and _is_intel()
#: rows up to which our own product, which reads the second matrix once and as it lies, is ahead of both
MOST_FEW = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@functools.cache
def _has_own() -> bool:
    return machine_reason("cpp") is None


def has_few_rows(a: Tensor) -> bool:
    """Whether a product with `a [m, k]` on the left is one for our own C++."""
    return a.dtype == torch.float32 and a.shape[0] <= MOST_FEW and a.device.type == "cpu" and _has_own()


def _pays_onednn(rows: int, b: Tensor) -> bool:
    """Whether oneDNN beats what torch calls: beside MKL at home only by large matrices that lie as it reads them."""
    if IS_MKL_AT_HOME:
        return b.numel() >= LEAST_MEMORY and b.is_contiguous()
    return rows * b.numel() >= LEAST and (rows >= LEAST_ROWS or b.is_contiguous())


def _runs_onednn(a: Tensor, b: Tensor) -> bool:
    fits = HAS_ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and torch._C._get_mkldnn_enabled()
    return fits and _pays_onednn(a.shape[0], b)


def product_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias of `[m, k]`, `[n, k]` and `[n]`, all of one dtype."""
    rows = a.shape[0]
    if has_few_rows(a) and b.numel() >= LEAST_MEMORY and b.is_contiguous():
        out = a.new_empty(rows, b.shape[0])
        torch.ops.mllmcl_cpu.few_rows(a.contiguous(), b, None if bias is None else bias.contiguous(), out)
        return out
    if _runs_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def add_product_nt(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b^T, in the product itself where that is the faster way."""
    if has_few_rows(a) or (a.shape[1] >= LEAST_DEPTH and _runs_onednn(a, b)):
        out.add_(product_nt(a, b))
    else:
        out.addmm_(a, b.t())
