"""Calls of `lora_mix_shared` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample
from ..lora_mix.samples import layer

__all__ = ["backward_samples", "bad_samples", "samples"]

# name, T, K, N of each linear, ranks, rows of gates (0: none), dropout, bias, frozen expert, B by columns
CASES = (
    ("three with token gates", 33, 32, (48, 16, 16), (8, 8, 8), 33, 0.0, True, None, False),
    ("two without gates", 18, 24, (40, 40), (8,), 0, 0.0, False, None, False),
    ("mixed ranks, one frozen", 20, 40, (24, 8), (3, 0, 7), 20, 0.0, False, 2, True),
    ("constant gates", 19, 16, (12, 20), (4, 4), 1, 0.0, True, None, True),
    ("sample gates, dropout", 24, 17, (23, 9, 9), (5, 2), 4, 0.25, True, None, False),
    ("one linear", 40, 24, (16,), (4, 4), 40, 0.0, True, 0, False),
    ("few tokens", 3, 32, (16, 24), (4, 8), 3, 0.0, True, None, False),
    ("no token", 0, 16, (8, 4), (4, 4), 0, 0.0, True, None, False),
    ("ragged", 67, 40, (56, 24, 24), (8,) * 4, 67, 0.0, False, None, True),
)  # fmt: skip


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls: one to three linears, mixed and zero ranks, frozen, kinds of gates, few and no tokens."""
    calls = []
    for name, tokens, width, outs, ranks, rows, dropout, with_bias, frozen, by_columns in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        layers = [layer(generator, tokens, width, out, sum(ranks)) for out in outs]
        layers = [{key: value.to(device, dtype) for key, value in tensors.items()} for tensors in layers]
        if by_columns:
            layers = [{**tensors, "lora_b": tensors["lora_b"].t().contiguous().t()} for tensors in layers]
        gates = None
        if rows:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            size = (rows, len(outs) * len(ranks))
            gates = torch.randn(*size, generator=generator, dtype=torch.float64).to(device, wide)
        stacks = [[tensors[key] for tensors in layers] for key in ("weight", "bias", "lora_a", "lora_b")]
        if not with_bias:
            stacks[1] = []
        mask_seed = torch.tensor([0x123456789ABCD + seed], device=device) if dropout else None
        scaling = [0.5 + 0.75 * expert for expert in range(len(ranks))]
        trainable = [expert != frozen for expert in range(len(ranks))]
        args = (layers[0]["x"], *stacks, gates, mask_seed, list(ranks), scaling, trainable, dropout)
        calls.append(Sample(name, args))
    return calls


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side, all gradients asked for where they exist."""
    from .reference import lora_mix_shared_reference

    calls = []
    for sample in samples(device, dtype, seed):
        x, weight, bias, lora_a, lora_b, gates, mask_seed, *options = sample.args
        generator = torch.Generator().manual_seed(seed + 1000 + len(calls))
        shapes = [(x.shape[0], one.shape[0]) for one in weight]
        dy = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
        s = lora_mix_shared_reference(*sample.args)[0]
        needs = [True, True, bool(bias), True, True, gates is not None]
        calls.append(Sample(sample.name, (dy, x, weight, lora_a, lora_b, gates, mask_seed, s, *options, needs)))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise, with the message they owe the user."""
    from . import lora_mix_shared

    generator = torch.Generator().manual_seed(0)
    layers = [layer(generator, 6, 8, out, 4) for out in (5, 7)]
    good = {key: [tensors[key].float() for tensors in layers] for key in ("weight", "bias", "lora_a", "lora_b")}
    x = layers[0]["x"].float()

    def call(gates=None, options=None, x=x, **changed):
        return lambda: lora_mix_shared(x, *{**good, **changed}.values(), gates, **({"ranks": (2, 2)} | (options or {})))

    first = good["weight"][0]
    return [
        BadSample("weight no list", call(weight=first), TypeError, r"weight must be a sequence of Tensors, got Tensor"),
        BadSample("no linears", call(weight=[]), ValueError, r"weight must be at least one Tensor, got 0"),
        BadSample("lora_a count", call(lora_a=good["lora_a"][:1]), ValueError, r"lora_a must be 2 of them, as many as weight, got 1"),
        BadSample("weight width", call(weight=[first, torch.ones(7, 9)]), ValueError, r"weight\[1\] must be \[d_out, d_in\] with d_in = 8"),
        BadSample("lora_b rank", call(lora_b=[torch.ones(5, 4), torch.ones(7, 3)]), ValueError, r"lora_b\[1\] must be \[d_out, R\] = \[7, 4\], got \[7, 3\]"),
        BadSample("ranks of one", call(lora_a=[good["lora_a"][0], torch.ones(6, 8)], lora_b=[good["lora_b"][0], torch.ones(7, 6)]), ValueError, r"lora_a\[1\] must be of R = 4 rows like lora_a\[0\], got 6"),
        BadSample("x no tensor", call(x=[1.0]), TypeError, r"x must be a Tensor, got list"),
        BadSample("gates count", call([torch.ones(6, 2)]), ValueError, r"gates must be None, one Tensor or 2 of them, got 1"),
        BadSample("gates last dim", call([torch.ones(6, 2), torch.ones(6, 3)]), ValueError, r"gates\[1\] must be broadcastable to \[\.\.\., E\] with E = 2"),
        BadSample("gates some", call([torch.ones(6, 2), None]), TypeError, r"gates\[1\] must be a Tensor, got NoneType"),
        BadSample("id too large", call(torch.tensor([0, 1, 0, 2, 0, 0])), ValueError, r"gates must be ids in -1\.\.1, got 2 at position 3"),
        BadSample("dropout range", call(options={"dropout": 1.0}), ValueError, r"dropout must be a probability in \[0, 1\)"),
    ]  # fmt: skip
