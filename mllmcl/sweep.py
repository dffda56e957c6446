"""Many runs from one file: every method on every stream with every seed, each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from .files import atomic_write, atomic_write_json
from .training.config import TrainConfig

__all__ = ["Cell", "SweepConfig", "cells", "is_done", "run_sweep"]


@dataclass(kw_only=True)
class SweepConfig:
    """The section `sweep` of a configuration; the rest of the file is what all runs share.

    Attributes:
        runs: the run folders go here.
        results: one JSON for each finished run goes here, and report-<stream>.html.
        methods: name -> options; "all" takes every method with its defaults.
        streams: name -> {"options": of the stream, "methods": names of the methods that run on it, all by default}.
        seeds: of the runs.
        jobs: runs side by side; they share the processors evenly unless OMP_NUM_THREADS says how many each takes.
    """

    runs: str
    results: str
    methods: dict[str, dict] | str = "all"
    streams: dict[str, dict] = field(default_factory=lambda: {"pocket-domain": {}})
    seeds: list[int] = field(default_factory=lambda: [0])
    jobs: int = 1

    def __post_init__(self) -> None:
        from . import methods

        if self.methods == "all":
            self.methods = {name: {} for name in methods.available()}
        if not isinstance(self.methods, dict):
            raise ValueError(f'sweep.methods must be "all" or name -> options, got {self.methods!r}')
        if type(self.jobs) is not int or self.jobs < 1:
            raise ValueError(f"sweep.jobs must be a whole number of at least 1, got {self.jobs!r}")
        for name, options in self.methods.items():
            methods.create(name, **(options or {}))
        for stream, settings in self.streams.items():
            unknown = set((settings or {}).get("methods", ())) - set(self.methods)
            if unknown:
                raise ValueError(f"sweep.streams.{stream}.methods must be among sweep.methods, got {sorted(unknown)}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep: its name and its whole configuration."""

    name: str
    stream: str
    request: dict

    @property
    def resolved(self) -> dict:
        """All that decides the run's numbers, defaults filled in, in values that JSON holds."""
        from . import methods

        method = methods.create(self.request["method"]["name"], **self.request["method"]["options"])
        train = TrainConfig(**self.request["train"]).deciding()
        if train["learning_rate"] is None:
            train["learning_rate"] = method.learning_rate
        model = {name: value for name, value in self.request.get("model", {}).items() if name != "feature_cache"}
        options = {item.name: getattr(method, item.name) for item in fields(method) if item.init}
        whole = {
            "method": {"name": method.name, "options": options},
            "stream": self.request["stream"],
            "model": model,
            "train": train,
        }
        return json.loads(json.dumps(whole, default=str))


def cells(sweep: SweepConfig, shared: dict) -> Iterator[Cell]:
    """The runs of a sweep, seed by seed, so that a first complete table is there early."""
    for seed in sweep.seeds:
        for stream, settings in sweep.streams.items():
            settings = settings or {}
            for method in settings.get("methods", sweep.methods):
                name = f"{Path(stream).name}-{method}-seed{seed}"
                train = {**shared.get("train", {}), "seed": seed, "output_dir": str(Path(sweep.runs) / name)}
                request = {
                    **shared,
                    "method": {"name": method, "options": sweep.methods[method] or {}},
                    "stream": {"name": stream, "options": settings.get("options", {})},
                    "train": train,
                }
                yield Cell(name=name, stream=Path(stream).name, request=request)


def is_done(cell: Cell, path: Path) -> bool:
    """Whether the JSON there is of this run, with all that decided its numbers."""
    return path.is_file() and json.loads(path.read_text()).get("resolved") == cell.resolved


def _run(cell: Cell, result: Path, jobs: int) -> str | None:
    """Run one cell to its end and write its JSON; the last line of its errors where it failed.

    What it prints goes to `output.txt` where others print too.
    """
    folder = Path(cell.request["train"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.yaml"
    atomic_write(request, yaml.safe_dump(cell.request, sort_keys=False))
    command = [sys.executable, "-m", "mllmcl", "run", str(request)]
    if jobs == 1:
        child = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    else:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
        with open(folder / "output.txt", "w") as out:
            child = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, env=share)
    if child.returncode != 0:
        atomic_write(folder / "errors.txt", child.stderr)
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    values = {
        "name": cell.name,
        "request": cell.request,
        "resolved": cell.resolved,
        "processor": _processor(),
        "matrix": json.loads((folder / "matrix.json").read_text()),
        "metrics": json.loads((folder / "metrics.json").read_text()),
    }
    atomic_write_json(result, values)
    return None


def _processor() -> str:
    """The processor's name, where the system tells one."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        if path.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def run_sweep(path: str | Path, say: Callable[[str], None]) -> int:
    """Run what is not done yet; a sweep that was cut goes on with the same command.

    `say` is given a line for each run as it starts, and one for each that failed.

    Returns:
        0, or 1 where a run failed; the others run all the same.

    Raises:
        ValueError, TypeError: an unknown method, option or key, before anything runs.
    """
    shared = yaml.safe_load(Path(path).read_text())
    sweep = SweepConfig(**shared.pop("sweep"))
    results = Path(sweep.results)
    found = list(cells(sweep, shared))

    def work(place: int, cell: Cell) -> str | None:
        result, label = results / f"{cell.name}.json", f"{place}/{len(found)} {cell.name}"
        if is_done(cell, result):
            say(f"{label}: done before")
            return None
        say(label)
        ran.add(cell.name)
        reason = _run(cell, result, sweep.jobs)
        if reason is not None:
            say(f"{cell.name} failed: {reason}")
        return reason

    done: dict[str, list[Cell]] = {}
    ran: set[str] = set()
    drawn: set[str] = set()
    pool = ThreadPoolExecutor(sweep.jobs)
    try:
        reasons = [(cell, pool.submit(work, place, cell)) for place, cell in enumerate(found, start=1)]
        # the page grows with the runs, in their order, and stays as it is where there is nothing new
        for cell, reason in reasons:
            if reason.result() is None:
                page = results / f"report-{cell.stream}.html"
                done.setdefault(cell.stream, []).append(cell)
                if cell.name in ran or not page.exists():
                    drawn.add(cell.stream)
                if cell.stream in drawn:
                    _compare(page, done[cell.stream], results)
    finally:
        # an interrupt ends the runs under way and begins no others
        pool.shutdown(cancel_futures=True)
    return 1 if any(reason.result() is not None for _, reason in reasons) else 0


def _compare(page: Path, done: list[Cell], results: Path) -> None:
    """The page over all finished runs of a stream; of those made elsewhere it shows what their JSON holds."""
    from .evaluation import write_report

    with tempfile.TemporaryDirectory() as kept:
        folders = []
        for cell in done:
            folder = Path(cell.request["train"]["output_dir"])
            if not (folder / "matrix.json").is_file():
                values = json.loads((results / f"{cell.name}.json").read_text())
                folder = Path(kept) / cell.name
                atomic_write_json(folder / "matrix.json", values["matrix"])
                atomic_write_json(folder / "metrics.json", values["metrics"])
            folders.append(folder)
        write_report(folders, page)
