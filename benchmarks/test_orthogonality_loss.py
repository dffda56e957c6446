"""`orthogonality_loss` beside a loop over layers and layers of one shape stacked into batched products."""

from __future__ import annotations

import torch

from mllmcl_kernels import orthogonality_loss

from .cases import LayerCase
from .layers import by_shape, factors, race_penalty
from .measuring import Case, providers_used


def test_orthogonality_loss(benchmark, orthogonality_case: LayerCase, device, dtype, rounds):
    case = orthogonality_case
    a, _ = factors(case, device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    olds = [torch.randn(case.number, width, generator=generator, device=device).to(dtype) for width, _ in case.linears]
    numbers = 2 * sum(new.numel() for new in a) + sum(old.numel() for old in olds)
    record = Case(
        "orthogonality_loss", f"{case}, {str(dtype).removeprefix('torch.')}", bytes=numbers * a[0].element_size()
    )

    def ours(leaves):
        return orthogonality_loss(leaves, olds)

    def loop(leaves):
        """One layer after the other, as it is commonly written."""
        pairs = zip(leaves, olds, strict=True)
        return sum((new @ old.to(new.dtype).t()).abs().sum(dtype=wide(new)) for new, old in pairs)

    def wide(tensor):
        return torch.promote_types(tensor.dtype, torch.float32)

    def stacked(leaves):
        parts = []
        for places in by_shape(leaves):
            new = torch.stack([leaves[place] for place in places])
            old = torch.stack([olds[place] for place in places])
            parts.append(torch.bmm(new, old.mT).abs().sum(dtype=wide(new)))
        return sum(parts)

    with providers_used() as record.providers, torch.no_grad():
        ours(a)
    race_penalty(benchmark, record, ours, {"loop": loop, "stacked": stacked}, a, device, rounds)
