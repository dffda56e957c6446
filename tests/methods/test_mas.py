"""MAS: importances from the size of the output, added up over tasks, one anchor."""

from __future__ import annotations

import pytest

from ..training.made_up_run import make_stream
from .importances import output_gradients, same_step, two_tasks
from .mixing import survives_cuts

OPTIONS = {"rank": 3, "alpha": 6.0, "importance_samples": 4, "strength": 7.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_one_step_is_the_papers(stream):
    mllm, method, history = two_tasks("mas", OPTIONS, stream, output_gradients)
    (first, _), (second, theta) = history

    def penalty(params):
        pulls = [((first[name] + second[name]) * (params[name] - theta[name]) ** 2).sum() for name in params]
        return 7.0 / 2 * sum(pulls)

    same_step(mllm, method, list(stream.tasks[2].train[:5]), penalty)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "mas", {"rank": 2, "importance_samples": 3})
