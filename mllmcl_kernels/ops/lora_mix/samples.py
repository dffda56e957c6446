"""Calls of `lora_mix` that the tests, opcheck and benchmarks draw from."""

from __future__ import annotations

import torch

from ...op import BadSample, Sample

__all__ = ["backward_samples", "bad_samples", "layer", "samples"]

# name, T, K, N, ranks, gates ("none" | "constant" | "sample" | "token" | "ids" | "token ids"), dropout, bias, frozen expert
CASES = (
    ("one expert", 7, 16, 12, (8,), "none", 0.0, True, None),
    ("constant gates", 16, 24, 20, (4, 4, 4), "constant", 0.0, False, None),
    ("token gates", 33, 32, 48, (8, 8, 8, 8), "token", 0.0, True, None),
    ("mixed ranks, one frozen", 12, 40, 24, (3, 7, 0, 5), "token", 0.0, False, 1),
    ("sample gates, dropout", 12, 16, 16, (4, 4), "sample", 0.25, True, None),
    ("ids per sample", 20, 32, 16, (4, 6), "ids", 0.0, True, 0),
    ("ids of long runs", 200, 24, 16, (4, 4, 4), "ids", 0.0, True, 1),
    ("ids of long runs, dropout", 200, 17, 23, (3, 3, 3), "ids", 0.25, False, None),
    ("ids per token", 9, 17, 23, (5, 3, 2), "token ids", 0.1, False, None),
    ("one token", 1, 16, 8, (4, 4), "token", 0.0, True, None),
    ("no token", 0, 16, 8, (4, 4), "token", 0.0, True, None),
    ("ragged large", 129, 72, 56, (16, 16, 16, 16), "token", 0.0, True, 2),
    ("few ids, B by columns", 6, 32, 40, (4, 8, 4), "token ids", 0.0, True, 1),
)
#: cases whose B lies by columns
BY_COLUMNS = (
    "constant gates", "mixed ranks, one frozen", "sample gates, dropout", "ids of long runs", "one token", "ragged large",
    "few ids, B by columns",
)  # fmt: skip


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def layer(generator: torch.Generator, tokens: int, width: int, out: int, rank: int) -> dict[str, torch.Tensor]:
    """x, weight, bias, lora_a, lora_b in float64, with one outlier column in x and B not zero."""
    x = _normal(generator, tokens, width)
    x[:, 0] *= 10.0
    return {
        "x": x,
        "weight": _normal(generator, out, width, scale=width**-0.5),
        "bias": _normal(generator, out),
        "lora_a": _normal(generator, rank, width, scale=width**-0.5),
        "lora_b": _normal(generator, out, rank, scale=max(rank, 1) ** -0.5),
    }


