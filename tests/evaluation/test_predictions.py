"""Files of predictions, routing and error rates."""

import pytest

from mllmcl.evaluation import Prediction, diagnose, mean_scores, read_predictions, router_confusion, write_predictions


def item(task, gold, said, expert=None, name="0"):
    return Prediction(
        id=name, task=task, question="q", gold=gold, prediction=said, expert=expert, score=float(gold == said)
    )


def test_written_and_read_again_by_row(tmp_path):
    first = [item("a", "yes", "no\n\u2028</script>", 1), item("b", "x", "x", None)]
    write_predictions(tmp_path / "predictions" / "0-zero-shot.jsonl", first[:1], None)
    write_predictions(tmp_path / "predictions" / "1-a.jsonl", first, 0)
    assert read_predictions(tmp_path) == {None: first[:1], 0: first}
    assert (tmp_path / "predictions" / "1-a.jsonl").read_text().startswith('{"after": 0, "id": "0", "task": "a"')
    assert read_predictions(tmp_path / "nothing") == {}


def test_a_strange_line_is_named(tmp_path):
    path = tmp_path / "predictions" / "1-a.jsonl"
    write_predictions(path, [item("a", "x", "x")], 0)
    path.write_text(path.read_text() + '{"after": 0, "id": "3"}\n')
    with pytest.raises(ValueError, match=r"1-a.jsonl: line 2 is not a prediction"):
        read_predictions(tmp_path)


def test_mean_scores_leave_a_task_without_items_open():
    assert mean_scores([item("a", "x", "x"), item("a", "x", "y")], ["a", "b"]) == [0.5, None]
    with pytest.raises(ValueError, match="got 'c'"):
        mean_scores([item("c", "x", "x")], ["a", "b"])


def test_router_confusion_by_hand():
    chosen = {"a": [0, 0, 1, -1], "b": [1, 1, 1, 0]}
    items = [item(task, "x", "x", expert) for task, some in chosen.items() for expert in some]
    found = router_confusion(items, ["a", "b"])
    assert found == {"accuracy": 5 / 8, "confusion": [[2, 1, 1], [1, 3, 0]]}
    assert router_confusion([item("a", "x", "x")], ["a"]) is None
    # three experts for two tasks: which is right cannot be told from the index
    assert router_confusion([item("a", "x", "x", 2)], ["a", "b"]) == {
        "accuracy": None, "confusion": [[0, 0, 1, 0], [0, 0, 0, 0]],
    }  # fmt: skip


def test_error_rates_by_hand():
    answers = ["yes"] * 10
    said = ["Yes.", "yes", "no", "NO.", "left", "it is yes", "perhaps", "", "yesterday", "yes"]
    first = [
        Prediction(id=str(at), task="a", question="", gold=gold, prediction=text, expert=None,
                   score=float(text.strip(".").lower() == "yes"))
        for at, (gold, text) in enumerate(zip(answers, said, strict=True))
    ]  # fmt: skip
    first += [item("a", "no", "no"), item("a", "no", "no")]
    second = [
        item("b", "left", "left"),
        item("b", "left", "left"),
        item("b", "right", "no"),
        item("b", "right", "right"),
    ]
    free = [item("c", f"caption {at}", "x") for at in range(5)]
    found = diagnose(first + second + free, ["a", "b", "c", "d"])
    # no, NO. | left (of b), it is yes | perhaps, empty, yesterday
    assert found["a"] == {"HAL": pytest.approx(2 / 12), "IUF": pytest.approx(2 / 12), "OTH": pytest.approx(3 / 12)}
    assert found["b"] == {"HAL": 0.0, "IUF": 0.25, "OTH": 0.0}
    assert found["c"] is None
    assert found["d"] is None
