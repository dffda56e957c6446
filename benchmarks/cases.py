"""The shapes that are timed, by device; `--tiny` shrinks every one of them."""

# T tokens, K in, N out, E experts, r rank of one expert

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = [
    "LayerCase",
    "ListCase",
    "LossCase",
    "MixCase",
    "ModelCase",
    "RouteCase",
    "SharedCase",
    "ShrinkCase",
    "adamw_cases",
    "anchor_cases",
    "block_cases",
    "ema_cases",
    "importance_cases",
    "llava_cases",
    "loss_cases",
    "mix_cases",
    "orthogonality_cases",
    "projection_cases",
    "route_cases",
    "routed_cases",
    "sampled_cases",
    "shared_cases",
    "shrink_cases",
]

DEFAULT = "default"
AUTOTUNED = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class MixCase:
    """One call of `lora_mix` or `lora_mix_routed`.

    gates: "token" (softmax `[T, E]`), "sample" (one id for each of `samples` equal runs of tokens), "none".
    top_k: for the routed op; None keeps every expert.
    compiled: the mode in which torch.compile runs as a peer, None where it stays out.
    graph: time a replayed CUDA graph of the forward instead of its launches.
    """

    tokens: int
    width: int
    out: int
    experts: int
    rank: int
    gates: str = "token"
    samples: int = 8
    top_k: int | None = None
    dropout: float = 0.0
    backward: bool = True
    compiled: str | None = None
    graph: bool = False

    def __str__(self) -> str:
        size = f"d={self.width}" if self.width == self.out else f"{self.width}->{self.out}"
        words = [f"T={self.tokens} {size} E={self.experts} r={self.rank}"]
        if self.gates == "sample":
            words.append(f"ids of {self.samples} samples")
        if self.top_k:
            words.append(f"top {self.top_k}")
        if self.dropout:
            words.append(f"dropout {self.dropout}")
        words.append("forward+backward" if self.backward else "forward")
        if self.graph:
            words.append("CUDA graph")
        if self.compiled == AUTOTUNED:
            words.append("torch.compile autotuned")
        return ", ".join(words)


@dataclass(frozen=True)
class SharedCase:
    """One call of `lora_mix_shared`, or with `routed` of `lora_mix_routed_shared`, forward and backward."""

    tokens: int
    width: int
    outs: tuple[int, ...]
    experts: int
    rank: int
    routed: bool

    def __str__(self) -> str:
        outs = "+".join(map(str, self.outs))
        gates = "a router each" if self.routed else "gates given"
        return f"T={self.tokens} {self.width}->{outs} E={self.experts} r={self.rank}, {gates}, forward+backward"


@dataclass(frozen=True)
class RouteCase:
    """One call of `route` with both auxiliary losses, forward and backward."""

    tokens: int
    width: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.width} E={self.experts} k={self.top_k}, balance and z loss, forward+backward"


@dataclass(frozen=True)
class LossCase:
    """One call of a loss on a frozen head, forward and backward to hidden.

    loss: "soft targets", "teacher" (all its logits), "cached teacher" (`entries` of them).
    """

    loss: str
    tokens: int
    width: int
    vocabulary: int
    entries: int = 0

    def __str__(self) -> str:
        kept = f" of {self.entries}" if self.entries else ""
        return f"{self.loss}{kept}, T={self.tokens} d={self.width} V={self.vocabulary}, frozen head, forward+backward"


@dataclass(frozen=True)
class ListCase:
    """One call over a list of tensors of these `shapes`, experts stacked along the dimensions in `dims`.

    work: what is done, where the op has more than one way.
    columns: whether what is stacked along dimension 1 lies by columns in memory; peers have rows.
    """

    title: str
    work: str
    mask: str
    shapes: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]
    experts: int
    rank: int
    columns: bool = False

    def __str__(self) -> str:
        millions = sum(rows * columns for rows, columns in self.shapes) / 1e6
        parts = (self.title, f"{len(self.shapes)} tensors", f"{millions:.1f} M entries", self.work, self.mask)
        parts = (*parts, "B by columns" if self.columns else "")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class ModelCase:
    """A training step of decoder layers with experts on all seven linears of each, frozen otherwise.

    model: "block", decoder layers alone, or "LLaVA", with CLIP's tower, projector, vocabulary and answers.
    samples, length: the batch and the positions of a sample, images included.
    """

    model: str
    layers: int
    width: int
    inner: int
    heads: int
    experts: int
    rank: int
    samples: int
    length: int

    def __str__(self) -> str:
        size = f"{self.layers} layers of {self.width}, {self.inner}"
        return f"{self.model}, {size}, E={self.experts} r={self.rank}, {self.samples} samples of {self.length}"


