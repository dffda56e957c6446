"""Calls of `lora_mix_routed_shared` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from ..lora_mix.samples import layer
from ..route.samples import CAME, some_gradients

__all__ = ["backward_samples", "bad_samples", "samples"]

# name, T, K, N of each, ranks, k, score, renormalize, straight, biases, noise, mask, dropout, frozen expert, by columns, share of tokens that count
CASES = (
    ("dense softmax of three", 40, 16, (12, 8, 8), (4, 4, 4), 3, "softmax", False, False, False, False, False, 0.0, None, False, 0.6),
    ("top 2, mixed ranks", 33, 24, (40, 16), (3, 5, 8), 2, "softmax", True, False, True, False, False, 0.0, 1, True, None),
    ("sigmoid top 1, dropout", 24, 16, (24, 8), (4, 4), 1, "sigmoid", False, False, False, False, False, 0.2, None, False, 0.5),
    ("cosine, noise, mask", 9, 32, (16, 16), (2, 2, 2), 2, "cosine", False, False, False, True, True, 0.0, 0, False, None),
    ("noise, mask of each token", 18, 24, (16, 8, 8), (4, 2, 4), 2, "softmax", True, False, True, True, True, 0.0, None, True, 0.8),
    ("straight through", 20, 16, (16, 16), (4, 4, 4), 1, "softmax", False, True, False, False, False, 0.0, None, False, 0.7),
    ("one token", 1, 16, (8, 12), (4, 4), 2, "softmax", False, False, True, False, False, 0.0, None, False, None),
    ("no token", 0, 16, (8, 12), (4, 4), 1, "softmax", False, False, False, False, False, 0.0, None, False, None),
)  # fmt: skip


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls over scores, top-k, masks, noise, mixed ranks, frozen experts, dropout, padding, few and no tokens."""
    calls = []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for case in CASES:
        name, tokens, width, outs, ranks, k, *choice, with_bias, noise, mask, dropout, frozen, by_columns, share = case
        generator = torch.Generator().manual_seed(seed + len(calls))
        experts = len(ranks)
        layers = [layer(generator, tokens, width, out, sum(ranks)) for out in outs]
        for tensors in layers:
            router = torch.randn(experts, width, generator=generator, dtype=torch.float64)
            tensors["router"] = router * 3.0 * width**-0.5
            tensors["router_bias"] = torch.randn(experts, generator=generator, dtype=torch.float64)
        layers[0]["x"][:, 0] *= 0.1
        drawn = torch.randn(tokens, len(outs) * experts, generator=generator, dtype=torch.float64)
        layers = [{key: value.to(device, dtype) for key, value in tensors.items()} for tensors in layers]
        if by_columns:
            layers = [{**tensors, "lora_b": tensors["lora_b"].t().contiguous().t()} for tensors in layers]
        keys = ("weight", "bias", "lora_a", "lora_b", "router", "router_bias")
        stacks = [[tensors[key] for tensors in layers] for key in keys]
        if not with_bias:
            stacks[1] = stacks[5] = []
        allowed = None
        if mask:
            rows = torch.arange(tokens if "each token" in name else 1)
            allowed = (torch.arange(experts) != (rows[:, None] + 1) % experts).to(device)
        counted = None if share is None else (torch.rand(tokens, generator=generator) < share).to(device)
        args = (
            layers[0]["x"], *stacks, drawn.to(device, wide) if noise else None, allowed, counted,
            torch.tensor([0x123456789ABCD + seed], device=device) if dropout else None,
            k, choice[0], 1.0, *choice[1:], list(ranks), [0.5 + 0.75 * expert for expert in range(experts)],
            [expert != frozen for expert in range(experts)], dropout,
        )  # fmt: skip
        calls.append(Sample(name, args))
    return calls


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side."""
    from .reference import lora_mix_routed_shared_reference

    calls = []
    for sample in samples(device, dtype, seed):
        x, weight, bias, lora_a, lora_b, router, router_bias, _, _, counted, mask_seed, _, *options = sample.args
        s, gates, indices, values, logits, probs, planes, *y = lora_mix_routed_shared_reference(*sample.args)
        generator = torch.Generator().manual_seed(seed + 1000 + len(calls))
        came = (*[1] * len(y), *CAME[len(calls) % len(CAME)])
        grads = some_gradients((*y, gates, values, logits, probs), planes, generator, came)
        needs = [True, True, bool(bias), True, True, True, bool(router_bias)]
        layers = (weight, lora_a, lora_b, router)
        saved = (x, *layers, mask_seed, s, gates, indices, logits, probs, counted)
        calls.append(Sample(sample.name, (grads[: len(y)], *grads[len(y) :], *saved, *options, needs)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise; what the ops beside it check is checked by the same code."""
    from . import lora_mix_routed_shared

    generator = torch.Generator().manual_seed(0)
    layers = [layer(generator, 6, 8, out, 4) for out in (5, 7)]
    good = [[tensors[key].float() for tensors in layers] for key in ("weight", "bias", "lora_a", "lora_b")]
    x = layers[0]["x"].float()

    def call(*routers, **options):
        return lambda: lora_mix_routed_shared(x, *good, list(routers), **options)

    router = torch.randn(2, 8)
    return [
        BadSample("routers count", call(router), ValueError, r"router_weight must be 2 of them, as many as weight, got 1"),
        BadSample("router width", call(router, torch.randn(2, 9)), ValueError, r"router_weight\[1\] must be \[E, d\] with d = 8"),
        BadSample("experts of one", call(router, torch.randn(4, 8)), ValueError, r"router_weight\[1\] must be of E = 2 rows like router_weight\[0\], got 4"),
        BadSample("router no tensor", call(None, router), TypeError, r"router_weight\[0\] must be a Tensor, got NoneType"),
        BadSample("ranks count", call(router, router, ranks=(1, 1, 2)), ValueError, r"ranks must be E = 2 integers"),
        BadSample("top_k", call(router, router, top_k=3), ValueError, r"top_k must be an integer in 1\.\.E = 2, got 3"),
        BadSample("score", call(router, router, score="max"), ValueError, r"score must be one of"),
    ]  # fmt: skip
