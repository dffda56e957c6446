"""The accuracy matrix of a stream: what was scored on which task after which task was learned."""

# T tasks, K of them learned so far

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..files import atomic_write_json

__all__ = ["AccuracyMatrix", "Cells", "tell_apart"]


@dataclass(frozen=True)
class Cells:
    """The cells as arrays; trailing dimensions, if any, are replicates.

    Attributes:
        learned: float64 `[T, T, ...]`; `learned[k, t]` is the score on task t after task k was learned, NaN if unknown.
        zero_shot: float64 `[T, ...]` before any task, NaN if unknown.
    """

    learned: np.ndarray
    zero_shot: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AccuracyMatrix:
    """Scores by task learned (rows) and task evaluated (columns).

    A cell that was not evaluated is None, never 0: every metric that needs it is None as well.

    Attributes:
        tasks: the T names in the order of learning.
        scores: K <= T rows of T cells; row k was measured after task k.
        zero_shot: T cells measured before the first task, or None.
        num_test: test items of each task, or None.
        stream, method, seed: what the numbers belong to.

    Raises:
        ValueError: lengths that do not fit, a name twice, or an infinite score.
    """

    tasks: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...] = ()
    zero_shot: tuple[float | None, ...] | None = None
    num_test: tuple[int, ...] | None = None
    stream: str = ""
    method: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks: expected at least one name and none twice, got {list(self.tasks)}")
        if len(self.scores) > len(self.tasks):
            raise ValueError(f"scores: expected at most {len(self.tasks)} rows, one a task, got {len(self.scores)}")
        rows = [self._row(row, f"scores after {name}") for row, name in zip(self.scores, self.tasks, strict=False)]
        set_(self, "scores", tuple(rows))
        if self.zero_shot is not None:
            set_(self, "zero_shot", self._row(self.zero_shot, "zero_shot"))
        if self.num_test is not None:
            set_(self, "num_test", tuple(int(count) for count in self.num_test))
            if len(self.num_test) != len(self.tasks) or min(self.num_test) < 0:
                raise ValueError(f"num_test: expected {len(self.tasks)} counts >= 0, got {list(self.num_test)}")

    def _row(self, cells: Sequence, what: str) -> tuple[float | None, ...]:
        if len(cells) != len(self.tasks):
            raise ValueError(f"{what}: expected {len(self.tasks)} cells, one a task, got {len(cells)}")
        row = tuple(None if cell is None or math.isnan(cell) else float(cell) for cell in cells)
        if any(cell is not None and math.isinf(cell) for cell in row):
            raise ValueError(f"{what}: expected finite scores or None, got {list(row)}")
        return row

    @property
    def num_learned(self) -> int:
        """K, the rows there are."""
        return len(self.scores)

    @property
    def is_complete(self) -> bool:
        """Whether every task has been learned."""
        return self.num_learned == len(self.tasks)

    def with_row(self, after: int | None, scores: Sequence[float | None]) -> AccuracyMatrix:
        """A matrix with the row measured after task `after` (None: zero-shot) set or replaced.

        Raises:
            ValueError: a row before `after` is missing, or the number of cells is wrong.
        """
        if after is None:
            return replace(self, zero_shot=tuple(scores))
        if not 0 <= after <= self.num_learned:
            raise ValueError(f"after: expected None or 0 to {self.num_learned} (rows come in order), got {after}")
        rows = list(self.scores)
        rows[after : after + 1] = [tuple(scores)]
        return replace(self, scores=tuple(rows))

    def score(self, after: str | int | None, task: str | int) -> float | None:
        """The cell of a task (by name or index) after another (None: zero-shot); None if it was not measured."""
        column = self.index(task)
        if after is None:
            return None if self.zero_shot is None else self.zero_shot[column]
        row = self.index(after)
        return self.scores[row][column] if row < self.num_learned else None

    def index(self, task: str | int) -> int:
        """Position of a task given by name or index; ValueError if there is none such."""
        names = list(self.tasks)
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and 0 <= task < len(names):
            return task
        raise ValueError(f"task: expected one of {', '.join(names)} or an index below {len(names)}, got {task!r}")

    def learned(self) -> AccuracyMatrix:
        """The matrix of the stream that ends with the last task learned so far; ValueError before the first."""
        count = self.num_learned
        if count == 0:
            raise ValueError("matrix: no task has been learned yet")
        return replace(
            self,
            tasks=self.tasks[:count],
            scores=tuple(row[:count] for row in self.scores),
            zero_shot=None if self.zero_shot is None else self.zero_shot[:count],
            num_test=None if self.num_test is None else self.num_test[:count],
        )

    def cells(self) -> Cells:
        """The cells as arrays, NaN where nothing was measured."""
        count = len(self.tasks)
        learned = np.full((count, count), np.nan)
        for row, cells in enumerate(self.scores):
            learned[row] = [np.nan if cell is None else cell for cell in cells]
        start = self.zero_shot or (None,) * count
        return Cells(learned, np.array([np.nan if cell is None else cell for cell in start]))

    def to_json(self) -> dict:
        """The content of `matrix.json`."""
        rows = [{"after": name, "scores": list(row)} for name, row in zip(self.tasks, self.scores, strict=False)]
        if self.zero_shot is not None:
            rows.insert(0, {"after": None, "scores": list(self.zero_shot)})
        return {
            "stream": self.stream,
            "method": self.method,
            "tasks": list(self.tasks),
            "rows": rows,
            "num_test": None if self.num_test is None else list(self.num_test),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, value: dict) -> AccuracyMatrix:
        """The inverse of `to_json`; ValueError names what is wrong."""
        missing = [key for key in ("tasks", "rows") if not isinstance(value, dict) or key not in value]
        if missing:
            raise ValueError(f"matrix: expected an object with tasks and rows, {' and '.join(missing)} missing")
        rows = list(value["rows"])
        zero_shot = rows.pop(0)["scores"] if rows and rows[0]["after"] is None else None
        order = [row["after"] for row in rows]
        if order != list(value["tasks"])[: len(order)]:
            raise ValueError(f"matrix: expected rows in the order of tasks {value['tasks']}, got after {order}")
        return cls(
            tasks=tuple(value["tasks"]),
            scores=tuple(tuple(row["scores"]) for row in rows),
            zero_shot=None if zero_shot is None else tuple(zero_shot),
            num_test=None if value.get("num_test") is None else tuple(value["num_test"]),
            stream=value.get("stream") or "",
            method=value.get("method") or "",
            seed=value.get("seed") or 0,
        )

    def save(self, path: str | Path) -> None:
        """Write `matrix.json` atomically."""
        atomic_write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> AccuracyMatrix:
        """Read `matrix.json`; ValueError names the file if it is not one."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an accuracy matrix: {error}") from error


def tell_apart(runs: Sequence[tuple[AccuracyMatrix, Path]]) -> list[str]:
    """What tells runs, matrix and folder, apart: method, else method and seed, else the folder's name."""
    for label in (
        lambda matrix, folder: matrix.method or folder.name,
        lambda matrix, folder: f"{matrix.method or folder.name}, seed {matrix.seed}",
        lambda matrix, folder: folder.name,
        lambda matrix, folder: str(folder),
    ):
        names = [label(*run) for run in runs]
        if len(set(names)) == len(names):
            break
    return names
