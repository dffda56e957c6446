"""Contestants taken in turn, in one process and one run; what is told are medians and ratios, never a time alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["RESULTS", "Case", "race"]


@dataclass
class Case:
    """One comparison: seconds of every contestant (median, 20th and 80th percentile), and who was refused and why."""

    name: str
    provider: str
    seconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cost: tuple[int, int] | None = None
    notes: dict = field(default_factory=dict)


RESULTS: list[Case] = []


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(case: Case, contestants: dict[str, Callable], device: torch.device, rounds: int, warm: int = 3) -> Case:
    """Run every contestant once a round, in an order that turns, and keep what all rounds say."""
    for run in contestants.values():
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    flush = torch.empty(64 * 2**20 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            flush.zero_()
            _wait(device)
            began = time.perf_counter()
            contestants[name]()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        case.seconds[name] = (statistics.median(values), cuts[0], cuts[3])
    RESULTS.append(case)
    return case
