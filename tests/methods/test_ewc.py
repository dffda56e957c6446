"""EWC: Fisher information sample by sample, a pull to every old task in two tensors, the online form."""

from __future__ import annotations

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .importances import made_plain, same_step, squared_gradients, two_tasks
from .mixing import survives_cuts
from .stepping import our_step, plain_loss, plain_step, prepared, same_lora

OPTIONS = {"rank": 3, "alpha": 6.0, "importance_samples": 4, "strength": 300.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_one_step_is_the_papers_with_a_pull_for_each_old_task(stream):
    mllm, method, history = two_tasks("ewc", OPTIONS, stream, squared_gradients)

    def penalty(params):
        pulls = [
            (fisher[name] * (params[name] - theta[name]) ** 2).sum() for fisher, theta in history for name in params
        ]
        return 300.0 / 2 * sum(pulls)

    assert all(float(fisher[name].sum()) > 0 for fisher, _ in history for name in fisher)
    same_step(mllm, method, list(stream.tasks[2].train[:5]), penalty)


def test_online_has_one_anchor_and_fades(stream):
    options = {**OPTIONS, "online": True, "decay": 0.6}
    mllm, method, history = two_tasks("ewc", options, stream, squared_gradients)
    (first, _), (second, theta) = history

    def penalty(params):
        pulls = [((0.6 * first[name] + second[name]) * (params[name] - theta[name]) ** 2).sum() for name in params]
        return 300.0 / 2 * sum(pulls)

    same_step(mllm, method, list(stream.tasks[2].train[:5]), penalty)


def test_the_first_task_is_plain(stream):
    mllm, method = prepared("ewc", OPTIONS, stream, 0)
    plain = made_plain(mllm)
    samples = list(stream.tasks[0].train[:5])
    torch.testing.assert_close(our_step(mllm, method, samples), plain_step(plain, plain_loss(plain, samples)))
    same_lora(mllm, plain)


def test_wrong_options_are_refused():
    for options, match in (
        ({"strength": -1.0}, "strength must not be negative, got -1.0"),
        ({"importance_samples": 0}, "importance_samples must be at least 1, got 0"),
        ({"decay": 0.0, "online": True}, r"decay must be in \(0, 1\], got 0.0"),
        ({"decay": 0.5}, "decay must be 1 without online, got 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.create("ewc", **options)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "ewc", {"rank": 2, "importance_samples": 3})
