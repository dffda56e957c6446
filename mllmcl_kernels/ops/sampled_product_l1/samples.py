"""Calls of `sampled_product_l1`."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample

__all__ = ["backward_samples", "bad_samples", "samples"]

# columns of all A, rows of all B, rank, entries
SHAPES = ((1, 1, 1, 1), (20, 30, 4, 50), (7, 5, 3, 0), (64, 48, 8, 300), (33, 17, 16, 90), (5, 6, 1, 40))


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Entries that repeat, none at all, odd ranks."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width, height, rank, count in SHAPES:
        columns, rows_of_b = (
            torch.randn(size, rank, generator=generator, dtype=torch.float64).to(device, dtype)
            for size in (width, height)
        )
        rows, cols = (torch.randint(0, size, (count,), generator=generator).to(device) for size in (height, width))
        weights = torch.rand(count, generator=generator).to(device)
        name = f"P {width} Q {height} r {rank} n {count}"
        found.append(Sample(name, (columns, rows_of_b, rows, cols, weights)))
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
    ]
