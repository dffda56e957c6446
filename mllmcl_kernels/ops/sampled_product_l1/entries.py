"""Which entries of each layer's B A are looked at, in the orders in which steps read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import as_list, expect, expect_device, expect_floating, expect_tensor

__all__ = ["Group", "SampledEntries", "check_factors"]

OP = "sampled_product_l1"


def check_factors(a: list[Tensor], b: list[Tensor]) -> None:
    """`[r, d_in]` and `[d_out, r]` of every layer, all on one device."""
    expect(len(a) > 0, OP, "lora_a", "at least one tensor", 0)
    expect(len(b) == len(a), OP, "lora_b", f"as many as lora_a = {len(a)}", len(b))
    for index in range(len(a)):
        for name, tensor in ((f"lora_a[{index}]", a[index]), (f"lora_b[{index}]", b[index])):
            expect_tensor(OP, name, tensor)
            expect_floating(OP, name, tensor)
            expect_device(OP, name, tensor, a[0].device)
            expect(tensor.dim() == 2, OP, name, "a matrix", list(tensor.shape))
        rank = a[index].shape[0]
        expect(b[index].shape[1] == rank, OP, f"lora_b[{index}]", f"[d_out, {rank}]", list(b[index].shape))


def _check_places(name: str, places: Tensor, bound: int, device: torch.device) -> None:
    expect_tensor(OP, name, places)
    integer = not (places.is_floating_point() or places.is_complex() or places.dtype == torch.bool)
    expect(integer, OP, name, "integers", places.dtype, TypeError)
    expect(places.dim() == 1, OP, name, "of shape [n]", list(places.shape))
    expect_device(OP, name, places, device)
    if places.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (places < 0) | (places >= bound)
        if bool(wrong.any()):
            where = int(wrong.to(torch.uint8).argmax())
            expect(False, OP, name, f"in 0..{bound - 1}", f"{int(places[where])} at position {where}")


def _listed(keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The values sorted by key, int32, and where each key's begin, int64 `[size + 1]`."""
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(size + 1, device=keys.device))
    return starts, values[order].to(torch.int32)


@dataclass(frozen=True)
class Group:
    """Layers of one rank and dtype laid under each other.

    layers: their places among all; tensors: row_starts, cols, row_weights, col_starts, rows, col_weights of the op.
    """

    layers: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, layers: list[int], shapes: list, rows: list[Tensor], cols: list[Tensor], share: float) -> Group:
        moved_rows, moved_cols, row_weights, col_weights = [], [], [], []
        height = width = 0
        for layer in layers:
            (_, d_in), (d_out, _) = shapes[layer][:2]
            moved_rows.append(rows[layer].long() + height)
            moved_cols.append(cols[layer].long() + width)
            weight = torch.tensor(share / max(len(rows[layer]), 1), device=rows[layer].device)
            row_weights.append(weight.expand(d_out))
            col_weights.append(weight.expand(d_in))
            height, width = height + d_out, width + d_in
        expect(max(height, width) < 2**31, OP, "lora_a and lora_b", "of fewer than 2^31 columns and rows", "more")
        flat_rows, flat_cols = torch.cat(moved_rows), torch.cat(moved_cols)
        by_row, by_col = _listed(flat_rows, flat_cols, height), _listed(flat_cols, flat_rows, width)
        return cls(tuple(layers), (*by_row, torch.cat(row_weights), *by_col, torch.cat(col_weights)))


@dataclass(frozen=True)
class SampledEntries:
    """Chosen entries of B A in all layers, sorted once by row and once by column, so that a step only reads them.

    Made by `SampledEntries.of`; takes 8 bytes for an entry and 24 for a row or column.
    """

    #: of every layer the shapes of A and B and the dtype of A
    shapes: tuple[tuple, ...]
    groups: tuple[Group, ...]

    @staticmethod
    def shapes_of(lora_a: list[Tensor], lora_b: list[Tensor]) -> tuple[tuple, ...]:
        return tuple((tuple(a.shape), tuple(b.shape), a.dtype) for a, b in zip(lora_a, lora_b, strict=True))

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        lora_a: Tensor | Sequence[Tensor],
        lora_b: Tensor | Sequence[Tensor],
        rows: Tensor | Sequence[Tensor],
        cols: Tensor | Sequence[Tensor],
    ) -> SampledEntries:
        """Entries (rows[l][i], cols[l][i]) of the product of layer l; of the factors only shapes and dtypes are read.

        Arguments and errors as in `sampled_product_l1`.
        """
        given = {"lora_a": lora_a, "lora_b": lora_b, "rows": rows, "cols": cols}
        a, b, rows, cols = (as_list(OP, name, value) for name, value in given.items())
        check_factors(a, b)
        for name, values in (("rows", rows), ("cols", cols)):
            expect(len(values) == len(a), OP, name, f"as many as lora_a = {len(a)}", len(values))
        alike: dict[tuple, list[int]] = {}
        for index in range(len(a)):
            _check_places(f"rows[{index}]", rows[index], b[index].shape[0], a[0].device)
            _check_places(f"cols[{index}]", cols[index], a[index].shape[1], a[0].device)
            count = len(rows[index])
            expect(len(cols[index]) == count, OP, f"cols[{index}]", f"as many as rows = {count}", len(cols[index]))
            alike.setdefault((a[index].shape[0], a[index].dtype), []).append(index)
        shapes = cls.shapes_of(a, b)
        groups = tuple(Group.of(layers, shapes, rows, cols, 1.0 / len(a)) for layers in alike.values())
        return cls(shapes, groups)
