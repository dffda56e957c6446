"""`sampled_product_l1`: mean |(B A)[rows, cols]| without the product, all layers in one call, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_device, expect_floating, expect_tensor
from ...op import Cost, Op
from .reference import sampled_product_l1_backward_reference, sampled_product_l1_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["sampled_product_l1", "sampled_product_l1_op"]

# P columns of all A, Q rows of all B, r rank, n sampled entries of all layers


def _cost(columns, rows_of_b, rows, cols, weights) -> Cost:
    rank, size = columns.shape[1], columns.element_size()
    numbers = columns.numel() + rows_of_b.numel()
    return Cost(flops=2 * rank * len(rows), bytes=numbers * size + len(rows) * (2 * rows.element_size() + 4))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_loss):
    needs = list(ctx.needs_input_grad[:2])
    grads = sampled_product_l1_backward_op(d_loss, *ctx.saved_tensors, needs, backend=ctx.backend)
    return (*(grad if need else None for need, grad in zip(needs, grads, strict=True)), None, None, None)


def _fake_backward(d_loss, columns, rows_of_b, rows, cols, weights, needs):
    pair = zip((columns, rows_of_b), needs, strict=True)
    return tuple(torch.empty_like(tensor) if need else tensor.new_empty(0) for tensor, need in pair)


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
    constants=("weights",),
)


def _check_places(op: str, name: str, places: Tensor, bound: int, device: torch.device) -> None:
    expect_tensor(op, name, places)
    expect(not places.is_floating_point() and places.dtype != torch.bool, op, name, "integers", places.dtype, TypeError)
    expect(places.dim() == 1, op, name, "of shape [n]", list(places.shape))
    expect_device(op, name, places, device)
    if places.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (places < 0) | (places >= bound)
        if bool(wrong.any()):
            where = int(wrong.to(torch.uint8).argmax())
            expect(False, op, name, f"in 0..{bound - 1}", f"{int(places[where])} at position {where}")


def _check(op: str, lists: dict[str, list[Tensor]]) -> None:
    a, b, rows, cols = lists.values()
    expect(len(a) > 0, op, "lora_a", "at least one tensor", 0)
    for name, values in lists.items():
        expect(len(values) == len(a), op, name, f"as many as lora_a = {len(a)}", len(values))
    for index in range(len(a)):
        for name, tensor in ((f"lora_a[{index}]", a[index]), (f"lora_b[{index}]", b[index])):
            expect_tensor(op, name, tensor)
            expect_floating(op, name, tensor)
            expect_device(op, name, tensor, a[0].device)
            expect(tensor.dim() == 2, op, name, "a matrix", list(tensor.shape))
        rank = a[index].shape[0]
        expect(b[index].shape[1] == rank, op, f"lora_b[{index}]", f"[d_out, {rank}]", list(b[index].shape))
        _check_places(op, f"rows[{index}]", rows[index], b[index].shape[0], a[0].device)
        _check_places(op, f"cols[{index}]", cols[index], a[index].shape[1], a[0].device)
        count = len(rows[index])
        expect(len(cols[index]) == count, op, f"cols[{index}]", f"as many as rows = {count}", len(cols[index]))


def _joined(a: list[Tensor], b: list[Tensor], rows: list[Tensor], cols: list[Tensor], layers: int) -> tuple:
    """All layers as one: columns of A and rows of B under each other, places shifted, weights 1 / (layers * n)."""
    places, device = [[], []], a[0].device
    starts = [0, 0]
    for index in range(len(a)):
        for side, found in enumerate((rows[index], cols[index])):
            places[side].append(found.long() + starts[side])
        starts = [starts[0] + b[index].shape[0], starts[1] + a[index].shape[1]]
    counts = [len(found) for found in rows]
    shares = torch.tensor([1.0 / (layers * max(count, 1)) for count in counts], device=device)
    weights = shares.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))
    columns = torch.cat([tensor.t() for tensor in a])
    return columns, torch.cat([tensor.to(columns.dtype) for tensor in b]), *map(torch.cat, places), weights


def sampled_product_l1(
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor],
    cols: Tensor | Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean absolute value of chosen entries of the low-rank update, and the mean of that over the layers.

        loss = 1/L sum_l 1/n_l sum_i |(B_l A_l)[rows_i, cols_i]|

    Args:
        lora_a, lora_b: `[r, d_in]` and `[d_out, r]`, or a sequence of each with one for each layer.
        rows, cols: integers `[n]`, the entries, or a sequence of each; an entry may be there twice. A layer without an
            entry counts as zero.
        backend: "reference", or None to choose.

    Returns:
        A scalar in float32 or better; differentiable in lora_a and lora_b, where an exact zero has gradient zero. The
        product `[d_out, d_in]` never exists, and the gradients are added up in a fixed order.

    Raises:
        TypeError, ValueError: no tensors, counts or ranks that do not fit, and, on the CPU, an index out of range with
            its position.

    Source: RegLoRA of Chen et al., SEFE: Superficial and Essential Forgetting Eliminator (2025).

    >>> a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [4.0]])
    >>> sampled_product_l1(a, b, torch.tensor([0, 1]), torch.tensor([1, 0]))
    tensor(5.)
    """
    op = "sampled_product_l1"
    given = {"lora_a": lora_a, "lora_b": lora_b, "rows": rows, "cols": cols}
    lists = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in given.items()}
    _check(op, lists)
    alike: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(lists["lora_a"]):
        alike.setdefault((tensor.shape[0], tensor.dtype), []).append(place)
    layers = len(lists["lora_a"])
    parts = []
    for places in alike.values():
        joined = _joined(*([values[place] for place in places] for values in lists.values()), layers)
        parts.append(sampled_product_l1_op(*joined, backend=backend))
    return torch.stack(parts).sum()