@dataclass(frozen=True)
class ShrinkCase:
    """x [T, K] times A [R, K]."""

    tokens: int
    width: int
    rank: int

    def __str__(self) -> str:
        return f"x A^T, T={self.tokens} K={self.width} R={self.rank}"


@dataclass(frozen=True)
class LayerCase:
    """One call over adapters of rank `rank` of every linear K -> N in `linears`; 0 is the whole weight's gradient.

    number: of what `unit` says, in each layer.
    """

    linears: tuple[tuple[int, int], ...]
    rank: int
    number: int
    unit: str

    def __str__(self) -> str:
        what = f"r={self.rank}" if self.rank else "whole weights"
        return f"{len(self.linears)} linears of up to {max(map(max, self.linears))}, {what}, {self.number} {self.unit}"


MIX = {
    "cpu": (
        MixCase(512, 2048, 2048, 8, 16, compiled=DEFAULT),
        MixCase(512, 2048, 2048, 8, 16, dropout=0.05),
        MixCase(512, 576, 576, 8, 16, compiled=DEFAULT),
        MixCase(64, 2048, 2048, 8, 16),
        MixCase(8, 2048, 2048, 8, 16, backward=False),
        MixCase(1, 2048, 2048, 8, 16, backward=False),
        MixCase(512, 2048, 2048, 8, 16, gates="sample"),
        MixCase(512, 2048, 2048, 1, 16, gates="none"),
    ),
    # the most telling ones first: time may run out
    "cuda": (
        MixCase(4096, 4096, 4096, 8, 16, backward=False, compiled=DEFAULT),
        MixCase(4096, 4096, 4096, 8, 16, compiled=DEFAULT),
        MixCase(4096, 4096, 4096, 8, 16, backward=False, graph=True),
        MixCase(4096, 4096, 4096, 8, 16, graph=True),
        MixCase(4096, 4096, 11008, 8, 16),
        MixCase(4096, 11008, 4096, 8, 16),
        MixCase(4096, 4096, 4096, 8, 64, compiled=DEFAULT),
        MixCase(16384, 4096, 4096, 8, 16),
        MixCase(8192, 4096, 4096, 8, 16, gates="sample"),
        MixCase(8192, 4096, 4096, 8, 16, gates="sample", backward=False),
        MixCase(1, 4096, 4096, 8, 16, backward=False, graph=True),
        MixCase(64, 4096, 4096, 8, 16, backward=False, graph=True),
        MixCase(1, 4096, 4096, 8, 16, gates="sample", samples=1, backward=False, graph=True),
        MixCase(1, 4096, 4096, 8, 16, backward=False),
        MixCase(64, 4096, 4096, 8, 16, backward=False),
        MixCase(4096, 4096, 4096, 1, 16, gates="none"),
        MixCase(4096, 4096, 4096, 8, 16, dropout=0.05),
        MixCase(8192, 5120, 5120, 8, 16, gates="sample"),
        MixCase(8192, 8192, 8192, 8, 16, gates="sample"),
        MixCase(4096, 4096, 4096, 8, 16, backward=False, compiled=AUTOTUNED),
    ),
}
ROUTED = {
    "cpu": (MixCase(512, 2048, 2048, 8, 16), MixCase(512, 2048, 2048, 8, 16, top_k=2)),
    "cuda": (
        MixCase(4096, 4096, 4096, 16, 64, top_k=2),
        MixCase(4096, 4096, 4096, 16, 64, top_k=2, backward=False),
        MixCase(16384, 4096, 4096, 16, 64, top_k=2),
        MixCase(4096, 4096, 4096, 8, 16),
    ),
}
# q, k, v; gate, up
SHARED = {
    "cpu": (
        SharedCase(512, 2048, (2048,) * 3, 8, 16, False),
        SharedCase(512, 2048, (2048,) * 3, 8, 16, True),
        SharedCase(512, 576, (576, 192, 192), 8, 16, True),
        SharedCase(512, 576, (1536,) * 2, 8, 16, True),
    ),
    "cuda": (
        SharedCase(4096, 4096, (4096,) * 3, 8, 16, True),
        SharedCase(4096, 4096, (11008,) * 2, 8, 16, True),
        SharedCase(4096, 4096, (4096,) * 3, 8, 16, False),
    ),
}
ROUTE = {
    "cpu": (RouteCase(4096, 512, 8, 2), RouteCase(4096, 512, 64, 8)),
    "cuda": tuple(
        RouteCase(tokens, 4096, *choice) for tokens in (4096, 16384) for choice in ((8, 2), (16, 1), (64, 8))
    ),
}
# answer tokens of a batch; heads of SmolLM2-135M and of Vicuna-7B
BLOCK = {
    "cpu": (ModelCase("block", 1, 2048, 5632, 16, 8, 16, 1, 512),),
    "cuda": (ModelCase("block", 1, 4096, 11008, 32, 8, 16, 2, 2048),),
}
# a LLaVA-1.5-7B: 576 of the positions are those of an image
LLAVA = {"cuda": (ModelCase("LLaVA", 32, 4096, 11008, 32, 8, 16, 2, 704),)}
LOSS = {"cpu": (256, 576, 49152), "cuda": (4096, 4096, 32000)}
MASKS = ("no mask", "1 of 8 experts active", "half of the entries active")


