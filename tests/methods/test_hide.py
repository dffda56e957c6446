"""HiDe-LLaVA: training alone, merged and mixed layers against the paper's formula, and the form of the public code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mllmcl.methods.features import image_features, text_features

from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .plain import make_plain, one
from .stepping import our_step, plain_loss, plain_step, prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream()


class PlainHide(nn.Module):
    """W x + s sum_i w_i B_i A_i x, w from outside in the last layer and 1 below; or s (sum B)(sum A) x there."""

    def __init__(self, layer, rank: int, known: int, is_last: bool, weights: dict, legacy: bool):
        super().__init__()
        self.layer, self.is_last, self.weights, self.legacy = layer, is_last, weights, legacy
        self.a = layer.lora_a.detach().split(rank)[legacy : legacy + known]
        self.b = layer.lora_b.detach().split(rank, 1)[legacy : legacy + known]
        self.scaling = layer.state.scaling[legacy]

    def forward(self, x):
        y = F.linear(x, self.layer.weight, self.layer.bias)
        if self.legacy and not self.is_last:
            return y + self.scaling * (x @ sum(self.a).t()) @ sum(self.b).t()
        weights = self.weights["w"] if self.is_last else [1.0] * len(self.a)
        for weight, a, b in zip(weights, self.a, self.b, strict=True):
            y = y + weight * self.scaling * (x @ a.t()) @ b.t()
        return y


def similarities(mllm, stream, samples, known: int) -> torch.Tensor:
    """cos(v, V_i) and cos(u, U_i) of each sample, [2, n, tasks]."""
    found = []
    for tower in (image_features, text_features):
        anchors = torch.stack([tower(mllm, task.train).mean(0) for task in stream.tasks[:known]])
        found.append(torch.cosine_similarity(tower(mllm, samples)[:, None], anchors[None], dim=-1))
    return torch.stack(found)


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_trains_the_new_expert_alone(legacy, stream):
    mllm, method = prepared("hide", {"rank": 2, "alpha": 6.0, "legacy": legacy}, stream, 1)
    plain, old = copy.deepcopy(mllm), 1 + legacy
    make_plain(plain, [False] * old + [True], one(old))
    samples = list(stream.tasks[1].train[:5])
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_a, torch.cat(list(other.a)), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.lora_b, torch.cat(list(other.b), 1), rtol=1e-7, atol=1e-9)
        assert torch.equal(layer.lora_a[: 2 * old], before[f"{path}.lora_a"][: 2 * old])
        assert torch.equal(layer.lora_b[:, : 2 * old], before[f"{path}.lora_b"][:, : 2 * old])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("known", [1, 2])
def test_at_test_lower_layers_are_merged_and_the_last_one_mixes(known, legacy, stream):
    """An expert that has started training takes no part."""
    mllm, method = learned("hide", stream, tasks=known, rank=2, temperature=0.3, legacy=legacy)
    method.on_task_start(stream.tasks[known])
    samples = items(stream)
    expected = torch.softmax(0.5 * similarities(mllm, stream, samples, known).sum(0) / 0.3, -1)
    plain, weights = copy.deepcopy(mllm), {}
    for path, layer in list(mllm.expert_layers.items()):
        parent, _, name = path.rpartition(".")
        other = PlainHide(plain.expert_layers[path], 2, known, ".layers.1." in path, weights, legacy)
        assert ".layers.0." in path or ".layers.1." in path
        setattr(plain.model.get_submodule(parent), name, other)
        if legacy:
            torch.testing.assert_close(layer.lora_a[:2], sum(other.a))
            torch.testing.assert_close(layer.lora_b[:, :2], sum(other.b))
    for row, sample in enumerate(samples):
        weights["w"] = expected[row]
        with torch.no_grad():
            theirs = plain.answer_logits(plain.collate([sample], with_answers=True))
        torch.testing.assert_close(routed_logits(mllm, [sample]), theirs, rtol=1e-4, atol=1e-4)
    if known == 2:
        assert float(expected.std(0).min()) > 0.01


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("hide", stream)
    same_alone_and_mixed(mllm, items(stream))


def test_legacy_takes_the_largest_cosine_of_a_batch(stream):
    mllm, method = learned("hide", stream, temperature=0.3, legacy=True)
    samples = items(stream)
    both = similarities(mllm, stream, samples, 3)
    row = torch.softmax(0.5 * (both[0].max(0).values + both[1].max(0).values) / 0.3, -1)
    torch.testing.assert_close(method.route(samples)[:, 1, 1:], row.expand(len(samples), 3), rtol=1e-5, atol=1e-6)
    alone = torch.softmax(0.5 * both[:, :1].sum(0) / 0.3, -1)
    torch.testing.assert_close(method.route(samples[:1])[:, 1, 1:], alone, rtol=1e-5, atol=1e-6)
    assert mllm.routes_batches


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(legacy, stream):
    mllm, method = learned("hide", stream, legacy=legacy)
    other, _ = reloaded("hide", stream, mllm, method, legacy=legacy)
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))
    assert set(method.state_tensors()) == {"anchors/image", "anchors/text"}
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    method.on_task_end(stream.tasks[2])
    assert all(torch.equal(value, before[key]) for key, value in mllm.trainable_state().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_the_merged_expert_does_not_train_and_the_base_answers_first(legacy, stream):
    mllm, method = learned("hide", stream, tasks=0, legacy=legacy)
    assert method.route(items(stream)).tolist() == [-1] * len(items(stream))
    method.on_task_start(stream.tasks[0])
    assert mllm.experts.trainable == ((False, True) if legacy else (True,)) and method.task_of(int(legacy)) == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_a_run_that_is_cut_off_ends_the_same(legacy, tmp_path):
    """One form in float32, the other in bfloat16 with recomputation."""
    config = {"bf16": True, "gradient_checkpointing": True} if legacy else {}
    survives_cuts(tmp_path, "hide", {"rank": 2, "legacy": legacy}, **config)
