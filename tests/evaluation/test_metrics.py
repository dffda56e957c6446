"""The accuracy matrix and every metric against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmcl.evaluation import METRICS, AccuracyMatrix, Prediction, bootstrap, compute_metrics, value
from mllmcl.evaluation.metrics import forgetting_per_task

# LoRA fine-tuning of LLaVA on UCIT as a user of MCITlib reran it (issue 6 of that repository), in percent
UCIT = AccuracyMatrix(
    tasks=("ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR", "Flickr30k"),
    scores=(
        (90.97, None, None, None, None, None),
        (90.38, 92.60, None, None, None, None),
        (73.90, 86.33, 59.54, None, None, None),
        (75.67, 68.77, 47.34, 53.30, None, None),
        (75.10, 74.53, 46.73, 52.30, 69.73, None),
        (65.77, 71.27, 45.05, 51.20, 49.60, 57.47),
    ),
)

FULL = AccuracyMatrix(
    tasks=("a", "b", "c"),
    zero_shot=(0.1, 0.2, 0.3),
    scores=((0.8, 0.3, 0.4), (0.9, 0.7, 0.2), (0.5, 0.6, 1.0)),
    num_test=(10, 20, 30),
    stream="s",
    method="m",
    seed=3,
)


def test_published_rerun_of_ucit():
    expected = {"finetune": 70.60, "last": 56.73, "average": 72.90, "bwt_T": -13.87, "bwt_T-1": -16.65}
    # printed with two digits there
    assert {name: value(UCIT, name) for name in expected} == pytest.approx(expected, abs=0.0051)
    # 90.97 - 65.77, 92.60 - 71.27, 59.54 - 45.05, 53.30 - 51.20, 69.73 - 49.60
    np.testing.assert_allclose(forgetting_per_task(UCIT.cells()), [25.20, 21.33, 14.49, 2.10, 20.13], atol=1e-9)
    assert value(UCIT, "forgetting") == pytest.approx(16.65)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", (0.5 + 0.6 + 1.0) / 3),
        ("average", (0.8 + 0.8 + 0.7) / 3),
        ("finetune", (0.8 + 0.7 + 1.0) / 3),
        ("bwt_T", (-0.3 - 0.1) / 3),
        ("bwt_T-1", -0.2),
        ("forgetting", (0.4 + 0.1) / 2),
        ("zero_shot", 0.2),
        ("forward_transfer", ((0.3 - 0.2) + (0.2 - 0.3)) / 2),
        ("transfer", (0.3 + (0.4 + 0.2) / 2) / 2),
        ("mtil_average", 5.4 / 9),
        ("nbt", (((0.8 - 0.9) + (0.8 - 0.5)) / 2 + 0.1) / 2),
        ("auc", ((0.8 + 0.9 + 0.5) / 3 + (0.7 + 0.6) / 2 + 1.0) / 3),
    ],
)
def test_metric_by_hand(name, expected):
    assert value(FULL, name) == pytest.approx(expected)


def test_every_metric_has_a_value_worked_out_here():
    marks = test_metric_by_hand.pytestmark[0].args[1]
    assert {name for name, _ in marks} == set(METRICS)


def test_a_single_task():
    matrix = AccuracyMatrix(tasks=("a",), scores=((0.5,),), zero_shot=(0.25,))
    found = {name: value(matrix, name) for name in METRICS}
    defined = {
        "last": 0.5,
        "average": 0.5,
        "finetune": 0.5,
        "bwt_T": 0.0,
        "zero_shot": 0.25,
        "mtil_average": 0.5,
        "auc": 0.5,
    }
    assert found == {**dict.fromkeys(METRICS), **defined}
    assert compute_metrics(matrix)["forgetting"] == {"mean": None, "per_task": {"a": None}}


def test_a_missing_cell_makes_none_of_what_needs_it_and_of_nothing_else():
    # after b, task a was not measured
    scores = ((0.8, None, None), (None, 0.7, None), (0.5, 0.6, 1.0))
    matrix = AccuracyMatrix(tasks=("a", "b", "c"), scores=scores)
    undefined = {name for name in METRICS if value(matrix, name) is None}
    assert undefined == {
        "average", "forgetting", "zero_shot", "forward_transfer", "transfer", "mtil_average", "nbt", "auc",
    }  # fmt: skip
    assert compute_metrics(matrix)["forgetting"]["per_task"] == {"a": None, "b": pytest.approx(0.1), "c": None}


def test_an_unfinished_run_is_judged_over_its_tasks():
    matrix = AccuracyMatrix(tasks=("a", "b", "c"), scores=FULL.scores[:2], zero_shot=FULL.zero_shot)
    assert value(matrix, "last") is None
    metrics = compute_metrics(matrix)
    assert (metrics["num_tasks"], metrics["num_learned"]) == (3, 2)
    assert metrics["last"] == pytest.approx(0.8)
    assert metrics["bwt"]["T-1"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no task has been learned"):
        AccuracyMatrix(tasks=("a",)).learned()


def test_nan_is_none_and_json_is_strict():
    matrix = AccuracyMatrix(tasks=("a", "b"), scores=((0.5, math.nan),))
    assert matrix.scores == ((0.5, None),)
    assert json.loads(json.dumps(matrix.to_json(), allow_nan=False))["rows"] == [{"after": "a", "scores": [0.5, None]}]


def test_json_layout_and_round_trip(tmp_path):
    layout = FULL.to_json()
    assert layout["rows"][0] == {"after": None, "scores": [0.1, 0.2, 0.3]}
    assert layout["rows"][3] == {"after": "c", "scores": [0.5, 0.6, 1.0]}
    assert {key: layout[key] for key in ("stream", "method", "tasks", "num_test", "seed")} == {
        "stream": "s", "method": "m", "tasks": ["a", "b", "c"], "num_test": [10, 20, 30], "seed": 3,
    }  # fmt: skip
    FULL.save(tmp_path / "matrix.json")
    assert AccuracyMatrix.load(tmp_path / "matrix.json") == FULL
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an accuracy matrix"),
        ("[]", "tasks and rows"),
        ('{"tasks": ["a", "b"], "rows": [{"after": "b", "scores": [1, 1]}]}', "in the order of tasks"),
        ('{"tasks": ["a", "b"], "rows": [{"after": "a", "scores": [1]}]}', "expected 2 cells"),
        ('{"tasks": ["a", "a"], "rows": []}', "none twice"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "matrix.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        AccuracyMatrix.load(path)
    assert str(path) in str(caught.value)


def test_rows_grow_in_order():
    matrix = AccuracyMatrix(tasks=("a", "b"))
    matrix = matrix.with_row(None, [0.1, 0.2]).with_row(0, [0.5, None])
    assert (matrix.zero_shot, matrix.scores, matrix.is_complete) == ((0.1, 0.2), ((0.5, None),), False)
    again = matrix.with_row(1, [0.4, 0.6]).with_row(0, [0.7, None])
    assert again.scores == ((0.7, None), (0.4, 0.6))
    assert again.score("b", "a") == 0.4
    assert matrix.score("b", "a") is None
    with pytest.raises(ValueError, match="rows come in order"):
        matrix.with_row(2, [0.0, 0.0])
    with pytest.raises(ValueError, match="expected one of a, b"):
        matrix.score(0, "z")


squares = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(squares)
def test_relations_between_metrics(rows):
    count = len(rows)
    matrix = AccuracyMatrix(tasks=tuple(f"t{task}" for task in range(count)), scores=tuple(map(tuple, rows)))
    close = {"abs": 1e-9}
    bwt = value(matrix, "bwt_T")
    assert bwt == pytest.approx(value(matrix, "last") - value(matrix, "finetune"), **close)
    if count > 1:
        assert value(matrix, "bwt_T-1") == pytest.approx(bwt * count / (count - 1), **close)
        # the best score is at least the one just trained
        assert value(matrix, "forgetting") >= -value(matrix, "bwt_T-1") - 1e-9
        assert -1 <= value(matrix, "forgetting") <= 1
        # a task's mean over time is its own score less what it lost, over the T - t + 1 rows from its own on
        falls = [sum(rows[t][t] - rows[k][t] for k in range(t + 1, count)) / (count - t) for t in range(count)]
        assert value(matrix, "auc") == pytest.approx(value(matrix, "finetune") - sum(falls) / count, **close)


@given(squares)
def test_cells_above_the_diagonal_do_not_matter_to_backward_metrics(rows):
    names = tuple(f"t{task}" for task in range(len(rows)))
    lower = tuple(tuple(cell if t <= k else None for t, cell in enumerate(row)) for k, row in enumerate(rows))
    full, part = AccuracyMatrix(tasks=names, scores=tuple(map(tuple, rows))), AccuracyMatrix(tasks=names, scores=lower)
    for name in ("last", "average", "finetune", "bwt_T", "bwt_T-1", "forgetting", "nbt", "auc"):
        assert value(full, name) == value(part, name)


def _items(scores: dict) -> dict:
    """Row -> predictions from (row, task) -> scores."""
    rows: dict = {}
    for (row, task), some in scores.items():
        rows.setdefault(row, []).extend(
            Prediction(id=str(at), task=task, question="", gold="x", prediction="x", expert=None, score=score)
            for at, score in enumerate(some)
        )
    return rows


def test_bootstrap_holds_the_value_and_has_the_width_of_the_normal_approximation():
    random = np.random.default_rng(0)
    draws = (random.random((3, 400)) < np.array([[0.9], [0.6], [0.8]])).astype(float)
    items = _items({(0, "a"): draws[0], (1, "a"): draws[1], (1, "b"): draws[2]})
    intervals = bootstrap(("a", "b"), items, resamples=4000)
    low, high = intervals["last"]
    mean = (draws[1].mean() + draws[2].mean()) / 2
    half = 1.96 * math.sqrt(draws[1].var() / 400 + draws[2].var() / 400) / 2
    assert (low, high) == (pytest.approx(mean - half, abs=0.004), pytest.approx(mean + half, abs=0.004))
    # the same items are drawn in both rows, so the interval is that of the differences item by item
    half = 1.96 * (draws[1] - draws[0]).std() / math.sqrt(400)
    low, high = intervals["bwt_T-1"]
    assert high - low == pytest.approx(2 * half, rel=0.08)


def test_bootstrap_has_no_width_where_rows_differ_by_a_constant():
    scores = np.array([0.0, 0.25, 0.5, 0.75] * 5)
    items = _items({(0, "a"): scores + 0.25, (1, "a"): scores, (1, "b"): scores})
    low, high = bootstrap(("a", "b"), items)["bwt_T-1"]
    assert (low, high) == (pytest.approx(-0.25), pytest.approx(-0.25))


@given(st.permutations(range(12)), st.integers(0, 3))
def test_bootstrap_does_not_see_the_order_of_items(order, seed):
    items = _items({(0, "a"): [at % 3 / 2 for at in range(12)], (1, "a"): [at % 2 for at in range(12)],
                    (1, "b"): [0.5] * 6 + [1.0] * 6})  # fmt: skip
    shuffled = {row: [some[at] for at in order if at < len(some)] + some[12:] for row, some in items.items()}
    assert bootstrap(("a", "b"), items, seed=seed) == bootstrap(("a", "b"), shuffled, seed=seed)


def test_bootstrap_seed_decides_and_undefined_stays_none():
    items = _items({(0, "a"): np.linspace(0, 1, 50) ** 2})
    one, other = bootstrap(("a",), items, seed=1), bootstrap(("a",), items, seed=2)
    assert one == bootstrap(("a",), items, seed=1)
    assert one["last"] != other["last"]
    assert one["bwt_T-1"] is None
    assert one["forgetting"] is None
    assert bootstrap(("a", "b"), items)["last"] is None


@pytest.mark.parametrize(
    ("scores", "message"),
    [({(0, "a"): [0, 1], (1, "a"): [0], (1, "b"): [1]}, "the same items of task a in every row")],
)
def test_bootstrap_refuses_rows_over_different_items(scores, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(("a", "b"), _items(scores))


def test_bootstrap_refuses_an_item_twice():
    items = _items({(0, "a"): [0, 1]})
    items[0].append(items[0][0])
    with pytest.raises(ValueError, match="occurs twice in row 0"):
        bootstrap(("a",), items)


def test_metrics_file_has_the_keys_others_read():
    metrics = compute_metrics(FULL)
    keys = "method stream seed last average finetune bwt forgetting per_task zero_shot intervals router errors"
    assert {*keys.split(), "forward_transfer", "mtil", "libero", "num_test"} <= set(metrics)
    assert set(metrics["bwt"]) == {"T", "T-1"}
    assert metrics["num_test"] == 60
    assert metrics["per_task"]["a"] == {
        "just_trained": 0.8, "last": 0.5, "bwt": pytest.approx(-0.3), "forgetting": pytest.approx(0.4),
        "zero_shot": 0.1, "num_test": 10,
    }  # fmt: skip
    assert metrics["intervals"] is None
    json.dumps(metrics, allow_nan=False)


def test_unknown_metric():
    with pytest.raises(ValueError, match="expected one of last, "):
        value(FULL, "bwt")
