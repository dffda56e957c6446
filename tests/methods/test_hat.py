"""HAT: a step against the paper's chain rule and compensation, units that stay, units by task at test."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .boundaries import items, learned
from .mixing import survives_cuts
from .plain import make_plain
from .stepping import our_step, plain_loss, prepared

OPTIONS = {"rank": 3, "alpha": 6.0, "s_max": 20.0, "gain": 10.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize("progress", [0.0, 0.3])
def test_one_step_is_the_papers(progress, stream):
    mllm, method = prepared("hat", OPTIONS, stream, 1)
    method.progress = progress
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True] * 3, None)
    s = 1 / 20 + (20 - 1 / 20) * progress
    e_LE = (10 * method.masks.embedding[1]).detach().requires_grad_()
    taken_LE = method.masks.embedding[0] > 0
    assert taken_LE.any() and not taken_LE.all()
    layers = [plain.model.get_submodule(path) for path in mllm.expert_layers]
    for place, layer in enumerate(layers):
        layer.weigh = lambda x, router, count, at=place: torch.sigmoid(s * e_LE[at])
    samples = list(stream.tasks[1].train[:5])
    a_LE = torch.sigmoid(s * e_LE)
    cost = a_LE[~taken_LE].sum() / (~taken_LE).sum()
    loss = plain_loss(plain, samples) + 0.75 * cost
    loss.backward()
    torch.testing.assert_close(our_step(mllm, method, samples), loss.detach(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        e_LE.grad *= 20 * (torch.cosh(s * e_LE) + 1) / (s * (torch.cosh(e_LE) + 1))
    torch.testing.assert_close(method.masks.embedding.grad[1], 10 * e_LE.grad, rtol=1e-6, atol=1e-9)
    assert not method.masks.embedding.grad[[0, 2]].any()
    old = copy.deepcopy(layers)
    torch.optim.AdamW(
        [value for value in plain.model.parameters() if value.requires_grad and value.grad is not None],
        lr=0.01, weight_decay=0.1,
    ).step()  # fmt: skip
    for place, layer in enumerate(mllm.expert_layers.values()):
        for unit in range(3):
            other = (old if taken_LE[place, unit] else layers)[place]
            same = {"rtol": 0, "atol": 0} if taken_LE[place, unit] else {"rtol": 1e-7, "atol": 1e-9}
            torch.testing.assert_close(layer.lora_a[unit], other.a[unit][0].detach(), **same)
            torch.testing.assert_close(layer.lora_b[:, unit], other.b[unit][:, 0].detach(), **same)


def test_attention_hardens_within_a_task(stream):
    _, method = prepared("hat", OPTIONS, stream, 0)
    soft, hard = (method.masks.attention(0, s, 20.0) for s in (1 / 20, 20.0))
    assert (soft - 0.5).abs().max() < 0.06 and torch.equal(hard.round().bool(), method.masks.used()[0])


def test_at_test_a_sample_has_the_units_of_its_task(stream):
    mllm, method = learned("hat", stream, router="oracle", **OPTIONS)
    samples = items(stream)
    gates = method.route(samples)
    for sample, row in zip(samples, gates, strict=True):
        place = [task.name for task in stream.tasks].index(sample.task)
        assert torch.equal(row.bool(), method.masks.embedding[place] > 0)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [False] * 3, None)
    for place, path in enumerate(mllm.expert_layers):
        used = (method.masks.embedding[2, place] > 0).float()
        plain.model.get_submodule(path).weigh = lambda x, router, count, used=used: used
    last = items(stream)[-4:]
    with torch.no_grad(), mllm.use_experts(method.route(last)):
        ours = mllm.answer_logits(mllm.collate(last, with_answers=True))
        theirs = plain.answer_logits(plain.collate(last, with_answers=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_a_task_uses_never_changes_again(stream):
    """Logits of the first task's samples are the same, bit for bit, after steps of the second."""
    mllm, method = prepared("hat", {**OPTIONS, "router": "oracle"}, stream, 0)
    method.on_task_end(stream.tasks[0])
    batch = mllm.collate(stream.tasks[0].test[:4], with_answers=True)

    def answers():
        with torch.no_grad(), mllm.use_experts(method.route(stream.tasks[0].test[:4])):
            return mllm.eval().answer_logits(batch)

    before = answers()
    method.on_task_start(stream.tasks[1])
    moved = [layer.lora_a.clone() for layer in mllm.expert_layers.values()]
    for _ in range(2):
        our_step(mllm, method, stream.tasks[1].train[:6])
        mllm.model.zero_grad(set_to_none=True)
    assert any(
        not torch.equal(old, layer.lora_a) for old, layer in zip(moved, mllm.expert_layers.values(), strict=True)
    )
    assert torch.equal(answers(), before)


def test_embeddings_stay_within_bounds(stream):
    mllm, method = prepared("hat", OPTIONS, stream, 0)
    with torch.no_grad():
        method.masks.embedding[0, 0, 0] = 3.0
    our_step(mllm, method, stream.tasks[0].train[:4])
    assert float(method.masks.embedding.detach().abs().max()) <= 0.6 + 1e-12


def test_wrong_options_are_refused():
    for options, match in (
        ({"s_max": 0.5}, "s_max must be at least 1.0, got 0.5"),
        ({"strength": -1.0}, "strength must be at least 0.0, got -1.0"),
        ({"gain": 0.0}, "gain must be above 0.0, got 0.0"),
        ({"router": "mllm"}, "router must be one without an expert of its own, got 'mllm'"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.create("hat", **options)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "hat", {"rank": 2}, cuts=(("_step", 5), ("predict", 2)))
