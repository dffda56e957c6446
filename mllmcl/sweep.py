"""Many runs from one file: every method on every stream with every seed, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .files import atomic_write, atomic_write_json

__all__ = ["Cell", "SweepConfig", "cells", "run_sweep"]


@dataclass(kw_only=True)
class SweepConfig:
    """The section `sweep` of a configuration; the rest of the file is what all runs share.

    Attributes:
        runs: the run folders go here.
        results: one JSON for each finished run goes here, and report-<stream>.html.
        methods: name -> options; "all" takes every method with its defaults.
        streams: name -> {"options": of the stream, "methods": names of the methods that run on it, all by default}.
        seeds: of the runs.
    """

    runs: str
    results: str
    methods: dict[str, dict] | str = "all"
    streams: dict[str, dict] = field(default_factory=lambda: {"pocket-domain": {}})
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        from . import methods

        if self.methods == "all":
            self.methods = {name: {} for name in methods.available()}
        if not isinstance(self.methods, dict):
            raise ValueError(f'sweep.methods must be "all" or name -> options, got {self.methods!r}')
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
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()


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


def _is_done(cell: Cell, path: Path) -> bool:
    return path.is_file() and json.loads(path.read_text()).get("digest") == cell.digest


def _run(cell: Cell, result: Path) -> str | None:
    """Run one cell to its end and write its JSON; the last line of its errors where it failed."""
    folder = Path(cell.request["train"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.yaml"
    atomic_write(request, yaml.safe_dump(cell.request, sort_keys=False))
    child = subprocess.run(
        [sys.executable, "-m", "mllmcl", "run", str(request)], stderr=subprocess.PIPE, text=True, check=False
    )
    if child.returncode != 0:
        atomic_write(folder / "errors.txt", child.stderr)
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    values = {
        "name": cell.name,
        "digest": cell.digest,
        "request": cell.request,
        "processor": _processor(),
        "threads": os.cpu_count(),
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
    failed: dict[str, str] = {}
    done: dict[str, list[Path]] = {}
    found = list(cells(sweep, shared))
    for place, cell in enumerate(found, start=1):
        result = results / f"{cell.name}.json"
        if _is_done(cell, result):
            say(f"{place}/{len(found)} {cell.name}: done before")
        else:
            say(f"{place}/{len(found)} {cell.name}")
            reason = _run(cell, result)
            if reason is not None:
                failed[cell.name] = reason
                say(f"{cell.name} failed: {reason}")
                continue
        done.setdefault(cell.stream, []).append(Path(cell.request["train"]["output_dir"]))
        _compare(cell.stream, done[cell.stream], results)
    return 1 if failed else 0


def _compare(stream: str, folders: list[Path], results: Path) -> None:
    """The page over all finished runs of a stream that lie on this machine."""
    from .evaluation import write_report

    here = [folder for folder in folders if (folder / "matrix.json").is_file()]
    if here:
        write_report(here, results / f"report-{stream}.html")
