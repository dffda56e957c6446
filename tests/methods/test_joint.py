"""Joint training: one step is LoRA's, the first task brings all data, later ones nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl.evaluation import Report

from ..training.made_up_run import make_run, make_stream
from .plain import equal, make_plain
from .stepping import our_step, plain_loss, plain_step, prepared, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_one_step_on_samples_of_all_tasks_is_loras(stream):
    mllm, method = prepared("joint", {"rank": 3, "alpha": 6.0}, stream, 0)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = [task.train[0] for task in stream.tasks]
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)


def test_the_first_task_brings_all_data_and_the_others_none(stream):
    _, method = prepared("joint", {}, stream, 0)
    (phase,) = method.phases(stream.tasks[0])
    assert [sample.id for sample in phase.samples] == [sample.id for task in stream.tasks for sample in task.train]
    assert method.phases(stream.tasks[1]) == method.phases(stream.tasks[2]) == []


def test_every_row_of_the_matrix_is_that_of_the_joint_model(tmp_path):
    report = make_run(tmp_path, "joint", max_new_tokens=2)
    rows = [[report.matrix.score(after, task) for task in range(3)] for after in range(3)]
    assert rows[0] == rows[1] == rows[2] and max(rows[0]) > 0
    assert Report.load(tmp_path).metrics["bwt"]["T-1"] == 0.0
