"""`orthogonality_loss` in Triton: one launch for the products of all layers, one for their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_tools import GroupedProducts, dtype_reason, grouped_product, laid_out
from . import orthogonality_loss_op

__all__: list[str] = []


@triton.jit
def _orthogonality_product_kernel(
    x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr, sums_ptr,
    SIGNS: tl.constexpr, ACROSS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum of |A A_old^T| over one tile, and its signs."""
    acc, out_ptr, places, inside = grouped_product(
        x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr, ACROSS, ALIGNED, PRECISION,
        BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    # a NaN times the zeros that pad a tile
    acc = tl.where(inside, acc, 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(tl.abs(acc), 1), 0))
    if SIGNS:
        sign = tl.where(acc > 0.0, 1.0, tl.where(acc < 0.0, -1.0, 0.0))
        tl.store(out_ptr + places, sign.to(out_like_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _orthogonality_slope_kernel(
    x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr,
    ACROSS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sign(A A_old^T) A_old on one tile."""
    acc, out_ptr, places, inside = grouped_product(
        x_like_ptr, w_like_ptr, out_like_ptr, products_ptr, tiles_ptr, ACROSS, ALIGNED, PRECISION,
        BLOCK_T, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    tl.store(out_ptr + places, acc, mask=inside)


@orthogonality_loss_op.provider("triton", supports=lambda lora_a, old, _need: dtype_reason(*lora_a, *old))
def orthogonality_loss_triton(lora_a, previous_a, need):
    """Signs are kept between the launches in the dtype of A; the sums of tiles are added up in their order."""
    news, olds = ([tensor.contiguous() for tensor in tensors] for tensors in (lora_a, previous_a))
    shapes = [(new.shape[0], old.shape[0]) for new, old in zip(news, olds, strict=True)]
    # without a gradient nothing is written through these addresses
    signs = news[0].new_empty(sum(rank * old for rank, old in shapes) if need else 0)
    parts = laid_out(signs, shapes) if need else news
    triples = list(zip(news, olds, parts, strict=True))
    first = GroupedProducts.of((news[0], olds[0], signs), triples, across=False)
    sums = signs.new_empty(len(first.tiles), dtype=torch.float32)
    first.launch(_orthogonality_product_kernel, sums, SIGNS=need)
    slope = sums.new_empty(sum(new.numel() for new in news) if need else 0)
    if need:
        # a layer without an old row has an empty product, which writes zeros
        triples = list(zip(parts, olds, laid_out(slope, [new.shape for new in news]), strict=True))
        GroupedProducts.of((signs, olds[0], slope), triples, across=True).launch(_orthogonality_slope_kernel)
    return sums.sum(), slope
