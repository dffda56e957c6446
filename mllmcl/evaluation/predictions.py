"""Predictions item by item: their files, their means, which expert was chosen, and what kind of error was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import atomic_write, read_jsonl
from .scorers import normalize

__all__ = [
    "Prediction",
    "diagnose",
    "mean_scores",
    "read_predictions",
    "router_confusion",
    "write_predictions",
]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was answered to one test item.

    Attributes:
        expert: the expert chosen for the item, -1 for the base model alone, None where no single one was chosen.
        score: from the task's scorer, 0 to 1.
    """

    id: str
    task: str
    question: str
    gold: str
    prediction: str
    expert: int | None
    score: float


def write_predictions(path: str | Path, predictions: Iterable[Prediction], after: int | None) -> None:
    """Write one JSON line an item, atomically; `after` is the index of the task last learned, None for zero-shot.

    The line says -1 for zero-shot, so that the column is of integers.
    """
    row = -1 if after is None else after
    lines = [json.dumps({"after": row, **asdict(item)}, allow_nan=False) + "\n" for item in predictions]
    atomic_write(path, "".join(lines))


def read_predictions(folder: str | Path) -> dict[int | None, list[Prediction]]:
    """All predictions of a run folder by row: None for zero-shot, k for "after task k".

    Raises:
        ValueError: a line is not a prediction; the message names file and line.
    """
    rows: dict[int | None, list[Prediction]] = {}
    for path in sorted((Path(folder) / "predictions").glob("*.jsonl")):
        for number, line in enumerate(read_jsonl(path), start=1):
            after = line.pop("after", None)
            try:
                rows.setdefault(None if after == -1 else after, []).append(Prediction(**line))
            except TypeError as error:
                raise ValueError(f"{path}: line {number} is not a prediction: {error}") from error
    return rows


def mean_scores(predictions: Iterable[Prediction], tasks: Sequence[str]) -> list[float | None]:
    """Mean score of each task, None for a task without items: a row of the accuracy matrix."""
    scores: dict[str, list[float]] = {name: [] for name in tasks}
    for item in predictions:
        if item.task not in scores:
            raise ValueError(f"predictions: expected tasks {', '.join(tasks)}, got {item.task!r} (item {item.id})")
        scores[item.task].append(item.score)
    return [sum(some) / len(some) if some else None for some in scores.values()]


def router_confusion(predictions: Sequence[Prediction], tasks: Sequence[str]) -> dict | None:
    """Which expert was chosen for the items of which task.

    Returns:
        None where no single expert was chosen for the items. Otherwise "confusion": counts `[T][E + 1]`, a row for each
        true task and a column for each expert, the base model alone last; "accuracy": share of items whose expert has
        the index of their task, None where there are more experts than tasks.
    """
    chosen = [item for item in predictions if item.expert is not None]
    if not chosen:
        return None
    num_experts = max(len(tasks), 1 + max(item.expert for item in chosen))
    confusion = [[0] * (num_experts + 1) for _ in tasks]
    places = {name: place for place, name in enumerate(tasks)}
    for item in chosen:
        # -1, the base model, is the last column
        confusion[places[item.task]][max(item.expert, -1)] += 1
    right = sum(confusion[place][place] for place in range(len(tasks)))
    return {"accuracy": right / len(chosen) if num_experts == len(tasks) else None, "confusion": confusion}


def diagnose(predictions: Sequence[Prediction], tasks: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """What kind of wrong answer is given how often: shares of all items of a task, after Continual-NExT.

    Its exact rules are not published; these hold for tasks with a closed set of answers, which is the set of gold
    answers of the task's own items. All comparisons are after `normalize`; a score below 0.5 is a wrong answer.

        HAL  the answer is one of the task's answers, but not the right one: the form is right, the content is made up.
        IUF  the answer is none of the task's, but one of another task's, or a longer text with one of the task's
             answers in it as whole words: the instruction about the form was not followed.
        OTH  anything else that is wrong, the empty answer included.

    Returns:
        Task -> {"HAL", "IUF", "OTH"}, or None for a task without items or with an open set of answers (more than half
        of its items have an answer that no other item has).
    """
    golds = {name: [normalize(item.gold) for item in predictions if item.task == name] for name in tasks}
    rates: dict[str, dict[str, float] | None] = {}
    for name, answers in golds.items():
        alone = sum(answers.count(answer) == 1 for answer in set(answers))
        if not answers or alone > len(answers) / 2:
            rates[name] = None
            continue
        others = {answer for other, some in golds.items() if other != name for answer in some}
        counts = {"HAL": 0, "IUF": 0, "OTH": 0}
        for item in predictions:
            if item.task == name and item.score < 0.5:
                counts[_kind(normalize(item.prediction), set(answers), others)] += 1
        rates[name] = {kind: count / len(answers) for kind, count in counts.items()}
    return rates


def _kind(said: str, own: set[str], others: set[str]) -> str:
    if said in own:
        return "HAL"
    holds_own = any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said) for answer in own if answer)
    return "IUF" if said and (said in others or holds_own) else "OTH"
