"""`project_grads_` in Triton: one launch for the coefficients of all layers, one that takes them out."""

from __future__ import annotations

import triton
import triton.language as tl

from ...device_tables import by_dtypes
from ...triton_tools import GroupedProducts, dtypes_reason, grouped_product, laid_out
from . import project_grads_op

__all__: list[str] = []


@triton.jit
def _projection_coefficients_kernel(
    x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr,
    ACROSS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g M on one tile."""
    acc, out_ptr, places, inside = grouped_product(
        x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr, ACROSS, ALIGNED, PRECISION,
        BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    tl.store(out_ptr + places, acc.to(out_like_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _projection_remove_kernel(
    x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr,
    ACROSS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g - (g M) M^T on one tile, in place."""
    acc, out_ptr, places, inside = grouped_product(
        x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr, ACROSS, ALIGNED, PRECISION,
        BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    g = tl.load(out_ptr + places, mask=inside, other=0.0).to(tl.float32) - acc
    tl.store(out_ptr + places, g.to(out_like_ptr.dtype.element_ty), mask=inside)


def _supports(grads, bases) -> str | None:
    return dtypes_reason(grads, bases)


@project_grads_op.provider("triton", supports=_supports)
def project_grads_triton(grads, bases):
    """Two launches for each dtype: every basis is read once by each, every gradient read twice and written once."""
    for (flat,), (chosen,) in by_dtypes((grads,), (0,), bases):
        rows = [grad.view(-1, grad.shape[-1]) for grad in flat]
        wide = [basis.to(grad.dtype).contiguous() for grad, basis in zip(flat, chosen, strict=True)]
        shapes = [(grad.shape[0], basis.shape[1]) for grad, basis in zip(rows, wide, strict=True)]
        held = rows[0].new_empty(sum(height * count for height, count in shapes))
        shares = laid_out(held, shapes)
        into = list(zip(rows, wide, shares, strict=True))
        GroupedProducts.of((rows[0], wide[0], held), into, across=True).launch(_projection_coefficients_kernel)
        out = list(zip(shares, wide, rows, strict=True))
        GroupedProducts.of((held, wide[0], rows[0]), out, across=False).launch(_projection_remove_kernel)
