"""`pytest benchmarks --benchmark-only [--results FILE] [--tiny]`: every case beside its peers, as text and JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time

import pytest
import torch

from mllmcl.files import atomic_write

from .measuring import RESULTS


def pytest_addoption(parser):
    parser.addoption("--results", default=None, help="write all cases to this JSON file")
    parser.addoption("--tiny", action="store_true", help="small sizes and few rounds: does everything run?")


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def rounds(tiny, device) -> int:
    return 3 if tiny else 100 if device.type == "cuda" else 20


def _best(run, count: int = 8) -> float:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@pytest.fixture(scope="session")
def roofline(device, dtype, tiny) -> dict[str, float]:
    """What this machine does at best, measured in this session: FLOP/s of a large product, bytes/s of a large copy."""
    size = 512 if tiny else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty((8 if tiny else 256) * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    return {
        "flops": 2 * size**3 / _best(lambda: torch.mm(a, b)),
        "bytes": 2 * big.numel() / _best(lambda: other.copy_(big)),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _record(case) -> dict:
    seconds = {name: {"median": m, "p20": low, "p80": high} for name, (m, low, high) in case.seconds.items()}
    ours = case.seconds.get("ours", (None,))[0]
    ratios = {name: value[0] / ours for name, value in case.seconds.items() if name != "ours" and ours}
    return {
        "case": case.name, "provider": case.provider, "seconds": seconds, "peer_over_ours": ratios,
        "refused": case.refused, "notes": case.notes,
    }  # fmt: skip


def pytest_terminal_summary(terminalreporter, config):
    if not RESULTS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; median ms, peer / ours")
    for case in RESULTS:
        ours = case.seconds.get("ours", (float("nan"),))[0]
        cells = [f"ours ({case.provider}) {1e3 * ours:.3f}"]
        cells += [f"{n} {1e3 * v[0]:.3f} ({v[0] / ours:.2f}x)" for n, v in case.seconds.items() if n != "ours"]
        notes = [
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in case.notes.items()
        ]
        write(f"  {case.name}: {'; '.join([*cells, *notes])}")
        for name, reason in case.refused.items():
            write(f"    {name} was not timed: {reason}")
    path = config.getoption("--results")
    if path:
        record = {
            "device": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "date": datetime.date.today().isoformat(), "cores": os.cpu_count(),
            "cases": [_record(case) for case in RESULTS],
        }  # fmt: skip
        atomic_write(path, json.dumps(record, indent=1) + "\n")
        write(f"written to {path}")
