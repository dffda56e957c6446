"""Public benchmarks that lie in a folder as their authors hand them out; nothing is fetched.

Each has a file beside this one that says, in the terms of `stream.json`, where its parts lie and how its authors score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .base import Sample, Stream
from .llava_folder import load_tasks

__all__ = ["load_public"]

#: fields of an entry that are paths; a tuple names alternatives, of which the first that is there counts
PATHS = ("train", "test", "image_folder", "test_image_folder")


def load_public(
    name: str,
    entries: Sequence[dict],
    *,
    root: str | os.PathLike | None,
    source: str,
    note: str,
    scorer_of: Callable[[Sample], str | None] | None = None,
    tasks: Sequence[str] | None = None,
    **options,
) -> Stream:
    """The stream in `root`.

    Args:
        entries: tasks as in `stream.json`, in the order of the benchmark.
        root: the folder that the paths of the entries are relative to.
        source: where it can be got, for errors.
        scorer_of: the scorer of a test sample, or None for that of its task.
        tasks, options: num_train, num_test and seed, see `load_folder`.

    Raises:
        ValueError: no root, files that are not there (all of them), or what does not fit in one.
    """
    if root is None:
        raise ValueError(f"stream {name} needs root=, the folder with its files; get them from {source}")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root must be the folder with the files of {name}, got {os.fspath(root)!r}; {source}")
    found = [{key: _there(root, value) if key in PATHS else value for key, value in entry.items()} for entry in entries]
    wanted = [entry for entry in found if tasks is None or entry["name"] in tasks]
    missing = [entry[part] for entry in wanted for part in ("train", "test") if not (root / entry[part]).is_file()]
    if missing:
        raise ValueError(f"stream {name}: {root} lacks {', '.join(missing)}; get them from {source}")
    stream = load_tasks(root, found, name=name, note=note, tasks=tasks, **options)
    if scorer_of is None:
        return stream
    scored = (replace(task, test=[_scored(sample, scorer_of(sample)) for sample in task.test]) for task in stream.tasks)
    return replace(stream, tasks=tuple(scored))


def _there(root: Path, value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    return next((path for path in value if (root / path).exists()), value[0])


def _scored(sample: Sample, scorer: str | None) -> Sample:
    return sample if scorer is None else replace(sample, metadata={**sample.metadata, "scorer": scorer})
