"""`pytest benchmarks --benchmark-only [--results FILE] [--seconds N] [--tiny]`: every case beside its peers."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import time

import pytest
import torch

from mllmcl.files import atomic_write

from . import cases
from .measuring import RESULTS, Case, best_seconds

TABLES = {
    "mix_case": cases.mix_cases,
    "routed_case": cases.routed_cases,
    "route_case": cases.route_cases,
    "shared_case": cases.shared_cases,
    "block_case": cases.block_cases,
    "llava_case": cases.llava_cases,
    "shrink_case": cases.shrink_cases,
    "loss_case": cases.loss_cases,
    "adamw_case": cases.adamw_cases,
    "ema_case": cases.ema_cases,
    "importance_case": cases.importance_cases,
    "anchor_case": cases.anchor_cases,
    "orthogonality_case": cases.orthogonality_cases,
    "projection_case": cases.projection_cases,
    "sampled_case": cases.sampled_cases,
}
PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "moe-ops", "polylora", "liger-kernel", "torch-optimi")
#: files in the order in which they tell most, for when time runs out; the first cases of `test_lora_mix.py` lead
FIRST = ("test_model_steps.py", "test_lora_mix_routed.py", "test_limits.py", "test_lora_mix.py", "test_route.py",
         "test_masked_adamw.py", "test_shared_input.py", "test_linear_losses.py")  # fmt: skip
LEADERS = 4
BEGAN = time.monotonic()
ROOFLINE = pytest.StashKey[dict]()
LATE = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--results", default=None, help="write all cases to this JSON file")
    parser.addoption("--tiny", action="store_true", help="small sizes and few rounds: does everything run?")
    parser.addoption("--table", choices=("cpu", "cuda"), default=None, help="the cases of this kind of device")
    parser.addoption("--seconds", type=float, default=None, help="begin no case after so many seconds")


def pytest_collection_modifyitems(items):
    mixing = [item for item in items if item.path.name == "test_lora_mix.py"]
    leaders = {item: place for place, item in enumerate(mixing[:LEADERS])}
    ranks = {name: len(leaders) + place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: leaders.get(item, ranks.get(item.path.name, len(leaders) + len(FIRST))))


def pytest_runtest_setup(item):
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - BEGAN > limit:
        item.config.stash.setdefault(LATE, []).append(item.name)
        pytest.skip(f"the {limit:g} seconds are over")


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Once:
        """What is left of the `benchmark` fixture without its package: the cases print their own table."""

        def __init__(self) -> None:
            self.extra_info: dict = {}

        def pedantic(self, run, rounds: int = 1):
            return run()

    @pytest.fixture
    def benchmark() -> _Once:
        return _Once()


def pytest_generate_tests(metafunc):
    for name, table in TABLES.items():
        if name in metafunc.fixturenames:
            kind = metafunc.config.getoption("--table")
            found = table(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
            if metafunc.config.getoption("--tiny"):
                found = list(dict.fromkeys(map(cases.shrink, found)))
            metafunc.parametrize(name, found, ids=str)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def rounds(request, device) -> int:
    return 3 if request.config.getoption("--tiny") else 100 if device.type == "cuda" else 21


@pytest.fixture(scope="session", autouse=True)
def roofline(request, device, dtype):
    """This machine at best: FLOP/s of a large product, bytes/s of a large copy, before and after the cases."""
    tiny = request.config.getoption("--tiny")
    size = 512 if tiny else 8192 if device.type == "cuda" else 2048
    numbers = (2 if tiny else 256 if device.type == "cuda" else 64) * 2**20
    best = request.config.stash.setdefault(ROOFLINE, {"flops": 0.0, "bytes": 0.0})

    def measure():
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best["flops"] = max(best["flops"], 2 * size**3 / best_seconds(lambda: torch.mm(a, b), device))
        big = torch.zeros(numbers, device=device)
        other = torch.zeros_like(big)
        best["bytes"] = max(best["bytes"], 8 * numbers / best_seconds(lambda: other.copy_(big), device))

    measure()
    yield
    measure()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu(), "cpu": _cpu(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load": os.getloadavg(), "versions": _versions(),
        "cuda": torch.version.cuda if cuda else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _rates(case: Case, best: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Of every contestant the useful work per second, and its share of what the machine does at best."""
    kind = "flops" if case.flops else "bytes"
    work = case.flops or case.bytes
    if not work or kind not in best:
        return {}
    rates = {name: work / median for name, (median, _, _) in case.seconds.items() if name != "base linear"}
    return {name: (rate, rate / best[kind]) for name, rate in rates.items()}


