"""TIR: normalised maxima with owners, likeness of tasks, release for the task at hand."""

from __future__ import annotations

import math

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.features import answer_features, image_features, text_features

from ..training.made_up_run import make_stream
from .importances import output_gradients, same_step, squared_gradients, two_tasks
from .mixing import survives_cuts
from .soft import cosine

OPTIONS = {"rank": 3, "alpha": 6.0, "importance_samples": 4, "strength": 3000.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def likeness(mllm, tasks, now) -> list[float]:
    """The formula, number by number."""
    product = [1.0] * len(tasks)
    for tower in (image_features, text_features, answer_features):
        ours = tower(mllm, now.train).double().mean(0)
        values = [float(cosine(ours, tower(mllm, task.train).double().mean(0))) for task in tasks]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        for place, value in enumerate(values):
            standard = (value - mean) / spread if spread > 0 else 0.0
            product[place] *= 1 / (1 + math.exp(-standard))
    return product


@pytest.mark.parametrize(("measure", "measured"), [("ewc", squared_gradients), ("mas", output_gradients)])
def test_one_step_is_the_papers(measure, measured, stream):
    mllm, method, history = two_tasks("tir", {**OPTIONS, "measure": measure}, stream, measured)
    totals = [sum(float(value.sum()) for value in importance.values()) for importance, _ in history]
    first, second = (
        {name: value / total for name, value in importance.items()}
        for (importance, _), total in zip(history, totals, strict=True)
    )
    theta = history[1][1]
    sim = likeness(mllm, stream.tasks[:2], stream.tasks[2])
    assert abs(sim[0] - sim[1]) > 0.01

    def penalty(params):
        pulls = []
        for name in params:
            owned = second[name] > first[name]
            weight = torch.where(owned, (1 - sim[1]) * second[name], (1 - sim[0]) * first[name])
            assert torch.equal(method.owners[name].bool(), owned)
            pulls.append((weight * (params[name] - theta[name]) ** 2).sum())
        return 3000.0 / 2 * sum(pulls)

    same_step(mllm, method, list(stream.tasks[2].train[:5]), penalty)


def test_one_old_task_is_half_like_in_everything(stream):
    _, method, _ = two_tasks("tir", OPTIONS, stream, squared_gradients)
    method.seen = {name: rows[:1] for name, rows in method.seen.items()}
    assert method.similarity(stream.tasks[2]).tolist() == [0.125]


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="measure must be one of ewc, mas, got 'si'"):
        methods.create("tir", measure="si")
    with pytest.raises(ValueError, match="feature_samples must be at least 1, got 0"):
        methods.create("tir", feature_samples=0)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "tir", {"rank": 2, "importance_samples": 3})
