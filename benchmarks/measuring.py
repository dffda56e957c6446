"""Contestants taken in turn, in one process and one run; what is told are medians and ratios, never a time alone."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllmcl_kernels.library import BACKENDS
from mllmcl_kernels.op import Op
from mllmcl_kernels.testing import excess
from mllmcl_kernels.tuning import table_path, tune

__all__ = ["RESULTS", "Case", "best_seconds", "misses", "other_backends", "providers_used", "race", "tuned"]

#: entries of a tensor that the error rule looks at, in regular steps
MOST_CHECKED = 1_000_000
#: a case ends after so many seconds once it has the rounds that a percentile needs
ENOUGH_SECONDS, ENOUGH_ROUNDS = {"cpu": 8.0, "cuda": 3.0}, 9


@dataclass
class Case:
    """One comparison.

    seconds   of every contestant: median, 20th and 80th percentile
    providers which backend ran each op when ours was called
    refused   contestants that were not timed, and why
    rounds    how often each of them ran
    flops, bytes    work of the step at the limit of the hardware; the one that is given is told against the machine's
    """

    group: str
    name: str
    providers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    flops: int | None = None
    bytes: int | None = None
    notes: dict = field(default_factory=dict)
    rounds: int = 0

    def ratios(self) -> dict[str, float]:
        """Peer over ours: above 1 ours is faster."""
        if "ours" not in self.seconds:
            return {}
        ours = self.seconds["ours"][0]
        return {name: value[0] / ours for name, value in self.seconds.items() if name != "ours"}


RESULTS: list[Case] = []


@contextlib.contextmanager
def providers_used() -> Iterator[dict[str, str]]:
    """Fills a table of op name -> backend with every provider that is chosen inside."""
    used: dict[str, str] = {}
    choose, at_once = Op.choose, Op.at_once

    def chosen(self, args, backend):
        provider = choose(self, args, backend)
        used[self.name] = provider.backend
        return provider

    def done(self, *args, backend=None):
        found = at_once(self, *args, backend=backend)
        if found:
            used[self.name] = self.first_asked(backend)
        return found

    Op.choose, Op.at_once = chosen, done
    try:
        yield used
    finally:
        Op.choose, Op.at_once = choose, at_once


def other_backends(op: Op, default: str) -> list[str]:
    """Compiled backends of an op that can run here besides the one that is chosen by itself."""
    return [
        name
        for name in BACKENDS
        if name not in (default, "reference")
        and not isinstance(op.find(name), str)
        and not (name == "triton" and not torch.cuda.is_available())
    ]


def misses(
    mine: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], names: Sequence[str]
) -> str | None:
    """Which output or gradient breaks the error rule, or None."""
    for name, *triple in zip(names, mine, plain, truth, strict=True):
        step = max(1, triple[0].numel() // MOST_CHECKED) | 1
        off = excess(*(tensor.reshape(-1)[::step] for tensor in triple))
        if not off.passes:
            return f"{name} misses the error rule: {off}"
    return None


def best_seconds(run: Callable[[], object], device: torch.device, count: int = 8) -> float:
    return min(_seconds(run, device, None) for _ in range(count))


def _seconds(run: Callable[[], object], device: torch.device, flush: Tensor | None) -> float:
    """Time of one call; on a GPU between two events, after the cache was flushed."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def tuned(case: Case, run: Callable[[], object], device: torch.device, name: str = "ours") -> None:
    """On a GPU let `run` find its launch parameters, and note what it took before and what was found."""
    if device.type != "cuda" or table_path(device) is None:
        return
    run()
    case.notes[f"{name} before tuning, ms"] = 1e3 * statistics.median(_seconds(run, device, None) for _ in range(20))
    for key, numbers in tune(run).items():
        case.notes[f"tuned {key}"] = " ".join(map(str, numbers))


def orders(count: int) -> list[list[int]]:
    """Orders of so many contestants in which each comes right after every other equally often.

    What ran before leaves caches and sleeping cores behind, and would otherwise always hit the same one. Williams,
    Experimental designs balanced for the estimation of residual effects of treatments (1949).
    """
    zigzag = [0, *(place // 2 + 1 if place % 2 == 0 else count - 1 - place // 2 for place in range(count - 1))]
    found = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return found if count % 2 == 0 else [*found, *(order[::-1] for order in found)]


def race(case: Case, contestants: dict[str, Callable], device: torch.device, rounds: int, warm: int = 2) -> Case:
    """Run every contestant once a round, in orders that balance what each comes after, and keep what all rounds say.

    A peer that fails at the first try is left out and told; ours fails the case.
    """
    contestants = dict(contestants)
    for name, run in list(contestants.items()):
        try:
            for _ in range(warm):
                run()
        except Exception as error:
            if name.startswith("ours"):
                raise
            case.refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del contestants[name]
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    turns = orders(len(names))
    began = time.monotonic()
    for turn in range(rounds):
        if turn >= ENOUGH_ROUNDS and time.monotonic() - began > ENOUGH_SECONDS[device.type]:
            break
        case.rounds = turn + 1
        for name in (names[place] for place in turns[turn % len(turns)]):
            times[name].append(_seconds(contestants[name], device, flush))
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        case.seconds[name] = (statistics.median(values), cuts[0], cuts[3])
    return case