def _record(case: Case, best: dict[str, float]) -> dict:
    seconds = {name: {"median": m, "p20": low, "p80": high} for name, (m, low, high) in case.seconds.items()}
    rates = {name: {"per_second": rate, "share": share} for name, (rate, share) in _rates(case, best).items()}
    return {
        "op": case.group, "case": case.name, "providers": case.providers, "rounds": case.rounds, "seconds": seconds,
        "peer_over_ours": case.ratios(), "flops": case.flops, "bytes": case.bytes, "rates": rates,
        "refused": case.refused, "notes": case.notes,
    }  # fmt: skip


def _lines(case: Case, best: dict[str, float]):
    ran = ", ".join(f"{op} {backend}" for op, backend in case.providers.items())
    yield (
        f"{case.group}: {case.name}"
        + (f"  [{ran}]" if ran else "")
        + (f"  {case.rounds} rounds" if case.rounds else "")
    )
    rates, ratios = _rates(case, best), case.ratios()
    unit = "GFLOP/s" if case.flops else "GB/s"
    for name, (median, low, high) in case.seconds.items():
        line = f"    {name:<26}{1e3 * median:>10.3f} ms {1e3 * low:>10.3f} ..{1e3 * high:>9.3f}"
        line += f"{ratios[name]:>9.2f}x" if name in ratios else " " * 10
        if name in rates:
            line += f"{rates[name][0] / 1e9:>10.1f} {unit} {100 * rates[name][1]:>4.0f} %"
        yield line
    for name, reason in case.refused.items():
        yield f"    {name:<26} not timed: {reason}"
    for name, value in case.notes.items():
        told = value if isinstance(value, str) else f"{value:>10,.2f}" if isinstance(value, float) else f"{value:>10,}"
        yield f"    {name:<26}{told}"


def _write_results(config) -> None:
    """All cases so far, for whoever is stopped before the end."""
    path = config.getoption("--results")
    if path and RESULTS:
        best = config.stash.get(ROOFLINE, {})
        record = {**_machine(), "best": best, "not_begun": config.stash.get(LATE, [])}
        record["cases"] = [_record(case, best) for case in RESULTS]
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        atomic_write(path, json.dumps(record, indent=1) + "\n")


@pytest.fixture(autouse=True)
def results(request, device):
    """After every case its lines are printed, what there is is written, and the device's memory is let go."""
    before = len(RESULTS)
    yield
    _write_results(request.config)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for case in RESULTS[before:]:
            print("\n".join(["", *_lines(case, request.config.stash.get(ROOFLINE, {}))]), flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter, config):
    if not RESULTS:
        return
    write, machine, best = terminalreporter.write_line, _machine(), config.stash.get(ROOFLINE, {})
    write("")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    write(f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores, {versions}")
    if best:
        write(f"at best here: product {best['flops'] / 1e9:.0f} GFLOP/s, copy {best['bytes'] / 1e9:.1f} GB/s")
    write("median, 20th .. 80th percentile, peer / ours, useful work per second and its share of the best")
    for case in RESULTS:
        for line in _lines(case, best):
            write(line)
    late = config.stash.get(LATE, [])
    if late:
        write(f"not begun, out of time: {', '.join(late)}")
    _write_results(config)
    if config.getoption("--results"):
        write(f"written to {config.getoption('--results')}")
