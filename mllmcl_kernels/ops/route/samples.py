"""Calls of `route` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...op import BadSample, Sample

__all__ = ["CAME", "backward_samples", "bad_samples", "router_tensors", "samples", "some_gradients"]

# name, T, D, E, k, score, temperature, renormalize, straight_through, bias, noise, mask ("", "experts", "rows"), broken
# rows, share of tokens that count (None without a mask)
CASES = (
    ("dense softmax", 33, 16, 4, 4, "softmax", 1.0, False, False, False, False, "", False, None),
    ("top 2 of 8, renormalised", 20, 24, 8, 2, "softmax", 1.0, True, False, True, False, "", False, 0.6),
    ("top 1, temperature", 12, 8, 6, 1, "softmax", 0.5, False, False, False, False, "", False, None),
    ("sigmoid top 3, renormalised", 9, 16, 5, 3, "sigmoid", 1.0, True, False, True, False, "", False, 0.7),
    ("cosine top 2, noise", 16, 12, 4, 2, "cosine", 0.1, False, False, False, True, "", False, None),
    ("straight through", 15, 16, 5, 2, "softmax", 1.0, True, True, False, False, "", False, 0.5),
    ("forbidden experts", 10, 16, 6, 2, "softmax", 1.0, False, False, False, False, "experts", False, None),
    ("forbidden by row", 11, 16, 6, 3, "softmax", 1.0, True, False, False, False, "rows", False, 0.8),
    ("one token", 1, 16, 4, 2, "softmax", 1.0, False, False, False, False, "", False, None),
    ("no token", 0, 16, 4, 2, "softmax", 1.0, False, False, False, False, "", False, None),
    ("64 experts", 40, 24, 64, 8, "softmax", 1.0, True, False, False, False, "", False, 0.9),
    ("rows of NaN and inf", 6, 8, 4, 2, "softmax", 1.0, False, False, False, False, "", True, None),
    ("rows of NaN and inf beside padding", 23, 8, 5, 2, "sigmoid", 1.0, True, False, False, False, "rows", True, 0.6),
)


def router_tensors(generator: torch.Generator, tokens: int, width: int, experts: int) -> dict[str, torch.Tensor]:
    """x, weight, bias in float64, scores well apart."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"x": normal(tokens, width), "weight": normal(experts, width) * 3.0 * width**-0.5, "bias": normal(experts)}


def _mask(generator: torch.Generator, kind: str, tokens: int, experts: int) -> torch.Tensor | None:
    if not kind:
        return None
    mask = torch.rand(1 if kind == "experts" else tokens, experts, generator=generator) < 0.6
    mask[:, 1] = True
    if kind == "rows":
        # a row where nothing is allowed
        mask[0] = False
    return mask


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls: scores, top-k, masks, noise, straight-through, one and no token, padding, rows without numbers."""
    calls = []
    for name, tokens, width, experts, k, score, temperature, renorm, hard, bias, noise, mask, broken, share in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors = {
            key: value.to(device, dtype) for key, value in router_tensors(generator, tokens, width, experts).items()
        }
        if broken:
            tensors["x"][1, 0], tensors["x"][3, 1], tensors["x"][4] = float("nan"), float("inf"), float("-inf")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        drawn = (
            torch.randn(tokens, experts, generator=generator, dtype=torch.float64).to(device, wide) if noise else None
        )
        allowed = _mask(generator, mask, tokens, experts)
        allowed = None if allowed is None else allowed.to(device)
        counted = None if share is None else (torch.rand(tokens, generator=generator) < share).to(device)
        head = (tensors["x"], tensors["weight"], tensors["bias"] if bias else None, drawn, allowed, counted)
        calls.append(Sample(name, (*head, k, score, temperature, renorm, hard)))
    return calls


def some_gradients(
    outputs: Sequence[torch.Tensor], planes: torch.Tensor, generator: torch.Generator, came: Sequence[bool]
) -> list:
    """A drawn gradient for each output and at last for the planes, small as that of a mean; None where none came."""
    pairs = [(out, 1.0) for out in outputs] + [(planes, 0.1)]
    return [
        (torch.randn(out.shape, generator=generator, dtype=torch.float64) * size).to(out.device, out.dtype)
        if here
        else None
        for (out, size), here in zip(pairs, came, strict=True)
    ]


#: which gradients of gates, values, logits, probs and planes come: from a loss on statistics, on gates too; others
CAME = ((0, 0, 0, 0, 1), (1, 0, 0, 0, 1), (0, 1, 1, 0, 1), (1, 1, 1, 1, 1), (1, 0, 0, 0, 0))


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side, by turns with all gradients and some, without the rows of NaN."""
    from .reference import route_reference

    calls = []
    for sample in samples(device, dtype, seed):
        if "NaN" in sample.name:
            continue
        x, weight, bias, _, _, token_mask, _, *options = sample.args
        gates, indices, values, logits, probs, planes = route_reference(*sample.args)
        generator = torch.Generator().manual_seed(seed + 1000 + len(calls))
        grads = some_gradients((gates, values, logits, probs), planes, generator, CAME[len(calls) % len(CAME)])
        saved = (x, weight, gates, indices, logits, probs, token_mask)
        calls.append(Sample(sample.name, (*grads, *saved, *options, [True, True, bias is not None])))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise, with the message they owe the user."""
    from . import route

    x, weight = torch.randn(3, 6, 8), torch.randn(4, 8)

    def call(*args, **options):
        return lambda: route(*(args or (x, weight)), **options)

    return [
        BadSample("x no tensor", call([1.0], weight), TypeError, r"route: x must be a Tensor, got list"),
        BadSample("x integer", call(x.long(), weight), TypeError, r"x must be of dtype float32"),
        BadSample("weight width", call(x, torch.randn(4, 9)), ValueError, r"weight must be \[E, d\] with d = 8, got \[4, 9\]"),
        BadSample("bias shape", call(x, weight, torch.randn(3)), ValueError, r"bias must be \[E\] = \[4\], got \[3\]"),
        BadSample("top_k too large", call(top_k=5), ValueError, r"top_k must be an integer in 1\.\.E = 4, got 5"),
        BadSample("top_k zero", call(top_k=0), ValueError, r"top_k must be an integer in 1\.\.E = 4, got 0"),
        BadSample("top_k bool", call(top_k=True), TypeError, r"top_k must be an integer"),
        BadSample("score", call(score="relu"), ValueError, r"score must be one of softmax, sigmoid, cosine, got 'relu'"),
        BadSample("temperature", call(temperature=0.0), ValueError, r"temperature must be positive, got 0\.0"),
        BadSample("noise", call(noise=-1.0), ValueError, r"noise must be a standard deviation >= 0, got -1\.0"),
        BadSample("expert_mask dtype", call(expert_mask=torch.ones(4)), TypeError, r"expert_mask must be of dtype bool"),
        BadSample("expert_mask shape", call(expert_mask=torch.ones(3, dtype=torch.bool)), ValueError, r"expert_mask must be broadcastable to \[3, 6, 4\]"),
        BadSample("top_k over the allowed", call(top_k=2, expert_mask=torch.tensor([True, False, False, False])), ValueError, r"top_k must be at most the 1 allowed experts, got 2"),
        BadSample("token_mask shape", call(token_mask=torch.ones(5, dtype=torch.bool)), ValueError, r"token_mask must be broadcastable to \[3, 6\]"),
        BadSample("other device", call(x, weight.to("meta")), ValueError, r"weight must be on cpu like x, got meta"),
    ]  # fmt: skip
