"""Calls of `distillation_loss` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from ..soft_target_cross_entropy.samples import head_tensors

__all__ = ["bad_samples", "samples"]

# name, T, D, V, K of a cached teacher (0: all logits), temperature, bias, weights, every n-th token left out (0: none,
# 1: all), chunk, gradients in the forward
CASES = (
    ("all logits", 9, 12, 17, 0, 1.0, False, False, 0, None, True),
    ("all logits in chunks", 11, 16, 33, 0, 2.0, True, False, 3, 4, True),
    ("top 5 in chunks", 11, 16, 33, 5, 2.0, True, False, 3, 4, True),
    ("gradients in the backward", 10, 8, 19, 3, 0.5, True, True, 4, 3, False),
    ("all logits, backward", 7, 16, 40, 0, 1.5, True, True, 2, None, False),
    ("top of all", 6, 8, 10, 10, 1.0, True, True, 0, 4, True),
    ("nothing counts", 6, 8, 10, 4, 1.0, True, False, 1, 2, True),
    ("one token", 1, 16, 64, 1, 1.0, True, False, 0, None, True),
    ("no token", 0, 16, 12, 0, 1.0, True, False, 0, None, True),
    ("no token, top 2", 0, 16, 12, 2, 1.0, True, False, 0, None, True),
    ("wide vocabulary", 5, 24, 4099, 0, 2.0, True, False, 0, None, True),
    ("wide vocabulary, top 37", 5, 24, 4099, 37, 2.0, True, False, 0, None, True),
    ("a sure teacher", 8, 12, 30, 4, 0.05, True, False, 0, 3, True),
    ("forbidden tokens", 8, 12, 30, 0, 1.0, True, False, 0, 3, True),
    ("frozen head", 21, 16, 50, 7, 2.0, True, False, 3, 8, (True, False, False)),
    ("rows of NaN", 6, 8, 12, 3, 1.0, True, False, 3, 2, True),
    ("rows of NaN, all logits", 6, 8, 12, 0, 1.0, True, False, 3, 2, True),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls: teachers of all logits and of k entries, chunks that do not divide T, tokens that do not count."""
    from . import teacher_top_k

    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tokens, width, vocabulary, top, temperature, bias, weighted, left_out, chunk, now in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors = head_tensors(generator, tokens, width, vocabulary)
        hidden, weight, offset = (tensors[key].to(device, dtype) for key in ("hidden", "head_weight", "head_bias"))
        teacher = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2.0
        if name == "forbidden tokens":
            teacher[:, ::3] = float("-inf")
        indices = None
        if top:
            values, indices, rest = teacher_top_k(teacher, top, temperature)
            # of the op itself a cached teacher is log-probabilities
            teacher = torch.cat((values, rest[:, None]), -1).div(temperature).log_softmax(-1)[:, :top]
        # a cache keeps float32, a teacher that runs beside the student its own dtype
        teacher = teacher.to(device, wide if top else dtype)
        counted = None
        if left_out:
            counted = torch.arange(tokens, device=device) % left_out != 0
        weights = tensors["weights"].to(device, wide) if weighted else None
        if "NaN" in name:
            # in hidden and in the teacher, of one token that counts and one that does not
            hidden[1, 2] = hidden[3, 0] = float("nan")
            teacher[2, 0] = teacher[0, 1] = float("nan")
        if name == "all logits in chunks":
            # not contiguous: every second column of a wider buffer, a transposed head, a transposed teacher
            hidden = hidden.repeat_interleave(2, dim=1)[:, ::2]
            weight, teacher = weight.t().contiguous().t(), teacher.t().contiguous().t()
        needs = list(now) if isinstance(now, tuple) else [now] * 3
        head = (hidden, weight, offset if bias else None, weights)
        indices = None if indices is None else indices.to(device, torch.int64)
        calls.append(Sample(name, (*head, teacher, indices, counted, temperature, chunk, needs)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise, with the message they owe the user."""
    from . import distillation_loss, teacher_top_k

    good = {"hidden": torch.randn(2, 3, 8), "head_weight": torch.randn(5, 8), "teacher": torch.randn(2, 3, 5)}
    values, indices, rest = teacher_top_k(good["teacher"], 2)

    def call(options=None, **changed):
        return lambda: distillation_loss(*{**good, **changed}.values(), **(options or {}))

    outside, twice = indices.clone(), indices.clone()
    outside[1, 1, 0], twice[0, 2] = 5, 3
    return [
        BadSample("hidden no tensor", call(hidden=[1.0]), TypeError, r"hidden must be a Tensor, got list"),
        BadSample("head width", call(head_weight=torch.randn(5, 9)), ValueError, r"head_weight must be \[V, d\] with d = 8 as in hidden, got \[5, 9\]"),
        BadSample("teacher no tensor", call(teacher=None), TypeError, r"teacher must be a Tensor, \(values, indices\) or \(values, indices, rest\), got NoneType"),
        BadSample("teacher of four", call(teacher=(values, indices, rest, rest)), TypeError, r"teacher must be a Tensor, .*, got tuple of 4"),
        BadSample("teacher integer", call(teacher=good["teacher"].long()), TypeError, r"teacher must be of dtype float32"),
        BadSample("teacher vocabulary", call(teacher=torch.randn(2, 3, 6)), ValueError, r"teacher must be \[\.\.\., V\] = \[2, 3, 5\], got \[2, 3, 6\]"),
        BadSample("teacher's lead", call(teacher=torch.randn(6, 5)), ValueError, r"teacher must be \[\.\.\., V\] = \[2, 3, 5\], got \[6, 5\]"),
        BadSample("teacher's device", call(teacher=torch.randn(2, 3, 5, device="meta")), ValueError, r"teacher must be on cpu like hidden, got meta"),
        BadSample("values without indices' shape", call(teacher=(values, indices[..., :1])), ValueError, r"teacher's indices must be \[\.\.\., k\] like its values = \[2, 3, 2\], got \[2, 3, 1\]"),
        BadSample("floating indices", call(teacher=(values, values)), TypeError, r"teacher's indices must be of an integer dtype, got torch.float32"),
        BadSample("more entries than tokens", call(teacher=(torch.randn(2, 3, 6), torch.zeros(2, 3, 6, dtype=torch.int64))), ValueError, r"teacher's values must be \[\.\.\., k\] with k in 1\.\.V = 5, got \[2, 3, 6\]"),
        BadSample("index outside", call(teacher=(values, outside)), ValueError, r"teacher must have indices in 0\.\.4, got \[5, \d\] at position 4"),
        BadSample("index twice", call(teacher=(values, twice)), ValueError, r"teacher must have distinct indices, got \[3, 3\] at position 2"),
        BadSample("rest of another shape", call(teacher=(values, indices, values)), ValueError, r"teacher's rest must be \[\.\.\.\] of hidden \[\.\.\., d\] = \[2, 3\], got \[2, 3, 2\]"),
        BadSample("temperature", call({"temperature": 0.0}), ValueError, r"temperature must be a positive number, got 0\.0"),
        BadSample("labels shape", call({"labels": torch.zeros(3, dtype=torch.int64)}), ValueError, r"labels must be \[\.\.\.\] of hidden \[\.\.\., d\] = \[2, 3\], got \[3\]"),
        BadSample("labels floating", call({"labels": torch.zeros(2, 3)}), TypeError, r"labels must be of an integer dtype"),
        BadSample("reduction", call({"reduction": "batchmean"}), ValueError, r"reduction must be one of mean, sum, none, got 'batchmean'"),
        BadSample("backend name", call({"backend": "liger"}), ValueError, r"backend must be one of"),
    ]  # fmt: skip
