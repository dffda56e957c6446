"""mSGM joins merging, soft targets (its step: test_soft_targets.py) and rehearsal."""

from __future__ import annotations

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .stepping import prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_it_merges_and_rehearses(stream):
    mllm, method = prepared("msgm", {"rank": 4, "alpha": 8.0, "share": 0.25}, stream, 0)
    merged = {path: (layer.weight + layer.product()).detach() for path, layer in mllm.expert_layers.items()}
    assert mllm.experts.scaling == (4.0,)
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    for path, layer in mllm.expert_layers.items():
        assert torch.equal(layer.weight, merged[path]) and not layer.lora_b.any()
    assert len(method.training_samples(stream.tasks[1])) == 24 + 6
    assert set(method.state_tensors()) == {f"merged/{path}.weight" for path in merged}
    assert method.state_values() == {"buffer": method.buffer, "num_merged": 1}


def test_its_defaults_are_the_papers():
    method = methods.create("msgm")
    assert (method.rank, method.alpha, method.rslora, method.soft_alpha, method.share) == (16, 8.0, True, 0.01, 0.0)
    with pytest.raises(ValueError, match="share must be in"):
        methods.create("msgm", share=2.0)
    with pytest.raises(ValueError, match="soft_alpha must be in"):
        methods.create("msgm", soft_alpha=1.0)


def test_without_rehearsal_nothing_is_stored_of_a_task(stream):
    _, method = prepared("msgm", {}, stream, 1)
    assert method.buffer == {"t0": []}
    assert method.training_samples(stream.tasks[1]) == list(stream.tasks[1].train)
