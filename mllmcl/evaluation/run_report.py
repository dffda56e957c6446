"""What a run came to: the accuracy matrix, the metrics, a table for the terminal, plots and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import atomic_write_json
from .matrix import AccuracyMatrix

__all__ = ["Report"]


@dataclass(kw_only=True)
class Report:
    """Result of `mllmcl.train`, and of `Report.load` on a run folder.

    Attributes:
        matrix: scores by task learned and task evaluated.
        metrics: the content of `metrics.json`; see `mllmcl.evaluation.compute_metrics`.
    """

    matrix: AccuracyMatrix
    metrics: dict = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `matrix.json`, `metrics.json` and `report.html`; what is not in the folder is left out of the page.

        Each file is replaced atomically; the page is drawn from the files of the folder.
        """
        folder = Path(folder)
        self.matrix.save(folder / "matrix.json")
        atomic_write_json(folder / "metrics.json", self.metrics)
        from .report import write_report

        write_report([folder], folder / "report.html")

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a run folder.

        Raises:
            FileNotFoundError: no `matrix.json` or `metrics.json`.
            ValueError: one of them is damaged; the message names it.
        """
        folder = Path(folder)
        for name in ("matrix.json", "metrics.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: a run folder holds this file once a task has been evaluated")
        path = folder / "metrics.json"
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(metrics, dict):
            raise ValueError(f"{path}: expected an object, got {type(metrics).__name__}")
        return cls(matrix=AccuracyMatrix.load(folder / "matrix.json"), metrics=metrics)

    def plot(self):
        """A matplotlib Figure: heat map of the matrix beside the accuracy of each task over time."""
        from .plots import plot_matrix

        return plot_matrix(self.matrix)

    def table(self) -> str:
        """A plain-text table in percent: each task just trained, last, forgetting; then the numbers of the run."""
        metrics, part = self.metrics, self.matrix.learned()
        falls = (metrics.get("forgetting") or {}).get("per_task") or {}
        rows = [("task", "zero-shot", "just trained", "last", "forgetting")]
        for place, name in enumerate(part.tasks):
            cells = part.score(None, place), part.score(place, place), part.score(part.num_learned - 1, place)
            rows.append((name, *map(_percent, cells), _percent(falls.get(name))))
        lines = _table(rows)
        if not self.matrix.is_complete:
            lines.append(f"{part.num_learned} of {len(self.matrix.tasks)} tasks learned; numbers are over these")
        facts = [(label, text) for label, text in self._facts() if text != "-"]
        label_width, width = (max(len(row[column]) for row in facts) for column in (0, 1))
        return "\n".join([*lines, "", *(f"{label:<{label_width}}  {text:>{width}}" for label, text in facts)])

    @staticmethod
    def compare(reports: Sequence[Report], names: Sequence[str] | None = None) -> str:
        """A plain-text table of several runs, one column each: the last score of every task, then the headline numbers.

        Scores are in percent. A task that a run does not have, or a number it has not measured, is "-".

        Args:
            names: what the columns are called, None for the methods.

        Raises:
            ValueError: no report, or not a name for each.
        """
        if not reports:
            raise ValueError("reports: expected at least one")
        tasks = list(dict.fromkeys(name for report in reports for name in report.matrix.tasks))
        names = [report.matrix.method or "-" for report in reports] if names is None else names
        if len(names) != len(reports):
            raise ValueError(f"names: expected one for each of the {len(reports)} reports, got {len(names)}")
        rows = [("after the last task", *names)]
        rows += [(name, *(_percent(report._last(name)) for report in reports)) for name in tasks]
        facts = [report._facts() for report in reports]
        for lines in zip(*facts, strict=True):
            texts = [text for _, text in lines]
            if set(texts) != {"-"}:
                rows.append((lines[0][0], *texts))
        lines = _table(rows)
        # a rule between the tasks and the numbers over them
        return "\n".join([*lines[: 2 + len(tasks)], lines[1], *lines[2 + len(tasks) :]])

    def _last(self, task: str) -> float | None:
        matrix = self.matrix
        return matrix.score(matrix.num_learned - 1, task) if task in matrix.tasks and matrix.num_learned else None

    def _facts(self) -> list[tuple[str, str]]:
        metrics = self.metrics
        bwt, router = metrics.get("bwt") or {}, metrics.get("router") or {}
        seconds = metrics.get("seconds_per_step")
        return [
            ("last (MFN)", _percent(metrics.get("last"))),
            ("average (MAA)", _percent(metrics.get("average"))),
            ("just trained (MFT)", _percent(metrics.get("finetune"))),
            ("BWT, divisor T-1", _percent(bwt.get("T-1"))),
            ("BWT, divisor T", _percent(bwt.get("T"))),
            ("router accuracy", _percent(router.get("accuracy"))),
            ("perplexity of plain text", _language(metrics.get("language_perplexity"))),
            ("seconds per step", "-" if seconds is None else f"{seconds:.3f}"),
            ("share of the step in expert mixing", _percent(metrics.get("share_expert_mixing"))),
        ]


def _language(values: list[float] | None) -> str:
    """Before the first task and after the last."""
    return f"{values[0]:.1f} to {values[-1]:.1f}" if values else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100.0 * share:.1f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with columns padded to their widest cell, text left and numbers right, a rule under the heading."""
    columns = list(zip(*rows, strict=True))
    padded = []
    for cells in columns:
        width = max(map(len, cells))
        is_text = any(cell[:1].isalpha() for cell in cells[1:])
        padded.append([f"{cell:<{width}}" if is_text else f"{cell:>{width}}" for cell in cells])
    lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
