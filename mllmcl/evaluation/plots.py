"""Plots of an accuracy matrix with matplotlib, for notebooks and papers."""

# T tasks, K of them learned so far

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .matrix import AccuracyMatrix
from .metrics import over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_matrix"]

#: Okabe and Ito's colours, which colour-blind readers can tell apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#b8a800")


def plot_matrix(matrix: AccuracyMatrix) -> Figure:
    """Heat map of the matrix beside the accuracy of each task and their average over time.

    Scores are drawn in percent on the scale 0 to 100; tasks that were not learned yet are grey.

    Returns:
        A Figure that belongs to no window; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    count = len(matrix.tasks)
    figure = Figure(figsize=(7.5 + 1.1 * count, 2.2 + 0.55 * count), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    _heat_map(left, matrix)
    _curves(right, matrix)
    title = " on ".join(name for name in (matrix.method, matrix.stream) if name)
    figure.suptitle(title)
    return figure


def _rows(matrix: AccuracyMatrix) -> tuple[list[str], np.ndarray]:
    """Labels and cells in percent `[K or K + 1, T]`."""
    cells = matrix.cells()
    labels = [f"after {name}" for name in matrix.tasks[: matrix.num_learned]]
    values = cells.learned[: matrix.num_learned]
    if matrix.zero_shot is not None:
        labels, values = ["zero-shot", *labels], np.concatenate((cells.zero_shot[None], values))
    return labels, 100.0 * values


def _heat_map(axes: Axes, matrix: AccuracyMatrix) -> None:
    labels, values = _rows(matrix)
    first = len(labels) - matrix.num_learned
    for row in range(len(labels)):
        for column in range(len(matrix.tasks)):
            number, is_seen = values[row, column], column <= row - first
            color = "#e9e9e7"
            if is_seen and not np.isnan(number):
                color = _shade(number / 100.0)
            axes.add_patch(_square(column, row, color))
            ink = "#777777" if not is_seen else "black" if np.isnan(number) or number < 60 else "white"
            text = "-" if np.isnan(number) else f"{number:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    axes.set(xlim=(-0.5, len(matrix.tasks) - 0.5), ylim=(len(labels) - 0.5, -0.5), title="Accuracy, %")
    axes.set_xticks(range(len(matrix.tasks)), matrix.tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _shade(share: float) -> tuple:
    """A single hue from light to dark, which every reader can order; the page uses the same."""
    from matplotlib import colormaps

    return colormaps["Blues"](0.08 + 0.84 * min(max(share, 0.0), 1.0))


def _square(column: int, row: int, color: object):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=2)


def _curves(axes: Axes, matrix: AccuracyMatrix) -> None:
    cells, learned = matrix.cells(), matrix.num_learned
    steps = np.arange(1, learned + 1)
    for task, name in enumerate(matrix.tasks[:learned]):
        color = COLORS[task % len(COLORS)]
        axes.plot(steps[task:], 100 * cells.learned[task:learned, task], "o-", color=color, label=name, ms=4, lw=1.4)
    if learned:
        mean = 100 * over_time(matrix.learned().cells())
        axes.plot(steps, mean, "k--", lw=1.8, label="average of tasks learned")
    axes.set(ylim=(0, 100), xlabel="tasks learned", ylabel="accuracy, %", title="Over time")
    axes.set_xticks(steps)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
