"""`sampled_product_l1` beside loops over layers: the whole product and an index, rows and columns gathered."""

from __future__ import annotations

import torch

from mllmcl_kernels import SampledEntries, sampled_product_l1

from .cases import LayerCase
from .layers import factors, race_penalty
from .measuring import Case, providers_used


def test_sampled_product_l1(benchmark, sampled_case: LayerCase, device, dtype, rounds):
    case = sampled_case
    a, b = factors(case, device, dtype)
    layers = len(a)
    rows, cols = [], []
    for width, out in case.linears:
        chosen = torch.rand(out * width, device=device).topk(max(1, out * width * case.number // 1000)).indices
        rows.append(chosen // width)
        cols.append(chosen % width)
    entries = SampledEntries.of(a, b, rows, cols)
    count, size = sum(map(len, rows)), a[0].element_size()
    # a list and a gathered row for each entry, forward and twice backward; factors read and their gradients written
    numbers = sum(tensor.numel() for tensor in (*a, *b))
    record = Case(
        "sampled_product_l1", f"{case}, {count / 1e6:.1f} M entries, {str(dtype).removeprefix('torch.')}",
        bytes=3 * count * (4 + case.rank * size) + 5 * numbers * size,
    )  # fmt: skip

    def ours(leaves):
        return sampled_product_l1(leaves[:layers], leaves[layers:], entries)

    def product(leaves):
        """The whole product of every layer, as it is commonly written."""
        pairs = zip(leaves[:layers], leaves[layers:], rows, cols, strict=True)
        return sum((one_b @ one_a)[row, col].abs().float().mean() for one_a, one_b, row, col in pairs) / layers

    def gathered(leaves):
        """Rows of B and columns of A of every entry."""
        pairs = zip(leaves[:layers], leaves[layers:], rows, cols, strict=True)
        return sum((b[row] * a.t()[col]).sum(1).abs().float().mean() for a, b, row, col in pairs) / layers

    def exact(leaves):
        """Gathered, with the sums in float32 or better."""
        wide = torch.promote_types(leaves[0].dtype, torch.float32)
        pairs = zip(leaves[:layers], leaves[layers:], rows, cols, strict=True)
        return sum((b[row].to(wide) * a.t()[col].to(wide)).sum(1).abs().mean() for a, b, row, col in pairs) / layers

    peers = {"loop, gathered": exact if dtype != torch.float32 else gathered, "loop, product": product}
    with providers_used() as record.providers, torch.no_grad():
        ours([*a, *b])
    race_penalty(benchmark, record, ours, peers, [*a, *b], device, max(3, rounds // 3))
