"""M2Distill: relative distances of features and a divergence of answers, to the model before the task."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mllmcl import methods

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .mixing import survives_cuts
from .pairs import in_second_task, rows_of, same_step
from .stepping import our_step, plain_loss, prepared

OPTIONS = {"rank": 3, "alpha": 6.0, "policy": 0.4}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_one_step_is_the_formula(stream):
    """Features sample by sample, without padding."""
    options = {**OPTIONS, "taps": {"image": 0.5, "language": 2.0}}
    mllm, method, plain, teacher, _ = in_second_task("m2distill", options, stream)
    longer = dataclasses.replace(stream.tasks[0].train[0], question="which of the colours is it here")
    samples = [*stream.tasks[1].train[:3], longer]
    assert not mllm.collate(samples, with_answers=True).attention_mask.all()
    sums = {"image": [0.0, 0.0], "language": [0.0, 0.0]}
    divergences = []
    with torch.no_grad():
        old_rows = rows_of(teacher, samples)
    for (batch, image, hidden), (_, old_image, old_hidden) in zip(rows_of(plain, samples), old_rows, strict=True):
        for tap, new, old in (("image", image, old_image), ("language", hidden, old_hidden)):
            sums[tap][0] = sums[tap][0] + ((new - old) ** 2).sum()
            sums[tap][1] = sums[tap][1] + (old**2).sum()
        for place in batch.answer_positions:
            p = torch.softmax(teacher.head(old_hidden[place]), 0)
            divergences.append((p * (p / torch.softmax(plain.head(hidden[place]), 0)).log()).sum())
    loss = plain_loss(plain, samples) + 0.4 * sum(divergences) / len(divergences)
    for tap, weight in (("image", 0.5), ("language", 2.0)):
        assert float(sums[tap][0].detach()) > 0
        loss = loss + weight * sums[tap][0] / sums[tap][1]
    same_step(mllm, method, samples, plain, loss)


def test_a_module_of_the_model_can_be_a_tap(stream):
    mllm, _ = prepared("m2distill", OPTIONS, stream, 1)
    path = next(iter(mllm.expert_layers)).rpartition(".")[0]
    samples = list(stream.tasks[1].train[:4])
    losses = []
    for taps in ({}, {f"{path}.o_proj": 1.0}):
        mllm, method = prepared("m2distill", {**OPTIONS, "taps": taps}, stream, 1)
        losses.append(float(our_step(mllm, method, samples)))
    assert losses[1] > losses[0]
    with pytest.raises(ValueError, match="taps: 'projecter' is no module of the model; near to it: "):
        methods.create("m2distill", taps={"projecter": 1.0}).setup(make_composed(), stream)
    with pytest.raises(ValueError, match="the weight of policy must not be negative, got -1"):
        methods.create("m2distill", policy=-1.0)


def test_the_first_task_has_no_teacher(stream):
    mllm, method = prepared("m2distill", OPTIONS, stream, 0)
    samples = list(stream.tasks[0].train[:4])
    expected = plain_loss(mllm.eval(), samples).detach()
    torch.testing.assert_close(our_step(mllm, method, samples), expected)


def test_the_old_model_is_the_one_before_the_task(stream):
    mllm, method = prepared("m2distill", OPTIONS, stream, 0)
    with torch.no_grad():
        for layer in mllm.projector_layers.values():
            layer.expert_weight[0].mul_(1.5)
            layer.expert_bias[0].add_(0.1)
    samples = list(stream.tasks[0].test[:3])
    batch = mllm.collate(samples, with_answers=True)
    before = mllm.eval().answer_logits(batch).detach()
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    our_step(mllm, method, stream.tasks[1].train[:4])
    with method.teaching(len(samples)):
        after = mllm.answer_logits(batch)
    assert torch.equal(before, after) and not torch.equal(mllm.eval().answer_logits(batch), after)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "m2distill", {"rank": 2})