def _gates(generator: torch.Generator, kind: str, tokens: int, experts: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    rows = {"constant": 1, "sample": 4, "ids": 5}.get(kind, tokens)
    if "ids" in kind:
        return torch.randint(-1, experts, (rows,), generator=generator)
    gates = _normal(generator, rows, experts)
    # signed gates, and one expert that weighs exactly nothing
    gates[:, -1] = 0.0
    return gates


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Legal calls: typical, ragged, mixed and zero ranks, frozen, every kind of gate, one and no token, strided."""
    calls = []
    for name, tokens, width, out, ranks, kind, dropout, with_bias, frozen in CASES:
        generator = torch.Generator().manual_seed(seed + len(calls))
        tensors = layer(generator, tokens, width, out, sum(ranks))
        tensors = {key: value.to(device, dtype) for key, value in tensors.items()}
        gates = _gates(generator, kind, tokens, len(ranks))
        if gates is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            gates = gates.to(device, wide if gates.is_floating_point() else torch.int64)
        if name == "token gates":
            # not contiguous: every second column of a wider buffer, a transposed A
            tensors["x"] = tensors["x"].repeat_interleave(2, dim=1)[:, ::2]
            tensors["lora_a"] = tensors["lora_a"].t().contiguous().t()
        if name in BY_COLUMNS:
            tensors["lora_b"] = tensors["lora_b"].t().contiguous().t()
        mask_seed = torch.tensor([0x123456789ABCD + seed], device=device) if dropout else None
        scaling = [0.5 + 0.75 * expert for expert in range(len(ranks))]
        trainable = [expert != frozen for expert in range(len(ranks))]
        bias = tensors["bias"] if with_bias else None
        head = (tensors["x"], tensors["weight"], bias, tensors["lora_a"], tensors["lora_b"])
        calls.append(Sample(name, (*head, gates, mask_seed, list(ranks), scaling, trainable, dropout)))
    return calls


def backward_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The same calls from the gradient's side, all gradients asked for where they exist."""
    from .reference import lora_mix_reference

    calls = []
    for sample in samples(device, dtype, seed):
        x, weight, bias, lora_a, lora_b, gates, mask_seed, ranks, scaling, trainable, dropout = sample.args
        generator = torch.Generator().manual_seed(seed + 1000 + len(calls))
        dy = _normal(generator, x.shape[0], weight.shape[0]).to(device, dtype)
        _, s = lora_mix_reference(*sample.args)
        needs = [True, True, bias is not None, True, True, gates is not None and gates.is_floating_point()]
        args = (dy, x, weight, lora_a, lora_b, gates, mask_seed, s, ranks, scaling, trainable, dropout, needs)
        calls.append(Sample(sample.name, args))
    return calls


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise, with the message they owe the user."""
    from . import lora_mix

    generator = torch.Generator().manual_seed(0)
    good = {key: value.float() for key, value in layer(generator, 6, 8, 5, 4).items()}

    def call(gates=None, options=None, **changed):
        return lambda: lora_mix(*{**good, **changed}.values(), gates, **({"ranks": (2, 2)} | (options or {})))

    return [
        BadSample("x no tensor", call(x=[1.0]), TypeError, r"x must be a Tensor, got list"),
        BadSample("x integer", call(x=torch.ones(6, 8, dtype=torch.int64)), TypeError, r"x must be of dtype float32"),
        BadSample("weight width", call(weight=torch.ones(5, 9)), ValueError, r"weight must be \[d_out, d_in\] with d_in = 8"),
        BadSample("lora_a width", call(lora_a=torch.ones(4, 9)), ValueError, r"lora_a must be \[R, d_in\] = \[4, 8\], got \[4, 9\]"),
        BadSample("lora_b rank", call(lora_b=torch.ones(5, 3)), ValueError, r"lora_b must be \[d_out, R\] = \[5, 4\], got \[5, 3\]"),
        BadSample("bias shape", call(bias=torch.ones(4)), ValueError, r"bias must be \[d_out\] = \[5\], got \[4\]"),
        BadSample("other device", call(lora_a=torch.ones(4, 8, device="meta")), ValueError, r"lora_a must be on cpu like x, got meta"),
        BadSample("gates last dim", call(torch.ones(6, 3)), ValueError, r"gates must be broadcastable to \[\.\.\., E\] with E = 2"),
        BadSample("gates outer dim", call(torch.ones(5, 2)), ValueError, r"gates must be broadcastable to \[6, 'E'\], got \[5, 2\]"),
        BadSample("gates bool", call(torch.ones(6, 2, dtype=torch.bool)), TypeError, r"gates must be floating or integer"),
        BadSample("ids outer dim", call(torch.zeros(4, dtype=torch.int64)), ValueError, r"gates must be broadcastable to \[6\]"),
        BadSample("id too large", call(torch.tensor([0, 1, 0, 2, 0, 0])), ValueError, r"gates must be ids in -1\.\.1, got 2 at position 3"),
        BadSample("id too small", call(torch.tensor([0, -2, 0, 0, 0, 0])), ValueError, r"got -2 at position 1"),
        BadSample("ids without ranks", call(torch.zeros(6, dtype=torch.int64), {"ranks": None}), ValueError, r"ranks must be given"),
        BadSample("ranks sum", call(options={"ranks": (2, 3)}), ValueError, r"ranks must be integers that sum to R = 4"),
        BadSample("scaling count", call(options={"scaling": [1.0]}), ValueError, r"scaling must be one float or E = 2"),
        BadSample("scaling NaN", call(options={"scaling": [1.0, float("nan")]}), ValueError, r"scaling must be finite, got \[1.0, nan\]"),
        BadSample("scaling learned", call(options={"scaling": torch.ones(2, requires_grad=True)}), ValueError, r"scaling must be constant, got a tensor that requires grad"),
        BadSample("trainable count", call(options={"trainable": [True]}), ValueError, r"trainable must be one bool or E = 2"),
        BadSample("dropout range", call(options={"dropout": 1.0}), ValueError, r"dropout must be a probability in \[0, 1\)"),
        BadSample("backend name", call(options={"backend": "cutlass"}), ValueError, r"backend must be one of"),
    ]  # fmt: skip