def mix_cases(device: str) -> tuple[MixCase, ...]:
    return MIX[device]


def routed_cases(device: str) -> tuple[MixCase, ...]:
    return ROUTED[device]


def shared_cases(device: str) -> tuple[SharedCase, ...]:
    return SHARED[device]


def loss_cases(device: str) -> tuple[LossCase, ...]:
    size = LOSS[device]
    return LossCase("soft targets", *size), LossCase("teacher", *size), LossCase("cached teacher", *size, 64)


def block_cases(device: str) -> tuple[ModelCase, ...]:
    return BLOCK[device]


def llava_cases(device: str) -> tuple[ModelCase, ...]:
    """For a CPU only what `shrink` makes of it."""
    return LLAVA["cuda"]


def shrink_cases(device: str) -> tuple[ShrinkCase, ...]:
    if device == "cuda":
        return tuple(ShrinkCase(tokens, 4096, rank) for tokens in (4096, 512, 64) for rank in (128, 16, 256))
    return ShrinkCase(512, 2048, 128), ShrinkCase(64, 2048, 128)


def route_cases(device: str) -> tuple[RouteCase, ...]:
    return ROUTE[device]


#: a layer of 2048, for a CPU
WIDE_LAYER = (*((2048, 2048),) * 4, *((2048, 5632),) * 2, (5632, 2048))
#: q, k, v, o, gate, up, down of SmolLM2-135M, which has 30 such layers
SMALL_LAYER = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))


def _lora_shapes(layers: int, linears: tuple[tuple[int, int], ...], total: int) -> tuple[tuple[int, int], ...]:
    """lora_a `[R, K]` and lora_b `[N, R]` of every linear K -> N of every layer."""
    return tuple(shape for width, out in linears for shape in ((total, width), (out, total))) * layers


def _lists(device: str, works: tuple[tuple[str, str], ...], one: str | None = None) -> tuple[ListCase, ...]:
    """The adapters of every linear of a language model, and one large tensor for the work `one`."""
    if device == "cuda":
        experts, rank, shapes = 8, 16, _lora_shapes(32, ((4096, 4096),) * 7, 128)
    else:
        experts, rank, shapes = 8, 8, _lora_shapes(30, SMALL_LAYER, 64)
    dims = tuple(place % 2 for place in range(len(shapes)))
    every = [ListCase("LoRA experts", work, mask, shapes, dims, experts, rank) for work, mask in works]
    if one is not None:
        large = ((20000, 1024),) if device == "cuda" else ((20000, 1000),)
        every.append(ListCase("one tensor", one, "no mask", large, (0,), 8, 2500))
    return tuple(every)


