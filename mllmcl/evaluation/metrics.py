"""Continual-learning metrics, each a formula on the accuracy matrix.

    matrix = AccuracyMatrix(tasks=("a", "b"), scores=((0.9, None), (0.7, 0.8)))
    value(matrix, "last")     # 0.75
    value(matrix, "bwt_T-1")  # -0.2

a[k, t] is the score on task t after task k was learned, z[t] the zero-shot score, T the number of tasks; the formulas
count from 1. A metric that needs a cell that was not measured is None: nothing is skipped, nothing counts as 0.

Names differ between papers: `last` is MFN, Last, ACC or AP; `average` is MAA or MAP; `finetune` is MFT, New.ACC or
plasticity.
"""

# T tasks, K of them learned so far, B bootstrap replicates, n items of a task

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..seeds import derive_seed
from .matrix import AccuracyMatrix, Cells
from .predictions import Prediction, diagnose, router_confusion

__all__ = [
    "HEADLINE",
    "METRICS",
    "AccuracyMatrix",
    "Cells",
    "Metric",
    "bootstrap",
    "compute_metrics",
    "forgetting_per_task",
    "over_time",
    "value",
]


@dataclass(frozen=True)
class Metric:
    """A number derived from the matrix: its name in words, formula, source, and the function that computes it.

    `compute` takes Cells whose arrays may have trailing dimensions and returns an array of those; NaN means undefined.
    """

    label: str
    formula: str
    source: str
    compute: Callable[[Cells], np.ndarray]


#: key -> Metric; the report prints label, formula and source from here
METRICS: dict[str, Metric] = {}


def _register(key: str, label: str, formula: str, source: str) -> Callable:
    def add(function: Callable[[Cells], np.ndarray]) -> Callable[[Cells], np.ndarray]:
        METRICS[key] = Metric(label, formula, source, function)
        return function

    return add


def _undefined(cells: Cells) -> np.ndarray:
    return np.full(cells.zero_shot.shape[1:], np.nan)


def _diagonal(cells: Cells) -> np.ndarray:
    """a[t, t] `[T, ...]`."""
    steps = np.arange(len(cells.learned))
    return cells.learned[steps, steps]


@_register("last", "Last", "1/T sum_t a[T,t]", "MFN of MLLM-CL, ACC of CoIN, Last of MTIL")
def last(cells: Cells) -> np.ndarray:
    """Mean over all tasks after the last one: 1/T sum_t a[T,t]."""
    return cells.learned[-1].mean(axis=0)


@_register("average", "Average", "1/T sum_k 1/k sum_{t<=k} a[k,t]", "MAA of CoIN and MLLM-CL")
def average(cells: Cells) -> np.ndarray:
    """Mean over time of the mean over the tasks learned so far: 1/T sum_k (1/k sum_{t<=k} a[k,t])."""
    return over_time(cells).mean(axis=0)


@_register("finetune", "Just trained", "1/T sum_t a[t,t]", "MFT of MLLM-CL, New.ACC of Continual-NExT, plasticity")
def finetune(cells: Cells) -> np.ndarray:
    """Mean over tasks of the score right after learning the task: 1/T sum_t a[t,t]."""
    return _diagonal(cells).mean(axis=0)


@_register("bwt_T", "BWT, divisor T", "1/T sum_t (a[T,t] - a[t,t])", "Last - just trained; MCITlib")
def bwt(cells: Cells) -> np.ndarray:
    """Backward transfer with divisor T: 1/T sum_t (a[T,t] - a[t,t]), which is MFN - MFT; negative means forgetting."""
    return (cells.learned[-1] - _diagonal(cells)).mean(axis=0)


@_register("bwt_T-1", "BWT, divisor T-1", "1/(T-1) sum_{t<T} (a[T,t] - a[t,t])", "Lopez-Paz and Ranzato 2017 (GEM)")
def bwt_without_last(cells: Cells) -> np.ndarray:
    """Backward transfer with divisor T-1: 1/(T-1) sum_{t<T} (a[T,t] - a[t,t]); undefined for one task."""
    if len(cells.learned) == 1:
        return _undefined(cells)
    return (cells.learned[-1] - _diagonal(cells))[:-1].mean(axis=0)


