"""Run folders with made-up numbers, to test and to look at reports. Nothing in them was measured.

python -m tests.evaluation.made_up FOLDER     two runs and the pages of one and of both
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from mllmcl.evaluation import AccuracyMatrix, Prediction, compute_metrics, mean_scores, write_predictions, write_report
from mllmcl.files import atomic_write_json

NOTE = "Made-up test data: no model was trained and nothing was measured; this only shows what a report looks like."

TASKS = {
    "remote sensing": ("Is there a water area in the image?", ("yes", "no", "urban", "rural")),
    "medical": ("What is shown in the image?", ("lung", "liver", "kidney", "brain")),
    "driving": ("What should the car do?", ("brake", "keep going", "turn left", "turn right")),
    "science": ("Which label belongs to the marked part?", ("A", "B", "C", "D")),
    "finance": ("Did the price rise on the last day?", ("rise", "fall", "flat")),
}


def make_run(
    folder: Path,
    *,
    method: str = "made_up_router",
    seed: int = 0,
    keep: float = 0.97,
    num_test: int = 120,
    learned: int = 5,
) -> Path:
    """A run folder as training writes it; `keep` is the share of a task's skill that each later task leaves."""
    random = np.random.default_rng(seed)
    tasks = list(TASKS)
    peak = random.uniform(0.72, 0.93, len(tasks))
    matrix = AccuracyMatrix(
        tasks=tuple(tasks), num_test=(num_test,) * len(tasks), stream="made-up", method=method, seed=seed
    )
    predictions = {}
    for row in [None, *range(learned)]:
        predictions[row] = _answers(random, tasks, peak, keep, num_test, row)
        matrix = matrix.with_row(row, mean_scores(predictions[row], tasks))
        name = "0-zero-shot" if row is None else f"{row + 1}-{tasks[row]}"
        write_predictions(folder / "predictions" / f"{name}.jsonl", predictions[row], row)
    matrix.save(folder / "matrix.json")
    _write_metrics(folder, matrix, predictions, keep)
    _write_config(folder, method, seed, tasks, num_test)
    _write_events(folder, random, tasks[:learned])
    _write_pictures(folder, random, tasks)
    return folder


def _answers(random, tasks: list[str], peak, keep: float, num_test: int, row: int | None) -> list[Prediction]:
    items = []
    for task, name in enumerate(tasks):
        question, golds = TASKS[name]
        chance = 0.8 / len(golds)
        is_learned = row is not None and task <= row
        skill = max(chance, peak[task] * keep ** (row - task)) if is_learned else chance
        for place in range(num_test):
            gold = golds[place % len(golds)]
            said = gold
            if random.random() > skill:
                other = golds[(place + 1) % len(golds)]
                said = [other, other, f"It is {other}, I think.", "", "something else"][random.integers(5)]
            expert = None
            if row is not None:
                expert = task if is_learned and random.random() < 0.94 else int(random.integers(-1, row + 1))
            items.append(
                Prediction(
                    id=f"{name}-{place}", task=name, question=f"{question} ({place})", gold=gold, prediction=said,
                    expert=expert, score=float(said == gold),
                )
            )  # fmt: skip
    return items


def _write_metrics(folder: Path, matrix: AccuracyMatrix, predictions: dict, keep: float) -> None:
    if not matrix.is_complete:
        return
    metrics = {
        **compute_metrics(matrix, predictions),
        "seconds_per_step": 0.412 / keep,
        "share_expert_mixing": 0.117,
        "peak_memory_bytes": int(3.2 * 2**30),
        "trainable_parameters": 4_884_480,
        "stored_bytes": 19_537_920,
        "eval_batch_size": 32,
        "dtype": "float32",
        "note": NOTE,
        "versions": {"mllmcl": "0.1.0", "torch": "2.13.0", "transformers": "5.23"},
        "finished": "2025-11-23T12:00:00.000+00:00",
    }
    atomic_write_json(folder / "metrics.json", metrics)


def _write_config(folder: Path, method: str, seed: int, tasks: list[str], num_test: int) -> None:
    config = {
        "method": {"name": method, "options": {"rank": 8, "alpha": 16.0}},
        "stream": {"name": "made-up", "note": NOTE, "tasks": [{"name": name, "test": num_test} for name in tasks]},
        "train": {"learning_rate": 2e-4, "seed": seed},
        "versions": {"mllmcl": "0.1.0", "torch": "2.13.0", "transformers": "5.23"},
        "started": "2025-11-23T10:00:00.000+00:00",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def _write_events(folder: Path, random, tasks: list[str]) -> None:
    now = datetime(2025, 11, 23, 10, tzinfo=timezone.utc)
    lines, step = [], 0

    def write(kind: str, wait: float, **facts) -> None:
        nonlocal now
        now += timedelta(seconds=wait)
        lines.append(json.dumps({"time": now.isoformat(timespec="milliseconds"), "event": kind, **facts}) + "\n")

    write("start", 0.0)
    for index, task in enumerate(tasks):
        write("task_start", 1.0, task=task, index=index)
        for place in range(60):
            step += 5
            loss = 0.35 + 2.1 * np.exp(-place / 11) + random.normal(0, 0.09 + 0.2 * np.exp(-place / 10))
            peak = int(2**30 * (2.6 + 0.12 * index))
            write("step", 2.1 + 0.2 * index, step=step, task=task, phase="learn", loss=max(0.05, round(float(loss), 6)),
                  peak_memory_bytes=peak)  # fmt: skip
        write("task_end", 1.0, task=task, index=index)
        write("evaluation", 40.0 + 2 * index, after=task, seconds=40.0 + 2 * index)
    write("finish", 0.5)
    (folder / "events.jsonl").write_text("".join(lines))


def _write_pictures(folder: Path, random, tasks: list[str]) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    entries = []
    for index, name in enumerate(tasks):
        grid = np.linspace(0, 6 + index, 96)
        waves = np.sin(grid[:, None] + random.uniform(0, 6)) * np.cos(grid[None, :] * (1 + 0.3 * index))
        colors = (waves[..., None] + 1) * np.array([90 + 20 * index, 110, 160 - 20 * index]) * 0.6
        Image.fromarray(colors.clip(0, 255).astype(np.uint8)).resize((192, 144)).save(
            folder / "samples" / f"{index}.png"
        )
        entries.append({"id": f"{name}-0", "task": name, "file": f"{index}.png"})
    (folder / "samples" / "samples.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    home = Path(sys.argv[1])
    first = make_run(home / "router")
    second = make_run(home / "finetune", method="made_up_finetune", keep=0.78)
    write_report([first], home / "one.html")
    write_report([first, second], home / "two.html")
