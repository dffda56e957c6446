"""What the Triton files share: launching, tiles and their tuning, a dot that the interpreter gets right, dropout's hash.

Imports triton, so only files named `triton.py` import this one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import COLUMN_STEP, ROW_STEP
from .library import debug_checks

__all__ = [
    "Tile",
    "Tiles",
    "bucket",
    "ceil_div",
    "dot",
    "dot_precision",
    "dtype_reason",
    "keep_tile",
    "launch",
    "num_processors",
    "pick_tile",
    "power_of_two",
    "raise_for_ids",
    "rank_tables",
    "tuning",
]

#: True where TRITON_INTERPRET=1 was set before triton was imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_UPCAST = tl.constexpr(INTERPRETED)
_ROW_STEP = tl.constexpr(ROW_STEP)
_COLUMN_STEP = tl.constexpr(COLUMN_STEP)
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if _UPCAST:
        # the interpreter multiplies bfloat16 as the integers it stores them in
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * _MIX_1
    h = h ^ (h >> 13)
    h = h * _MIX_2
    return h ^ (h >> 16)


@triton.jit
def keep_tile(seed_ptr, rows, columns, THRESHOLD: tl.constexpr):
    """bool [rows, columns], the mask of `dropout.keep_mask`."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(rows.to(tl.uint32) * _ROW_STEP + low)
    step = columns.to(tl.uint32) * _COLUMN_STEP + high
    return _mix(key[:, None] ^ step[None, :]) >= tl.full((1, 1), THRESHOLD, tl.uint32)


# -- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch: `m` rows of the output, `n` columns, `k` of the contracted dimension."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Candidates of one kernel by size of T, each tuple's first the default: T <= 64, T <= 1024, above; float32."""

    small: tuple[Tile, ...]
    medium: tuple[Tile, ...]
    large: tuple[Tile, ...]
    # products in float32 run without matrix instructions and hold twice the bytes
    float32: tuple[Tile, ...]

    def candidates(self, tokens: int, dtype: torch.dtype) -> tuple[Tile, ...]:
        if dtype == torch.float32:
            return self.float32
        return self.small if tokens <= 64 else self.medium if tokens <= 1024 else self.large


_tuning = False
_tuned: dict[tuple, Tile] = {}


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """While active, the first call of each (kernel, bucket of T, widths, dtype) times every candidate and keeps the best.

    Without it the defaults run. Nothing is timed while a CUDA graph is captured or under
    `torch.use_deterministic_algorithms(True)`, since another tile rounds differently.
    """
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def _may_time(device: torch.device) -> bool:
    if not _tuning or INTERPRETED or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _seconds(run: Callable[[], object], repeats: int = 10) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def bucket(tokens: int) -> int:
    """The power of two at or above T: what tiles are keyed by, never T itself."""
    return 1 << max(tokens - 1, 0).bit_length()


def pick_tile(key: tuple, candidates: Sequence[Tile], device: torch.device, run: Callable[[Tile], object]) -> Tile:
    """The tile for `key` (kernel's name, bucket, widths, dtype); `run` launches once and may be repeated."""
    key = (*key, device)
    if key not in _tuned and len(candidates) > 1 and _may_time(device):
        _tuned[key] = min(candidates, key=lambda tile: _seconds(lambda: run(tile)))
    return _tuned.get(key, candidates[0])


# -- launching --------------------------------------------------------------------------------------------------------


def ceil_div(number: int, block: int) -> int:
    return -(-number // block)


def power_of_two(number: int, least: int = 16) -> int:
    """The power of two at or above `number`; 16 is the least extent of a matrix instruction."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def launch(kernel, grid: tuple[int, ...], *args, warps: int, stages: int = 1, **constants) -> None:
    """Run `kernel` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    place = torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext()
    with place:
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


def dot_precision() -> str:
    """How float32 tiles are multiplied: as torch is asked to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.lru_cache(maxsize=16)
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; an H100's where there is none to ask."""
    return _processors_of(device) if device.type == "cuda" else 132


# -- arguments --------------------------------------------------------------------------------------------------------


def dtype_reason(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot share a kernel, None where they can."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        return f"triton needs tensors of one dtype, got {sorted(map(str, dtypes))}"
    if not dtypes <= set(DTYPES):
        return f"triton runs float32, bfloat16 and float16, got {dtypes.pop()}"
    return None


def raise_for_ids(op: str, gates: Tensor | None, experts: int) -> None:
    """With MLLMCL_DEBUG=1 wait for the device and raise for an id outside -1..E-1; otherwise such an id selects none."""
    if gates is None or gates.is_floating_point() or not debug_checks() or gates.numel() == 0:
        return
    wrong = (gates < -1) | (gates >= experts)
    if bool(wrong.any()):
        where = int(wrong.to(torch.uint8).argmax())
        raise ValueError(f"{op}: gates must be ids in -1..{experts - 1}, got {int(gates[where])} at position {where}")


@functools.lru_cache(maxsize=256)
def rank_tables(
    ranks: tuple[int, ...], scaling: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each rank the expert [R] int32 and the scaling [R] float32; of each expert its first rank [E + 1] int32."""
    owner = [expert for expert, rank in enumerate(ranks) for _ in range(rank)]
    starts = [sum(ranks[:expert]) for expert in range(len(ranks) + 1)]
    # built outside of inference mode, since the cache outlives it
    with torch.inference_mode(False):
        return (
            torch.tensor(owner, dtype=torch.int32, device=device),
            torch.tensor([scaling[expert] for expert in owner], dtype=torch.float32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
        )
