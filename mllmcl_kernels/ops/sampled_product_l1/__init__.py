"""`sampled_product_l1`: mean |(B A)[rows, cols]| without the product, all layers in one call, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import as_list, expect
from ...op import Cost, Op
from .entries import SampledEntries, check_factors
from .reference import sampled_product_l1_backward_reference, sampled_product_l1_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["SampledEntries", "sampled_product_l1", "sampled_product_l1_op"]

# P columns of all A, Q rows of all B, r rank, n sampled entries of all layers


def _cost(columns, rows_of_b, row_starts, cols, row_weights, *_rest) -> Cost:
    numbers = columns.numel() + rows_of_b.numel()
    lists = 4 * cols.numel() + 12 * row_starts.numel()
    return Cost(flops=2 * columns.shape[1] * len(cols), bytes=numbers * columns.element_size() + lists)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_loss):
    needs = list(ctx.needs_input_grad[:2])
    grads = sampled_product_l1_backward_op(d_loss, *ctx.saved_tensors, needs, backend=ctx.backend)
    return (*(grad if need else None for need, grad in zip(needs, grads, strict=True)), *[None] * 6)


def _fake_backward(d_loss, columns, rows_of_b, *rest):
    pair = zip((columns, rows_of_b), rest[-1], strict=True)
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in pair)


sampled_product_l1_backward_op = Op(
    name="sampled_product_l1_backward",
    reference=sampled_product_l1_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

sampled_product_l1_op = Op(
    name="sampled_product_l1",
    reference=sampled_product_l1_reference,
    package=__name__,
    fake=lambda columns, *_rest: columns.new_empty((), dtype=torch.promote_types(columns.dtype, torch.float32)),
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("row_weights", "col_weights"),
)


def sampled_product_l1(
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor] | SampledEntries,
    cols: Tensor | Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean absolute value of chosen entries of the low-rank update, and the mean of that over the layers.

        loss = 1/L sum_l 1/n_l sum_i |(B_l A_l)[rows_i, cols_i]|

    Args:
        lora_a, lora_b: `[r, d_in]` and `[d_out, r]`, or a sequence of each with one for each layer.
        rows, cols: integers `[n]`, the entries, or a sequence of each; an entry may be there twice. A layer without an
            entry counts as zero. They are sorted at every call: where they stay, make a `SampledEntries` of them once
            and give it as `rows`.
        backend: "reference", "cpp", "triton", or None to choose.

    Returns:
        A scalar in float32 or better; differentiable in lora_a and lora_b, where an exact zero has gradient zero. The
        product `[d_out, d_in]` never exists, and the gradients are added up in a fixed order.

    Raises:
        TypeError, ValueError: no tensors, counts or ranks that do not fit, entries made for other shapes, and, on the
            CPU, an index out of range with its position.

    Source: RegLoRA of Chen et al., SEFE: Superficial and Essential Forgetting Eliminator (2025).

    >>> a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [4.0]])
    >>> sampled_product_l1(a, b, torch.tensor([0, 1]), torch.tensor([1, 0]))
    tensor(5.)
    """
    op = "sampled_product_l1"
    a, b = as_list(op, "lora_a", lora_a), as_list(op, "lora_b", lora_b)
    if isinstance(rows, SampledEntries):
        entries = rows
        expect(cols is None, op, "cols", "None beside SampledEntries", type(cols).__name__, TypeError)
        check_factors(a, b)
        found = SampledEntries.shapes_of(a, b)
        expect(entries.shapes == found, op, "rows", f"entries made for {list(found)}", list(entries.shapes))
    else:
        expect(cols is not None, op, "cols", "given beside rows", None, TypeError)
        entries = SampledEntries.of(a, b, rows, cols)
    parts = []
    for group in entries.groups:
        columns = torch.cat([a[layer].t() for layer in group.layers])
        rows_of_b = torch.cat([b[layer].to(columns.dtype) for layer in group.layers])
        parts.append(sampled_product_l1_op(columns, rows_of_b, *group.tensors, backend=backend))
    return torch.stack(parts).sum()
