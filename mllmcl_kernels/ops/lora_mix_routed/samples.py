"""Calls of `lora_mix_routed` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from ..lora_mix.samples import layer
from ..route.samples import CAME, some_gradients

__all__ = ["backward_samples", "bad_samples", "samples"]

# name, T, K, N, ranks, k, score, renormalize, straight_through, router bias, noise, mask, dropout, frozen expert, share of
# tokens that count (None without a mask)
CASES = (
    ("dense softmax", 17, 16, 12, (4, 4, 4, 4), 4, "softmax", False, False, False, False, False, 0.0, None, 0.6),
    ("top 2, mixed ranks", 33, 24, 40, (3, 5, 8), 2, "softmax", True, False, True, False, False, 0.0, 1, None),
    ("sigmoid top 1, dropout", 12, 16, 24, (4, 4), 1, "sigmoid", False, False, False, False, False, 0.2, None, 0.5),
    ("cosine, noise, mask", 9, 32, 16, (2, 2, 2, 2, 2), 2, "cosine", False, False, False, True, True, 0.0, 0, 0.8),
    ("straight through", 20, 16, 16, (4, 4, 4), 1, "softmax", False, True, False, False, False, 0.0, None, 0.7),
    ("one token", 1, 16, 8, (4, 4), 2, "softmax", False, False, True, False, False, 0.0, None, None),
    ("no token", 0, 16, 8, (4, 4), 1, "softmax", False, False, False, False, False, 0.0, None, None),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls over scores, top-k, masks, noise, mixed ranks, frozen experts, dropout, padding, one and no token."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tokens, width, out, ranks, k, score, renorm, hard, bias, noise, mask, dropout, frozen, share in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors = layer(generator, tokens, width, out, sum(ranks))
        experts = len(ranks)
        tensors["x"][:, 0] *= 0.1
        tensors["router"] = torch.randn(experts, width, generator=generator, dtype=torch.float64) * 3.0 * width**-0.5
        tensors["router_bias"] = torch.randn(experts, generator=generator, dtype=torch.float64)
        drawn = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
        tensors = {key: value.to(device, dtype) for key, value in tensors.items()}
        allowed = torch.tensor([[expert != 1 for expert in range(experts)]], device=device) if mask else None
        counted = None if share is None else (torch.rand(tokens, generator=generator) < share).to(device)
        mask_seed = torch.tensor([0x123456789ABCD + seed], device=device) if dropout else None
        calls.append(
            Sample(
                name,
                (
                    *(tensors[key] for key in ("x", "weight", "bias", "lora_a", "lora_b", "router")),
                    tensors["router_bias"] if bias else None,
                    drawn.to(device, wide) if noise else None,
                    allowed,
                    counted,
                    mask_seed,
                    k,
                    score,
                    1.0,
                    renorm,
                    hard,
                    list(ranks),
                    [0.5 + 0.75 * expert for expert in range(experts)],
                    [expert != frozen for expert in range(experts)],
                    dropout,
                ),
            )
        )
    return calls


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side."""
    from .reference import lora_mix_routed_reference

    calls = []
    for sample in samples(device, dtype, seed):
        x, weight, bias, lora_a, lora_b, router, router_bias, _, _, counted, mask_seed, _, *options = sample.args
        y, s, gates, indices, values, logits, probs, planes = lora_mix_routed_reference(*sample.args)
        generator = torch.Generator().manual_seed(seed + 1000 + len(calls))
        came = (1, *CAME[len(calls) % len(CAME)])
        grads = some_gradients((y, gates, values, logits, probs), planes, generator, came)
        needs = [True, True, bias is not None, True, True, True, router_bias is not None]
        saved = (x, weight, lora_a, lora_b, router, mask_seed, s, gates, indices, logits, probs, counted)
        calls.append(Sample(sample.name, (*grads, *saved, *options, needs)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise; what `lora_mix` and `route` check is checked by the same code."""
    from . import lora_mix_routed

    generator = torch.Generator().manual_seed(0)
    good = {key: value.float() for key, value in layer(generator, 6, 8, 5, 4).items()}

    def call(router, **options):
        return lambda: lora_mix_routed(*good.values(), router, **options)

    return [
        BadSample("router width", call(torch.randn(2, 9)), ValueError, r"router_weight must be \[E, d\] with d = 8"),
        BadSample("router no tensor", call(None), TypeError, r"router_weight must be a Tensor, got NoneType"),
        BadSample("ranks count", call(torch.randn(2, 8), ranks=(1, 1, 2)), ValueError, r"ranks must be E = 2 integers"),
        BadSample("rank not divisible", call(torch.randn(3, 8)), ValueError, r"ranks must be given"),
        BadSample("top_k", call(torch.randn(2, 8), top_k=3), ValueError, r"top_k must be an integer in 1\.\.E = 2, got 3"),
        BadSample("score", call(torch.randn(2, 8), score="max"), ValueError, r"score must be one of"),
    ]  # fmt: skip
