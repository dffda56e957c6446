"""What a report reads of a run folder."""

# T tasks, K of them learned so far

from __future__ import annotations

import base64
import datetime
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..files import read_jsonl
from .matrix import AccuracyMatrix
from .metrics import bootstrap, compute_metrics
from .predictions import Prediction, diagnose, read_predictions, router_confusion

__all__ = ["Picture", "RunFiles", "TaskCost", "read_run"]

#: longest side of a picture in the page
PICTURE_PIXELS = 360


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample's picture as a data URI, with its size."""

    id: str
    task: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class TaskCost:
    """What learning a task took: seconds between its start and its end, seconds of the evaluation after it, bytes."""

    train_seconds: float | None
    evaluation_seconds: float | None
    peak_memory_bytes: int | None


@dataclass(kw_only=True)
class RunFiles:
    """The content of a run folder; `notes` says in words what is not there."""

    folder: Path
    matrix: AccuracyMatrix
    metrics: dict
    config: dict
    events: list[dict]
    predictions: dict[int | None, list[Prediction]]
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)

    @property
    def part(self) -> AccuracyMatrix:
        """The tasks learned so far."""
        return self.matrix.learned()

    def losses(self) -> tuple[list[tuple[int, float]], list[tuple[int, str]]]:
        """(step, loss) in order, and (first step, task) of each task.

        A run that was killed and continued has done some steps twice; the later line counts.
        """
        steps = {}
        for place, event in enumerate(self.events):
            if event.get("event") == "step" and isinstance(event.get("loss"), (int, float)):
                steps[int(event.get("step", place))] = (float(event["loss"]), event.get("task", ""))
        points, starts, current = [], [], None
        for step, (loss, task) in sorted(steps.items()):
            if task != current:
                starts.append((points[-1][0] if points else 0, task))
                current = task
            points.append((step, loss))
        return points, starts

    def costs(self) -> list[TaskCost]:
        """Time and memory of each learned task, from the events; time between a kill and its resume does not count."""
        seconds: dict[str, float] = {}
        peaks: dict[str, int] = {}
        evaluations: dict[str, float] = {}
        current, before = None, None
        for event in self.events:
            kind, now = event.get("event"), _time(event.get("time"))
            if current is not None and before is not None and now is not None and kind not in ("resume", "start"):
                seconds[current] = seconds.get(current, 0.0) + (now - before).total_seconds()
            if kind == "task_start":
                current = event.get("task")
            elif kind == "task_end":
                current = None
            elif kind == "evaluation" and event.get("after") is not None:
                evaluations[event["after"]] = event.get("seconds")
            if kind == "step" and event.get("peak_memory_bytes") is not None:
                task = event.get("task")
                peaks[task] = max(peaks.get(task, 0), int(event["peak_memory_bytes"]))
            before = now
        return [
            TaskCost(
                train_seconds=seconds.get(name),
                evaluation_seconds=evaluations.get(name),
                peak_memory_bytes=peaks.get(name),
            )
            for name in self.part.tasks
        ]

    def answers(self, sample_id: str, task: str) -> list[tuple[int | None, Prediction]]:
        """(row, prediction) of one item, in the order of the rows, zero-shot first."""
        rows = sorted(self.predictions, key=lambda row: -1 if row is None else row)
        return [
            (row, item) for row in rows for item in self.predictions[row] if (item.id, item.task) == (sample_id, task)
        ]


def _time(text: object) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None


def read_run(folder: str | Path) -> RunFiles:
    """Read a run folder, finished or not.

    Only `matrix.json` has to be there, with at least one task learned. Intervals, routing and error rates that
    `metrics.json` lacks are computed from the predictions.

    Raises:
        FileNotFoundError: no `matrix.json`. ValueError: a damaged file, or no task learned yet; both name the file.
    """
    folder = Path(folder)
    path = folder / "matrix.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a report needs at least the accuracy matrix of a run")
    matrix = AccuracyMatrix.load(path)
    if matrix.num_learned == 0:
        raise ValueError(f"{path}: no task has been learned yet, so there is nothing to report")
    notes: list[str] = []
    if not matrix.is_complete:
        notes.append(
            f"The run has learned {matrix.num_learned} of {len(matrix.tasks)} tasks; all numbers are over these."
        )
    run = RunFiles(
        folder=folder,
        matrix=matrix,
        metrics=_read_object(folder / "metrics.json", json.loads, notes, "costs of the run are not known"),
        config=_read_object(folder / "config.yaml", yaml.safe_load, notes, "the set-up is not known"),
        events=_read_events(folder / "events.jsonl", notes),
        predictions=read_predictions(folder),
        pictures=_read_pictures(folder / "samples", notes),
        notes=notes,
    )
    if not run.predictions:
        notes.append("No predictions/*.jsonl: no intervals, error rates or answers to single questions.")
    _complete(run)
    return run


def _read_object(path: Path, parse, notes: list[str], loss: str) -> dict:
    if not path.is_file():
        notes.append(f"No {path.name}: {loss}.")
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _read_events(path: Path, notes: list[str]) -> list[dict]:
    if path.is_file():
        return read_jsonl(path)
    notes.append("No events.jsonl: no loss curve, no time and memory per task.")
    return []


def _read_pictures(folder: Path, notes: list[str]) -> list[Picture]:
    path = folder / "samples.json"
    if not path.is_file():
        notes.append("No samples/samples.json: no pictures.")
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [_picture(folder, entry) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a list of id, task and file of a picture beside it: {error!r}") from error


def _picture(folder: Path, entry: dict) -> Picture:
    from PIL import Image

    # a bare file name, so that the page cannot be made to show files from elsewhere
    path = folder / Path(entry["file"]).name
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        data = io.BytesIO()
        image.save(data, format="PNG")
        uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
        return Picture(id=entry["id"], task=entry["task"], uri=uri, width=image.width, height=image.height)


def _complete(run: RunFiles) -> None:
    """Fill in what `metrics.json` leaves open and the other files tell."""
    part = run.part
    metrics = {**compute_metrics(run.matrix), **{key: item for key, item in run.metrics.items() if item is not None}}
    final = [item for item in run.predictions.get(part.num_learned - 1, ()) if item.task in part.tasks]
    if run.predictions and metrics["intervals"] is None:
        try:
            metrics["intervals"] = bootstrap(part.tasks, run.predictions)
        except ValueError as error:
            run.notes.append(f"No intervals: {error}.")
    if metrics["router"] is None:
        metrics["router"] = router_confusion(final, part.tasks)
    if metrics["errors"] is None and final:
        metrics["errors"] = diagnose(final, part.tasks)
    run.metrics = metrics
