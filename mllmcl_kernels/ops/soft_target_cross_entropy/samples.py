"""Calls of `soft_target_cross_entropy` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample

__all__ = ["bad_samples", "head_tensors", "samples"]

IGNORE = -100
# name, T, D, V, alpha, bias, weights, every n-th token ignored (0: none, 1: all), chunk, gradients in the forward
CASES = (
    ("plain cross entropy", 9, 12, 17, 0.0, False, False, 0, None, True),
    ("soft targets in chunks", 11, 16, 33, 0.1, True, False, 3, 4, True),
    ("gradients in the backward", 10, 8, 19, 0.2, True, True, 4, 3, False),
    ("weighted tokens", 7, 16, 40, 0.01, True, True, 2, None, True),
    ("everything ignored", 6, 8, 10, 0.1, True, False, 1, 2, True),
    ("one token", 1, 16, 64, 0.05, True, False, 0, None, True),
    ("no token", 0, 16, 12, 0.1, True, False, 0, None, True),
    ("wide vocabulary", 5, 24, 4099, 0.01, True, False, 0, None, True),
    ("frozen head", 21, 16, 50, 0.1, True, False, 3, 8, (True, False, False)),
    ("rows of NaN", 6, 8, 12, 0.1, True, False, 3, 2, True),
)


def head_tensors(generator: torch.Generator, tokens: int, width: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """hidden, head_weight, head_bias, weights in float64 and labels, logits of size about two."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": normal(tokens, width),
        "head_weight": normal(vocabulary, width) * 2.0 * width**-0.5,
        "head_bias": normal(vocabulary),
        "weights": normal(tokens).abs() + 0.1,
        "labels": torch.randint(0, vocabulary, (tokens,), generator=generator),
    }


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls: chunks that do not divide T, ignored tokens, weights, gradients now or later, none and one token."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tokens, width, vocabulary, alpha, bias, weighted, ignored, chunk, now in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors = head_tensors(generator, tokens, width, vocabulary)
        labels = tensors["labels"]
        if ignored:
            labels[::ignored] = IGNORE
        weights = tensors["weights"].to(device, wide) if weighted else None
        hidden, weight, offset = (tensors[key].to(device, dtype) for key in ("hidden", "head_weight", "head_bias"))
        if "NaN" in name:
            # one token that counts and one that does not
            hidden[1, 2] = hidden[3, 0] = float("nan")
        if name == "soft targets in chunks":
            # not contiguous: every second column of a wider buffer, a transposed head
            hidden = hidden.repeat_interleave(2, dim=1)[:, ::2]
            weight = weight.t().contiguous().t()
        needs = list(now) if isinstance(now, tuple) else [now] * 3
        head = (hidden, weight, offset if bias else None, weights)
        calls.append(Sample(name, (*head, labels.to(device), alpha, IGNORE, chunk, needs)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise, with the message they owe the user."""
    from . import soft_target_cross_entropy

    good = {
        "hidden": torch.randn(2, 3, 8),
        "head_weight": torch.randn(5, 8),
        "labels": torch.tensor([[0, 4, -100], [1, 2, 3]]),
    }

    def call(alpha=0.1, options=None, **changed):
        return lambda: soft_target_cross_entropy(*{**good, **changed}.values(), alpha=alpha, **(options or {}))

    too_large, negative = good["labels"].clone(), good["labels"].clone()
    too_large[1, 1], negative[0, 2] = 5, -1
    return [
        BadSample("hidden no tensor", call(hidden=[1.0]), TypeError, r"hidden must be a Tensor, got list"),
        BadSample("hidden integer", call(hidden=torch.ones(2, 3, 8, dtype=torch.int64)), TypeError, r"hidden must be of dtype float32"),
        BadSample("head width", call(head_weight=torch.randn(5, 9)), ValueError, r"head_weight must be \[V, d\] with d = 8 as in hidden, got \[5, 9\]"),
        BadSample("head of one row", call(head_weight=torch.randn(1, 8)), ValueError, r"head_weight must be of at least two rows, got \[1, 8\]"),
        BadSample("bias shape", call(options={"head_bias": torch.randn(4)}), ValueError, r"head_bias must be \[V\] = \[5\], got \[4\]"),
        BadSample("other device", call(head_weight=torch.randn(5, 8, device="meta")), ValueError, r"head_weight must be on cpu like hidden, got meta"),
        BadSample("labels floating", call(labels=torch.zeros(2, 3)), TypeError, r"labels must be of an integer dtype, got torch.float32"),
        BadSample("labels shape", call(labels=torch.zeros(6, dtype=torch.int64)), ValueError, r"labels must be \[\.\.\.\] of hidden \[\.\.\., d\] = \[2, 3\], got \[6\]"),
        BadSample("label too large", call(labels=too_large), ValueError, r"labels must be in 0\.\.4 or ignore_index = -100, got 5 at position 4"),
        BadSample("label negative", call(labels=negative), ValueError, r"got -1 at position 2"),
        BadSample("alpha negative", call(-0.1), ValueError, r"alpha must be a share in \[0, 1\), got -0\.1"),
        BadSample("alpha one", call(1.0), ValueError, r"alpha must be a share in \[0, 1\), got 1\.0"),
        BadSample("alpha no number", call(None), ValueError, r"alpha must be a share"),
        BadSample("reduction", call(options={"reduction": "average"}), ValueError, r"reduction must be one of mean, sum, none, got 'average'"),
        BadSample("chunk", call(options={"chunk": 0}), ValueError, r"chunk must be a number of tokens >= 1 or None, got 0"),
        BadSample("ignore_index", call(options={"ignore_index": None}), TypeError, r"ignore_index must be an integer, got None"),
        BadSample("backend name", call(options={"backend": "liger"}), ValueError, r"backend must be one of"),
    ]  # fmt: skip