def adamw_cases(device: str) -> tuple[ListCase, ...]:
    small = _lists(device, tuple(("", mask) for mask in MASKS), "")
    wide = ()
    if device == "cpu":
        shapes = _lora_shapes(4, WIDE_LAYER, 128)
        dims = tuple(place % 2 for place in range(len(shapes)))
        wide = tuple(ListCase("LoRA experts of 16 on 2048", "", mask, shapes, dims, 8, 16) for mask in MASKS[:2])
    cases = (*small, *wide)
    return (*cases, *(replace(case, columns=True) for case in cases if case.mask == MASKS[1]))


def ema_cases(device: str) -> tuple[ListCase, ...]:
    works = [("constant rate", mask) for mask in MASKS]
    works += [(work, "no mask") for work in ("dema by tensor", "dema by expert", "pema by entry")]
    return _lists(device, tuple(works), "dema by tensor")


def importance_cases(device: str) -> tuple[ListCase, ...]:
    return _lists(device, (("mean of squares", MASKS[0]), ("mean of squares", MASKS[1]), ("maxima, owners", MASKS[0])))


def anchor_cases(device: str) -> tuple[ListCase, ...]:
    return _lists(device, (("", MASKS[0]), ("", MASKS[1]), ("bfloat16 importances", MASKS[0])))


def _layers(device: str, unit: str, choices: dict[str, tuple[tuple[int, int], ...]]) -> tuple[LayerCase, ...]:
    """Every linear of a language model for each (rank, number); of a whole weight one layer."""
    layer, count = (((4096, 4096),) * 7, 32) if device == "cuda" else (SMALL_LAYER, 30)
    return tuple(LayerCase(layer * (count if rank else 1), rank, number, unit) for rank, number in choices[device])


def orthogonality_cases(device: str) -> tuple[LayerCase, ...]:
    return _layers(device, "old ranks", {"cpu": ((8, 8), (8, 56), (16, 112)), "cuda": ((8, 56), (16, 112), (64, 448))})


def projection_cases(device: str) -> tuple[LayerCase, ...]:
    choices = {"cpu": ((8, 64), (64, 64), (0, 64)), "cuda": ((16, 256), (128, 256), (0, 256))}
    return _layers(device, "directions", choices)


def sampled_cases(device: str) -> tuple[LayerCase, ...]:
    return _layers(device, "per mille of the entries", {"cpu": ((8, 20), (64, 20)), "cuda": ((16, 20), (128, 20))})


def shrink(case):
    """The same case at a size that takes no time."""
    if isinstance(case, LayerCase):
        return replace(case, linears=((64, 96), (96, 64)) * 2, rank=min(case.rank, 4), number=min(case.number, 24))
    if isinstance(case, MixCase):
        tokens, out = min(case.tokens, 32), 64 if case.width == case.out else 96
        small = replace(case, tokens=tokens, width=64, out=out, rank=4, samples=min(case.samples, 4))
        return replace(small, compiled=None, graph=case.graph and torch.cuda.is_available())
    if isinstance(case, SharedCase):
        return replace(case, tokens=32, width=64, outs=(64, 32, 32)[: len(case.outs)], rank=4)
    if isinstance(case, LossCase):
        return replace(case, tokens=16, width=32, vocabulary=300)
    if isinstance(case, RouteCase):
        return replace(case, tokens=64, width=32)
    if isinstance(case, ShrinkCase):
        return replace(case, tokens=min(case.tokens, 64), width=64, rank=min(case.rank, 16))
    if isinstance(case, ModelCase):
        sizes = {"layers": min(case.layers, 2), "width": 32, "inner": 48, "heads": 4, "experts": 4, "rank": 2}
        return replace(case, **sizes, samples=2, length=24)
    if len(case.shapes) == 1:
        return replace(case, shapes=((8 * 4, 32),), rank=4)
    shapes = _lora_shapes(2, ((64, 96),), case.experts * 4)
    return replace(case, shapes=shapes, dims=(0, 1) * (len(shapes) // 2), rank=4)
