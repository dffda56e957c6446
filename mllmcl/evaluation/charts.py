"""Charts of the report page as HTML and SVG text; colours and type come from the style sheet."""

# T tasks, K of them learned so far

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .matrix import AccuracyMatrix
from .metrics import over_time

__all__ = [
    "Series",
    "average_chart",
    "confusion_table",
    "heat_map",
    "loss_chart",
    "percent",
    "signed",
    "task_panel",
]

NONE = "&ndash;"
#: share from which a shaded cell needs the other ink to be read
INK_TURNS = 0.6


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign, a dash for None."""
    return NONE if share is None else f"{100.0 * share:.{digits}f}".replace("-", "&minus;")


def signed(share: float | None) -> str:
    """A difference of shares in points with plus or minus."""
    return NONE if share is None else f"{100.0 * share:+.1f}".replace("-", "&minus;")


@dataclass(frozen=True)
class Series:
    """One run's line in a chart: (x, y) points in order, and which run's colour and dash it has."""

    label: str
    points: Sequence[tuple[float, float]]
    run: int = 0

    @property
    def style(self) -> str:
        return f'style="--c:var(--run-{self.run % 6})"'

    @property
    def dash(self) -> str:
        return f" dash-{self.run % 6}" if self.run else ""


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing; x and y ranges, size, margins left, top, right, bottom."""

    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[int, int]
    margin: tuple[int, int, int, int]

    def at_x(self, value: float) -> float:
        left, _, right, _ = self.margin
        span = (self.x[1] - self.x[0]) or 1.0
        return round(left + (value - self.x[0]) / span * (self.size[0] - left - right), 1)

    def at_y(self, value: float) -> float:
        _, top, _, bottom = self.margin
        span = (self.y[1] - self.y[0]) or 1.0
        return round(self.size[1] - bottom - (value - self.y[0]) / span * (self.size[1] - top - bottom), 1)

    def path(self, points: Sequence[tuple[float, float]], css: str, style: str = "") -> str:
        places = [(self.at_x(x), self.at_y(y)) for x, y in points]
        if len(places) < 2:
            return ""
        return f'<path class="{css}" {style} d="M{" L".join(f"{x} {y}" for x, y in places)}"/>'

    def horizontal(self, value: float, label: str) -> str:
        y, right = self.at_y(value), self.size[0] - self.margin[2]
        text = f'<text x="{self.margin[0] - 7}" y="{y + 3.5}" text-anchor="end">{label}</text>'
        return f'<line class="grid" x1="{self.margin[0]}" x2="{right}" y1="{y}" y2="{y}"/>{text}'

    def below(self, value: float, label: str, anchor: str = "middle") -> str:
        y = self.size[1] - self.margin[3] + 15
        return f'<text x="{self.at_x(value)}" y="{y}" text-anchor="{anchor}">{label}</text>'

    def svg(self, label: str, *parts: str) -> str:
        width, height = self.size
        return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def heat_map(matrix: AccuracyMatrix) -> str:
    """The matrix as a table: rows after each task, columns the task evaluated, tasks not seen yet grey."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in matrix.tasks)
    lines = []
    if matrix.zero_shot is not None:
        lines.append(_heat_row("zero-shot", matrix.zero_shot, -1, None))
    for row in range(matrix.num_learned):
        seen = matrix.scores[row][: row + 1]
        mean = None if None in seen else sum(seen) / len(seen)
        lines.append(_heat_row(f"after {matrix.tasks[row]}", matrix.scores[row], row, mean))
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}<th scope="col">mean of learned</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heat_row(label: str, scores: Sequence[float | None], row: int, mean: float | None) -> str:
    cells = []
    for column, score in enumerate(scores):
        if score is None:
            cells.append(f'<td class="none">{NONE}</td>')
        elif column > row:
            cells.append(f'<td class="unseen">{percent(score)}</td>')
        else:
            cells.append(_heat_cell(score, percent(score), "own" if column == row else ""))
    last = "" if row < 0 else percent(mean)
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}<td class="mean">{last}</td></tr>'


def _heat_cell(share: float, text: str, css: str = "") -> str:
    share = min(max(share, 0.0), 1.0)
    names = " ".join(name for name in (css, "high" if share > INK_TURNS else "") if name)
    return f'<td class="{names}" style="--v:{share:.3f}">{text}</td>'


def confusion_table(confusion: Sequence[Sequence[int]], tasks: Sequence[str]) -> str:
    """Counts by true task (rows) and chosen expert (columns), shaded by the share of the row; base model last."""
    num_experts = len(confusion[0]) - 1
    names = list(tasks) if num_experts == len(tasks) else [f"expert {place + 1}" for place in range(num_experts)]
    has_base = any(row[-1] for row in confusion)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    head += '<th scope="col" class="base">base model</th>' if has_base else ""
    lines = []
    for place, (task, row) in enumerate(zip(tasks, confusion, strict=False)):
        total = sum(row) or 1
        cells = [_heat_cell(n / total, f"{n:,}", "own" if at == place else "") for at, n in enumerate(row[:-1])]
        if has_base:
            cells.append(_heat_cell(row[-1] / total, f"{row[-1]:,}", "base"))
        lines.append(f'<tr><th scope="row">{escape(task)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _history(matrix: AccuracyMatrix, task: int) -> list[tuple[float, float]]:
    """(tasks learned, score) of a task, measured rows only; 0 is zero-shot."""
    start = [(0, matrix.score(None, task))]
    rows = [(row + 1, matrix.score(row, task)) for row in range(matrix.num_learned)]
    return [(at, score) for at, score in start + rows if score is not None]


def task_panel(matrices: Sequence[AccuracyMatrix], task: int) -> str:
    """Accuracy of one task over time, one line a run; dotted before the task is learned."""
    count, name = len(matrices[0].tasks), matrices[0].tasks[task]
    first = 0 if any(matrix.zero_shot is not None for matrix in matrices) else 1
    frame = _Frame((first, max(count, first + 1)), (0.0, 1.0), (250, 132), (26, 8, 34, 20))
    parts = []
    if task + 1 > first:
        left, right = frame.at_x(first), frame.at_x(task + 1)
        parts.append(f'<rect class="shade" x="{left}" y="8" width="{round(right - left, 1)}" height="104"/>')
    parts += [frame.horizontal(level, f"{level * 100:.0f}") for level in (0.0, 0.5, 1.0)]
    parts += [frame.below(at, "0" if at == 0 else str(at)) for at in range(first, count + 1)]
    if len(matrices) == 1:
        others = [place for place in range(matrices[0].num_learned) if place != task]
        parts += [frame.path([p for p in _history(matrices[0], at) if p[0] > at], "other") for at in others]
    shown = []
    for run, matrix in enumerate(matrices):
        points = _history(matrix, task)
        before = [point for point in points if point[0] <= task + 1]
        series = Series(name, [point for point in points if point[0] > task], run)
        parts.append(frame.path(before, "before"))
        parts.append(frame.path(series.points, "line" + series.dash, series.style))
        parts += _dots(frame, series, before)
        if series.points:
            shown.append((series.points[-1][1], series))
    parts += _end_labels(frame, shown)
    return frame.svg(f"accuracy of {name} over time", *parts)


def _dots(frame: _Frame, series: Series, before: Sequence[tuple[float, float]]) -> list[str]:
    parts = []
    if before and before[0][0] == 0:
        x, y = before[0]
        parts.append(f'<circle class="ring" cx="{frame.at_x(x)}" cy="{frame.at_y(y)}" r="2.8"/>')
    ends = series.points[:1] + series.points[-1:]
    parts += [
        f'<circle class="dot" {series.style} cx="{frame.at_x(x)}" cy="{frame.at_y(y)}" r="3.2"/>' for x, y in ends
    ]
    return parts


def _end_labels(frame: _Frame, shown: list[tuple[float, Series]]) -> list[str]:
    """Last values right of the lines, moved apart where they would touch."""
    parts, floor = [], -math.inf
    for score, series in sorted(shown, key=lambda item: -item[0]):
        y = max(frame.at_y(score) + 4, floor + 12)
        floor = y
        x = frame.at_x(series.points[-1][0]) + 7
        parts.append(f'<text class="value" {series.style} x="{x}" y="{round(y, 1)}">{percent(score)}</text>')
    return parts


def average_chart(matrices: Sequence[AccuracyMatrix]) -> str:
    """Mean accuracy of the tasks learned so far over time, one line a run."""
    count = len(matrices[0].tasks)
    frame = _Frame((1, max(count, 2)), (0.0, 1.0), (720, 210), (34, 10, 44, 24))
    parts = [frame.horizontal(level, f"{level * 100:.0f}") for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for at, name in enumerate(matrices[0].tasks):
        label = _short(name) if count <= 8 else str(at + 1)
        parts.append(frame.below(at + 1, label, "start" if at == 0 else "end" if at == count - 1 else "middle"))
    shown = []
    for run, matrix in enumerate(matrices):
        means = over_time(matrix.learned().cells())
        points = [(at + 1, float(mean)) for at, mean in enumerate(means) if not math.isnan(mean)]
        if not points:
            continue
        series = Series("average", points, run)
        parts.append(frame.path(points, "line" + series.dash, series.style))
        parts += [
            f'<circle class="dot" {series.style} cx="{frame.at_x(x)}" cy="{frame.at_y(y)}" r="3.2"/>' for x, y in points
        ]
        shown.append((points[-1][1], series))
    return frame.svg("average accuracy over time", *parts, *_end_labels(frame, shown))


def _short(name: str, length: int = 16) -> str:
    return escape(name if len(name) <= length else name[: length - 2] + "..")


def loss_chart(runs: Sequence[tuple[Sequence[tuple[int, float]], Sequence[tuple[int, str]]]]) -> str:
    """Loss over steps with task boundaries: the values faint, their running mean on top.

    Args:
        runs: of each run its (step, loss) points and (first step, task) starts; boundaries are drawn for the first.
    """
    losses = [loss for points, _ in runs for _, loss in points]
    last = max(step for points, _ in runs for step, _ in points)
    top = _ceiling(max(losses))
    frame = _Frame((0, last), (0.0, top), (720, 240), (40, 24, 10, 24))
    parts = [frame.horizontal(top * part / 4, f"{top * part / 4:.3g}") for part in range(5)]
    bottom = frame.at_y(0.0)
    for at, (step, task) in enumerate(runs[0][1]):
        x = frame.at_x(step)
        end = runs[0][1][at + 1][0] if at + 1 < len(runs[0][1]) else last
        room = int((frame.at_x(end) - x) / 6.2)
        label = task if len(task) <= room else f"{at + 1}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="12" y2="{bottom}"/>')
        parts.append(f'<text x="{x + 4}" y="17">{escape(label)}</text>')
    parts += [frame.below(last * part / 4, f"{round(last * part / 4):,}") for part in range(1, 4)]
    parts.append(f'<text x="710" y="{bottom + 15}" text-anchor="end">{last:,} steps</text>')
    for run, (points, starts) in enumerate(runs):
        series = Series("loss", points, run)
        if len(runs) == 1:
            parts.append(frame.path(points, "line thin", series.style))
        parts += [frame.path(part, "line" + series.dash, series.style) for part in _smooth(points, starts)]
    return frame.svg("training loss over steps", *parts)


def _smooth(points: Sequence[tuple[int, float]], starts: Sequence[tuple[int, str]]) -> list[list[tuple[int, float]]]:
    """Centred running mean over an eighth of a task's points, task by task."""
    bounds = [-math.inf, *(step for step, _ in starts[1:]), math.inf]
    parts = []
    for low, high in pairwise(bounds):
        part = [(step, loss) for step, loss in points if low < step <= high]
        reach = len(part) // 16
        windows = [part[max(0, at - reach) : at + reach + 1] for at in range(len(part))]
        means = [sum(loss for _, loss in window) / len(window) for window in windows]
        parts.append([(step, mean) for (step, _), mean in zip(part, means, strict=True)])
    return parts


def _ceiling(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if not value > 0.0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(factor * unit for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if value <= factor * unit * 1.0000001)
