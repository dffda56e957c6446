"""Launch parameters found by timing, kept in one file for each kind of device.

`tune` times the candidates of every kernel that a call launches; later calls and later processes look the winners up.
Where nothing was tuned, a kernel's first candidate runs, which was chosen by reasoning.

    MLLMCL_TUNING=0         no file is read and `tune` refuses
    MLLMCL_TUNING_FOLDER    where the files lie, else mllmcl_kernels/ in XDG_CACHE_HOME or ~/.cache

A file is read once, at the first launch on its device outside of a CUDA graph's capture.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

__all__ = [
    "bucket",
    "cuda_seconds",
    "current_device",
    "describe",
    "forget",
    "is_capturing",
    "pick_tile",
    "read_table",
    "table_path",
    "tune",
]

log = logging.getLogger("mllmcl_kernels")

FORMAT = 1
Winners = dict[str, tuple[int, ...]]
Timer = Callable[[Callable[[], object]], float]
Tile = TypeVar("Tile")


@dataclass
class _Session:
    """What `tune` has timed so far."""

    timer: Timer
    winners: dict[torch.device, Winners] = field(default_factory=dict)


_session: _Session | None = None
_tables: dict[torch.device, Winners] = {}
_picked: dict[tuple, object] = {}


# -- files ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    """Model, compute capability and compiler: what a winner depends on, as a file's name."""
    model = "interpreter"
    if device.type == "cuda":
        model = "{} sm{}{}".format(torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))
    try:
        compiler = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        compiler = "unknown"
    return re.sub(r"[^a-z0-9.]+", "-", f"{model} triton {compiler}".lower())


def table_path(device: torch.device) -> Path | None:
    """The device's file, there or not; None where tuning is switched off or there is no folder for it."""
    if os.environ.get("MLLMCL_TUNING", "1") == "0":
        return None
    folder = os.environ.get("MLLMCL_TUNING_FOLDER")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not os.path.isabs(cache):
            return None
        folder = os.path.join(cache, "mllmcl_kernels")
    return Path(folder) / f"{_device_name(device)}.json"


def read_table(path: Path) -> Winners:
    """Key to launch parameters; nothing where there is no file.

    Raises:
        ValueError: the file is not a tuning table.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(data)
    except ValueError as error:
        raise _refusal(path, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refusal(path, f"expected format {FORMAT}")
    winners = content.get("winners")
    if not isinstance(winners, dict):
        raise _refusal(path, "it has no winners")
    for key, numbers in winners.items():
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise _refusal(path, f"expected integers for {key!r}, got {numbers!r}")
    return {key: tuple(numbers) for key, numbers in winners.items()}


def _refusal(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not a tuning table ({reason}): delete it and tune again, or set MLLMCL_TUNING=0")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer of `path` at a time."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _add_to_table(path: Path, winners: Winners) -> None:
    """Put `winners` beside what other processes found; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        content = {"format": FORMAT, "winners": {**read_table(path), **winners}}
        # one name is enough, since there is one writer
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def describe(device: torch.device) -> str:
    """What is tuned on `device`, in words."""
    path = table_path(device)
    if path is None:
        return "switched off or without a folder: defaults run"
    try:
        winners = read_table(path)
    except (OSError, ValueError) as error:
        return str(error)
    return f"{len(winners)} winners in {path}" if winners else f"no table at {path}: defaults run"


# -- choosing ---------------------------------------------------------------------------------------------------------


def bucket(tokens: int) -> int:
    """The power of two at or above T: what tiles are keyed by, never T itself."""
    return 1 << max(tokens - 1, 0).bit_length()


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _text(key: tuple) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in key)


def _table_of(device: torch.device) -> Winners:
    """The device's winners; a file that cannot be used changes the speed alone, so it is told and passed over."""
    if device not in _tables:
        path = table_path(device)
        try:
            _tables[device] = {} if path is None else read_table(path)
        except (OSError, ValueError) as error:
            log.warning("kernels run with default tiles: %s", error)
            _tables[device] = {}
    return _tables[device]


def pick_tile(key: tuple, candidates: Sequence[Tile], device: torch.device, run: Callable[[Tile], object]) -> Tile:
    """The tile for `key` (kernel's name, bucket, widths, dtype); `run` launches once and may be repeated.

    Under `torch.use_deterministic_algorithms(True)` it is the first candidate, since another tile rounds differently.
    """
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    place = (*key, device)
    session = _session
    if session is not None and _text(key) not in session.winners.get(device, {}) and not is_capturing(device):
        best = min(candidates, key=lambda tile: session.timer(lambda: run(tile)))
        session.winners.setdefault(device, {})[_text(key)] = astuple(best)
        _picked[place] = best
    if place not in _picked:
        if device not in _tables and is_capturing(device):
            return candidates[0]
        known = _table_of(device).get(_text(key))
        # what another version of the kernel had as a candidate is no choice here
        _picked[place] = next((tile for tile in candidates if astuple(tile) == known), candidates[0])
    return _picked[place]


def forget() -> None:
    """Let go of all winners of this process; files are read anew."""
    _tables.clear()
    _picked.clear()


# -- timing -----------------------------------------------------------------------------------------------------------


def cuda_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Mean time of one `run` on the current CUDA device, after one that compiles."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def current_device() -> torch.device:
    """The CUDA device that launches go to, the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def tune(run: Callable[[], object], *, timer: Timer | None = None) -> Winners:
    """Time the launch parameters of every Triton kernel that `run()` launches; keep the winners, also for later runs.

        tune(lambda: lora_mix(x, weight, bias, a, b, gates, ranks=ranks).sum().backward())

    Args:
        run: calls ops on tensors of the shapes, dtypes and device to come; numbers of tokens between two powers of two
            share a winner.
        timer: `call -> seconds` of one call, None for the clock of the current CUDA device.

    Returns:
        Key to the winning parameters of what was timed; empty where `run` launched no kernel that has a choice.

    Raises:
        RuntimeError: tuning is switched off, torch is asked to be deterministic, a CUDA graph is being captured, or
            there is neither a CUDA device nor a timer.
        ValueError: the device's file is not a tuning table. It is left as it is.
    """
    global _session
    device = current_device()
    path = table_path(device)
    for is_so, reason in (
        (path is None, "MLLMCL_TUNING=0 is set, or there is neither a home folder nor MLLMCL_TUNING_FOLDER"),
        (torch.are_deterministic_algorithms_enabled(), "deterministic algorithms keep to the default tiles"),
        (timer is None and device.type == "cpu", "torch sees no CUDA device"),
        (is_capturing(device), "a CUDA graph is being captured"),
    ):
        if is_so:
            raise RuntimeError(f"tune: cannot time anything, since {reason}")
    read_table(path)
    before, _session = _session, _Session(timer or cuda_seconds)
    try:
        run()
        winners = _session.winners
    finally:
        _session = before
    for place, found in winners.items():
        _add_to_table(table_path(place), found)
    return {key: numbers for found in winners.values() for key, numbers in found.items()}
