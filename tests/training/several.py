"""Processes for tests of runs that several share: forked from a server that has imported everything, joined by gloo.

They meet in a process group that is there before `train` is called, as in a script that makes its own; what torchrun
starts is in `test_torchrun.py`.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from .made_up_run import die_at, make_run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.training.several"])


def _enter(work: Callable, rank: int, size: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    # longer than `together` waits, so that a process that hangs is seen as such
    patience = datetime.timedelta(minutes=30)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size, timeout=patience)
    try:
        work(rank, *arguments)
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        # as a program ends that nobody catches
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def together(work: Callable, folder: Path, *arguments, size: int = 2, seconds: float = 400.0) -> list[int]:
    """Exit codes of `size` processes that run `work(rank, *arguments)`; each ends by itself, or the test fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    processes = [SERVER.Process(target=_enter, args=(work, rank, size, str(folder), arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"processes {hung} did not end"
    return [process.exitcode for process in processes]


def errors(folder: Path) -> list[str]:
    """What each process that failed said."""
    return [path.read_text() for path in sorted(folder.glob("error-*.txt"))]


def learn(rank: int, runs: list[dict], death: tuple[str, int] | None = None) -> None:
    """One run after the other; the first process dies at `death`."""
    if death is not None and rank == 0:
        die_at(*death)
    for arguments in runs:
        make_run(**arguments, ends=f"{arguments['folder']}-process-{rank}.pt")
