"""Zero-shot: nothing is added, nothing moves."""

from __future__ import annotations

import torch

from ..models.tiny import make_composed
from ..training.made_up_run import make_run, make_stream
from .stepping import prepared


def test_the_model_is_the_base_and_nothing_trains():
    stream = make_stream()
    mllm, method = prepared("zero_shot", {}, stream, 2)
    base = make_composed().model.double()
    assert mllm.experts is None and not any(value.requires_grad for value in mllm.model.parameters())
    for (name, ours), (other, theirs) in zip(mllm.model.named_parameters(), base.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    assert [method.phases(task) for task in stream.tasks] == [[], [], []]
    assert method.state_tensors() == {} and method.state_values() == {}


def test_a_run_evaluates_the_base_after_every_task(tmp_path):
    report = make_run(tmp_path, "zero_shot", max_new_tokens=2)
    rows = [[report.matrix.score(after, task) for task in range(3)] for after in range(3)]
    assert rows[0] == rows[1] == rows[2] == list(report.matrix.zero_shot)
    assert not (tmp_path / "adapters").exists()
