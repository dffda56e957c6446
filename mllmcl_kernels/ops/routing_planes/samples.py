"""Calls of `routing_planes` that the tests and opcheck draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from .reference import routing_planes_reference

__all__ = ["backward_samples", "bad_samples", "samples"]

# name, T, E, k, share of tokens that count (None without a mask), rows apart, rows where nothing is allowed, without numbers
CASES = (
    ("top 2 of 8", 19, 8, 2, None, False, False, False),
    ("top 1 of 5, padding", 20, 5, 1, 0.6, False, False, False),
    ("dense, rows apart", 17, 12, 12, 0.5, True, False, False),
    ("64 experts", 40, 64, 8, 0.9, True, True, False),
    ("rows where nothing is allowed", 16, 7, 2, 0.7, False, True, False),
    ("one token", 1, 4, 2, None, False, False, False),
    ("no token", 0, 4, 2, None, False, False, False),
    ("no token counts", 9, 3, 1, 0.0, False, False, False),
    ("many tokens, one expert", 700, 1, 1, None, False, False, False),
    ("padding of NaN", 21, 6, 2, 0.5, True, False, True),
    ("rows of NaN", 12, 9, 2, None, False, False, True),
    ("infinite logits, gradients of NaN", 12, 9, 2, None, True, False, True),
)


def _tables(generator: torch.Generator, tokens: int, experts: int, top_k: int, apart: bool, empty_rows: bool) -> list:
    """logits, probs, gates in float64 and indices; `apart` as slices of wider rows."""
    logits = torch.randn(tokens, 3 if apart else 1, experts, generator=generator, dtype=torch.float64) * 1.5
    probs = torch.softmax(logits, -1)
    # what renormalised sigmoids look like: probabilities that do not add up to 1
    probs = probs * (0.5 + torch.rand(tokens, 1, 1, generator=generator, dtype=torch.float64))
    best = probs.topk(top_k, -1).indices
    if empty_rows:
        probs[::5], best[::5] = 0.0, -1
        # and one expert that is out of reach
        probs[:, :, 1] = 0.0
    gates = torch.zeros_like(probs).scatter(-1, best.clamp_min(0), probs.gather(-1, best.clamp_min(0)))
    return [logits, probs, gates, best.to(torch.int32)]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Masks, rows that lie apart, rows where nothing is allowed, one and no token, padding and rows without numbers."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tokens, experts, top_k, share, apart, empty_rows, broken in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tables = _tables(generator, tokens, experts, top_k, apart, empty_rows)
        mask = None if share is None else torch.rand(tokens, generator=generator) < share
        if broken and mask is not None:
            for table in tables[:3]:
                table[~mask] = float("nan")
        elif "rows of NaN" in name:
            for table, row in zip(tables[:3], (1, 2, 4), strict=True):
                table[row, :, 0] = float("nan")
        elif broken:
            tables[0][3, :, 1], tables[0][5], tables[0][7, :, 2] = float("inf"), float("-inf"), float("-inf")
        floats = [table.to(device, wide)[:, -1] for table in tables[:3]]
        indices = tables[3].to(device)[:, -1]
        calls.append(Sample(name, (*floats, indices, None if mask is None else mask.to(device))))
    return calls


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side; by turns another gradient for each plane, the same one, and some zeros."""
    calls = []
    for place, sample in enumerate(samples(device, dtype, seed)):
        logits, probs, _, _, mask = sample.args
        planes = routing_planes_reference(*sample.args)
        generator = torch.Generator().manual_seed(seed + 1000 + place)
        grad = torch.randn(planes.shape, generator=generator, dtype=torch.float64).to(device, planes.dtype)
        if place % 3 == 1:
            grad = grad[:1].expand(planes.shape)
        elif place % 3 == 2:
            grad[:, -3:-1] = 0.0
        calls.append(Sample(sample.name, (grad, logits, probs, mask)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the function that raise, with the message they owe the user."""
    from . import routing_planes

    table, slots = torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.int32)

    def call(logits=table, probs=table, gates=table, indices=slots, token_mask=None):
        return lambda: routing_planes(logits, probs, gates, indices, token_mask)

    return [
        BadSample("no tensor", call(gates=[1.0]), TypeError, r"routing_planes: gates must be a Tensor, got list"),
        BadSample("shape", call(probs=table[0]), ValueError, r"probs must be \[\.\.\., E\] = \[2, 3, 4\], got \[3, 4\]"),
        BadSample("integers", call(logits=table.int()), TypeError, r"logits must be of dtype float32"),
        BadSample("indices dtype", call(indices=slots.long()), TypeError, r"indices must be of dtype int32"),
        BadSample("indices shape", call(indices=slots[0]), ValueError, r"indices must be \[\.\.\., k\] with \.\.\. = \[2, 3\]"),
        BadSample("mask dtype", call(token_mask=torch.ones(2, 3)), TypeError, r"token_mask must be of dtype bool"),
        BadSample("mask shape", call(token_mask=torch.ones(4, dtype=torch.bool)), ValueError, r"token_mask must be broadcastable to \[2, 3\], got \[4\]"),
    ]  # fmt: skip