def _change(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else now - then


def forgetting_per_task(cells: Cells) -> np.ndarray:
    """max_{t<=k<T} a[k,t] - a[T,t] for each task t < T, `[T-1, ...]`.

    The maximum runs over the rows from the task's own on, so it needs no cell of a task that was not learned yet; a
    task that got better to the end has a negative value.
    """
    final = len(cells.learned) - 1
    best = [cells.learned[task:final, task].max(axis=0) - cells.learned[final, task] for task in range(final)]
    return np.stack(best) if best else np.empty((0, *cells.zero_shot.shape[1:]))


@_register(
    "forgetting",
    "Forgetting",
    "1/(T-1) sum_{t<T} (max_{t<=k<T} a[k,t] - a[T,t])",
    "Chaudhry et al. 2018, rows from the task's own on; Continual-NExT",
)
def forgetting(cells: Cells) -> np.ndarray:
    """Mean over t < T of how far task t fell below its best: undefined for one task. See `forgetting_per_task`."""
    return _undefined(cells) if len(cells.learned) == 1 else forgetting_per_task(cells).mean(axis=0)


@_register("zero_shot", "Zero-shot", "1/T sum_t z[t]", "the row before the first task")
def zero_shot(cells: Cells) -> np.ndarray:
    """Mean over tasks before anything was learned: 1/T sum_t z[t]."""
    return cells.zero_shot.mean(axis=0)


@_register(
    "forward_transfer",
    "Forward transfer",
    "1/(T-1) sum_{t>1} (a[t-1,t] - z[t])",
    "Lopez-Paz and Ranzato 2017 (GEM), with the zero-shot score as the baseline",
)
def forward_transfer(cells: Cells) -> np.ndarray:
    """What earlier tasks gave a task before it was learned: 1/(T-1) sum_{t>1} (a[t-1,t] - z[t]); needs both."""
    count = len(cells.learned)
    if count == 1:
        return _undefined(cells)
    before = cells.learned[np.arange(count - 1), np.arange(1, count)]
    return (before - cells.zero_shot[1:]).mean(axis=0)


@_register(
    "transfer",
    "Transfer (MTIL)",
    "1/(T-1) sum_{t>1} 1/(t-1) sum_{k<t} a[k,t]",
    "Zheng et al. 2023 (ZSCL)",
)
def transfer(cells: Cells) -> np.ndarray:
    """Zero-shot ability kept: mean of a task's scores before it is learned, then over all tasks but the first."""
    count = len(cells.learned)
    if count == 1:
        return _undefined(cells)
    return np.stack([cells.learned[:task, task].mean(axis=0) for task in range(1, count)]).mean(axis=0)


@_register("mtil_average", "Average (MTIL)", "1/T^2 sum_k sum_t a[k,t]", "Zheng et al. 2023 (ZSCL)")
def mtil_average(cells: Cells) -> np.ndarray:
    """Mean of all cells of the square matrix: 1/T^2 sum_k sum_t a[k,t]."""
    return cells.learned.mean(axis=(0, 1))


@_register(
    "nbt",
    "NBT",
    "1/(T-1) sum_{t<T} 1/(T-t) sum_{k>t} (a[t,t] - a[k,t])",
    "Liu et al. 2023 (LIBERO), the last task left out because its sum is empty",
)
def negative_backward_transfer(cells: Cells) -> np.ndarray:
    """Mean loss on a task over all later times, then over tasks; lower is better, undefined for one task."""
    count = len(cells.learned)
    if count == 1:
        return _undefined(cells)
    falls = [(cells.learned[t, t] - cells.learned[t + 1 :, t]).mean(axis=0) for t in range(count - 1)]
    return np.stack(falls).mean(axis=0)


@_register(
    "auc",
    "AUC",
    "1/T sum_t 1/(T-t+1) sum_{k>=t} a[k,t]",
    "Liu et al. 2023 (LIBERO), with one evaluation a task, where its FWT is a[t,t] and so the score just trained",
)
def area_under_curve(cells: Cells) -> np.ndarray:
    """Mean of a task's scores from its own time on, then over tasks."""
    return np.stack([cells.learned[t:, t].mean(axis=0) for t in range(len(cells.learned))]).mean(axis=0)


#: the numbers that stand at the top of a report
HEADLINE = ("last", "average", "finetune", "bwt_T-1", "bwt_T", "forgetting")


def over_time(cells: Cells) -> np.ndarray:
    """Mean over the tasks learned so far, after each task: 1/k sum_{t<=k} a[k,t], `[T, ...]`."""
    return np.stack([cells.learned[k, : k + 1].mean(axis=0) for k in range(len(cells.learned))])


def _plain(number: float) -> float | None:
    return None if math.isnan(number) else float(number)


def value(matrix: AccuracyMatrix, name: str) -> float | None:
    """One metric of a matrix, None where a cell it needs was not measured.

    Raises:
        ValueError: unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {name!r}")
    return _plain(METRICS[name].compute(matrix.cells()))


def bootstrap(
    tasks: Sequence[str],
    predictions: Mapping[int | None, Iterable[Prediction]],
    *,
    names: Sequence[str] = HEADLINE,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals of metrics over which test items were drawn (Efron 1979).

    In each replicate the n items of a task are drawn with replacement, the same draw for every row of the matrix, so
    that what the rows share cancels in differences. Tasks are drawn apart from each other. The seed decides everything;
    neither the order of the predictions nor the other tasks matter. The spread over training seeds is not in it.

    Args:
        predictions: row (None: zero-shot, k: after task k) -> the predictions of all items scored then.

    Returns:
        Metric name -> (low, high), None where the metric is undefined.

    Raises:
        ValueError: an item is missing in some row of its task, or occurs twice in one.
    """
    count = len(tasks)
    learned = np.full((count, count, resamples), np.nan)
    start = np.full((count, resamples), np.nan)
    for task, (rows, scores) in enumerate(_by_item(tasks, predictions)):
        if not rows:
            continue
        num_items = scores.shape[1]
        random = np.random.default_rng(derive_seed(seed, "bootstrap", tasks[task]))
        draws = random.multinomial(num_items, np.full(num_items, 1.0 / num_items), size=resamples)
        means = scores @ draws.T / num_items
        for row, mean in zip(rows, means, strict=True):
            if row is None:
                start[task] = mean
            else:
                learned[row, task] = mean
    cells = Cells(learned, start)
    intervals = {}
    for name in names:
        replicates = METRICS[name].compute(cells)
        low, high = np.percentile(replicates, (2.5, 97.5))
        intervals[name] = None if np.isnan(replicates).any() else (float(low), float(high))
    return intervals


def _by_item(
    tasks: Sequence[str], predictions: Mapping[int | None, Iterable[Prediction]]
) -> list[tuple[list, np.ndarray]]:
    """For each task the rows in which it was scored and its scores `[rows, n]`, items ordered by id."""
    found: list[dict] = [{} for _ in tasks]
    places = {name: place for place, name in enumerate(tasks)}
    for row, items in predictions.items():
        for item in items:
            if item.task not in places:
                continue
            scores = found[places[item.task]].setdefault(row, {})
            if item.id in scores:
                raise ValueError(f"predictions: item {item.id!r} of task {item.task} occurs twice in row {row}")
            scores[item.id] = item.score
    stacked = []
    for name, rows in zip(tasks, found, strict=True):
        ids = {row: sorted(scores) for row, scores in rows.items()}
        if len({tuple(some) for some in ids.values()}) > 1:
            sizes = {row: len(some) for row, some in ids.items()}
            raise ValueError(
                f"predictions: expected the same items of task {name} in every row, got items per row {sizes}"
            )
        array = np.array([[scores[item] for item in ids[row]] for row, scores in rows.items()], dtype=np.float64)
        stacked.append((list(rows), array))
    return stacked


def compute_metrics(
    matrix: AccuracyMatrix,
    predictions: Mapping[int | None, Sequence[Prediction]] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Everything `metrics.json` says about scores, for the tasks learned so far.

    Args:
        matrix: with at least one row.
        predictions: row -> predictions, for intervals, router accuracy and error rates; None leaves them null.

    Returns:
        A dictionary of plain JSON values with keys method, stream, seed, num_tasks, num_learned, num_test, last,
        average, finetune, bwt, forgetting, zero_shot, forward_transfer, mtil, libero, per_task, intervals, router and
        errors.
    """
    part = matrix.learned()
    values = {name: value(part, name) for name in METRICS}
    intervals, router, errors = None, None, None
    if predictions is not None:
        intervals = bootstrap(part.tasks, predictions, resamples=resamples, seed=seed)
        intervals = {name: None if pair is None else list(pair) for name, pair in intervals.items()}
        final = [item for item in predictions.get(part.num_learned - 1, ()) if item.task in part.tasks]
        router, errors = router_confusion(final, part.tasks), diagnose(final, part.tasks)
    falls = [_plain(fall) for fall in forgetting_per_task(part.cells())] + [None]
    return {
        "method": matrix.method,
        "stream": matrix.stream,
        "seed": matrix.seed,
        "num_tasks": len(matrix.tasks),
        "num_learned": part.num_learned,
        "num_test": None if part.num_test is None else sum(part.num_test),
        **{name: values[name] for name in ("last", "average", "finetune", "zero_shot", "forward_transfer")},
        "bwt": {"T": values["bwt_T"], "T-1": values["bwt_T-1"]},
        "forgetting": {"mean": values["forgetting"], "per_task": dict(zip(part.tasks, falls, strict=True))},
        "mtil": {"transfer": values["transfer"], "average": values["mtil_average"], "last": values["last"]},
        "libero": {"fwt": values["finetune"], "nbt": values["nbt"], "auc": values["auc"]},
        "per_task": {
            name: {
                "just_trained": part.score(task, task),
                "last": part.score(part.num_learned - 1, task),
                "bwt": _change(part.score(part.num_learned - 1, task), part.score(task, task)),
                "forgetting": falls[task],
                "zero_shot": part.score(None, task),
                "num_test": None if part.num_test is None else part.num_test[task],
            }
            for task, name in enumerate(part.tasks)
        },
        "intervals": intervals,
        "router": router,
        "errors": errors,
    }
