"""DISCO: training alone, the mixture against the paper's formula, and the form of the public code."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.features import text_features

from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .plain import make_plain, one
from .stepping import our_step, plain_loss, plain_step, prepared


@pytest.fixture(scope="module")
def stream():
    """Questions of one task differ a little, so that no sample lies on its anchor."""
    made = make_stream()
    ends = ("?", " is it?", ", then")
    tasks = [
        dataclasses.replace(
            task,
            train=[dataclasses.replace(s, question=s.question + ends[n % 3]) for n, s in enumerate(task.train)],
            test=[dataclasses.replace(s, question=s.question + ends[n % 2]) for n, s in enumerate(task.test)],
        )
        for task in made.tasks
    ]
    return dataclasses.replace(made, tasks=tuple(tasks))


def weights(mllm, stream, samples, known: int, temperature: float) -> torch.Tensor:
    """softmax(cos(u, U_i) / temperature), sample by sample."""
    rows = []
    for sample in samples:
        u = text_features(mllm, [sample])[0]
        scores = []
        for task in stream.tasks[:known]:
            anchor = sum(text_features(mllm, [other])[0] for other in task.train) / len(task.train)
            scores.append(u @ anchor / (u.norm() * anchor.norm()) / temperature)
        rows.append(torch.softmax(torch.stack(scores), 0))
    return torch.stack(rows)


def test_one_step_trains_the_new_expert_alone(stream):
    mllm, method = prepared("disco", {"rank": 2, "alpha": 6.0}, stream, 2)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [False, False, True], one(2))
    samples = list(stream.tasks[2].train[:5])
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_a, torch.cat(list(other.a)), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.lora_b, torch.cat(list(other.b), 1), rtol=1e-7, atol=1e-9)
        assert torch.equal(layer.lora_a[:4], before[f"{path}.lora_a"][:4])
        assert torch.equal(layer.lora_b[:, :4], before[f"{path}.lora_b"][:, :4])


@pytest.mark.parametrize("tasks", [2, 3])
def test_at_test_every_layer_mixes_by_the_question(tasks, stream):
    """Before the last task ends its expert, there already, weighs nothing."""
    mllm, method = learned("disco", stream, tasks=tasks, temperature=0.2)
    expected = weights(mllm, stream, items(stream), tasks, 0.2)
    assert float(expected.min()) > 0.01 and float(expected.std(0).min()) > 0.01
    if tasks == 2:
        method.on_task_start(stream.tasks[2])
        expected = torch.cat([expected, torch.zeros(len(expected), 1)], 1)
    torch.testing.assert_close(method.route(items(stream)), expected, rtol=1e-5, atol=1e-6)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [False] * 3, lambda x, router, count: weigh)
    for row, sample in enumerate(items(stream)):
        weigh = [float(value) for value in expected[row]] + [0.0] * (3 - expected.shape[1])
        with torch.no_grad():
            theirs = plain.answer_logits(plain.collate([sample], with_answers=True))
        torch.testing.assert_close(routed_logits(mllm, [sample]), theirs, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("disco", stream)
    same_alone_and_mixed(mllm, items(stream))


def test_legacy_takes_one_weighting_from_the_mean_of_a_batch(stream):
    mllm, method = learned("disco", stream, temperature=0.2, legacy=True)
    samples = items(stream)
    mean = text_features(mllm, samples).mean(0)
    anchors = torch.stack([text_features(mllm, task.train).mean(0) for task in stream.tasks])
    one_row = torch.softmax(torch.cosine_similarity(mean[None], anchors) / 0.2, 0)
    torch.testing.assert_close(method.route(samples), one_row.expand(len(samples), 3), rtol=1e-5, atol=1e-6)
    paper = dataclasses.replace(method, legacy=False)
    paper.known, paper.anchors, paper.mllm = method.known, method.anchors, mllm
    torch.testing.assert_close(method.route(samples[:1]), paper.route(samples[:1]))
    assert mllm.routes_batches and not learned("disco", stream, tasks=0)[0].routes_batches


def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(stream):
    mllm, method = learned("disco", stream)
    other, _ = reloaded("disco", stream, mllm, method)
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))
    assert set(method.state_tensors()) == {"anchors/text"} and method.anchors.means["text"].shape[0] == 3


def test_before_the_first_task_the_base_answers(stream):
    _, method = learned("disco", stream, tasks=0)
    assert method.route(items(stream)).tolist() == [-1] * len(items(stream))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        methods.create("disco", temperature=0)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_run_that_is_cut_off_ends_the_same(legacy, tmp_path):
    survives_cuts(tmp_path, "disco", {"rank": 2, "legacy": legacy})
