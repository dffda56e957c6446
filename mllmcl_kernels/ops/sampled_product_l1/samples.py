"""Calls of `sampled_product_l1`."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from .entries import SampledEntries

__all__ = ["backward_samples", "bad_samples", "samples"]

# columns of A and rows of B of each layer, rank, entries of each layer
SHAPES = (
    (((1, 1),), 1, (1,)),
    (((12, 15), (8, 15)), 4, (40, 10)),
    (((7, 5),), 3, (0,)),
    (((32, 20), (5, 9), (27, 19)), 8, (200, 0, 100)),
    (((33, 17),), 16, (90,)),
    (((5, 6),), 1, (40,)),
    (((20, 30),), 40, (300,)),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Entries that repeat, none at all, odd ranks, several layers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sizes, rank, counts in SHAPES:
        a, b = (
            [torch.randn(rank, *extra, generator=generator, dtype=torch.float64).to(device, dtype) for extra in shapes]
            for shapes in ([(width,) for width, _ in sizes], [(height,) for _, height in sizes])
        )
        b = [tensor.t() for tensor in b]
        places = [
            [
                torch.randint(0, pair[side], (n,), generator=generator).to(device)
                for pair, n in zip(sizes, counts, strict=True)
            ]
            for side in (1, 0)
        ]
        (group,) = SampledEntries.of(a, b, *places).groups
        joined = torch.cat([tensor.t() for tensor in a]), torch.cat(b)
        found.append(Sample(f"{len(sizes)} layers r {rank} n {sum(counts)}", (*joined, *group.tensors)))
    return found


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same with a gradient of the loss, for both sides or one."""
    wide = torch.promote_types(dtype, torch.float32)
    d_loss = torch.tensor(-0.6, dtype=wide, device=device)
    found = []
    for place, sample in enumerate(samples(device, dtype, seed)):
        found.append(Sample(sample.name, (d_loss, *sample.args, [place != 3, place != 4])))
    return found


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import sampled_product_l1

    a, b, places = torch.ones(2, 4), torch.ones(3, 2), torch.tensor([0, 2])
    made = SampledEntries.of(a, b, places, places)

    def call(a=a, b=b, rows=places, cols=places):
        return lambda: sampled_product_l1(a, b, rows, cols)

    return [
        BadSample("nothing", call([], [], [], []), ValueError, r"lora_a must be at least one tensor, got 0"),
        BadSample("count", call([a, a], [b]), ValueError, r"lora_b must be as many as lora_a = 2, got 1"),
        BadSample("rank", call(b=torch.ones(3, 5)), ValueError, r"lora_b\[0\] must be \[d_out, 2\], got \[3, 5\]"),
        BadSample(
            "row", call(rows=torch.tensor([0, 3])), ValueError, r"rows\[0\] must be in 0\.\.2, got 3 at position 1"
        ),
        BadSample("column", call(cols=torch.tensor([-1, 0])), ValueError, r"cols\[0\] must be in 0\.\.3, got -1 at"),
        BadSample("lengths", call(cols=places[:1]), ValueError, r"cols\[0\] must be as many as rows = 2, got 1"),
        BadSample("floating", call(rows=places.float()), TypeError, r"rows\[0\] must be integers"),
        BadSample("no columns", call(cols=None), TypeError, r"cols must be given beside rows, got None"),
        BadSample("both", call(rows=made), TypeError, r"cols must be None beside SampledEntries, got Tensor"),
        BadSample(
            "other shapes", call(a[:, :3], b, made, None), ValueError, r"rows must be entries made for \[\(\(2, 3\)"
        ),
    ]
