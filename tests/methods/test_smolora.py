"""SMoLoRA: forward, gradients and a step against sums over experts, choices that hold, and the public code's gates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mllmcl import methods
from mllmcl.methods.features import text_features
from mllmcl.models.experts import Selection

from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .stepping import our_step, plain_loss, plain_step, prepared

SMALL = {"experts": 6, "rank": 2, "alpha": 24.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


class PlainTwoGroups(nn.Module):
    """Outputs of all experts written out sample by sample; a hard choice plus the softmax less its own value."""

    def __init__(self, layer, told: dict, is_hash: bool):
        super().__init__()
        gating, half = layer.gating, layer.state.num_experts // 2
        self.base, self.told, self.half, self.is_hash = layer, told, half, is_hash
        self.a = nn.ParameterList(nn.Parameter(a.detach().clone()) for a in layer.lora_a.split(2))
        self.b = nn.ParameterList(nn.Parameter(b.detach().clone()) for b in layer.lora_b.split(2, 1))
        self.vision, self.instruction, self.fusion = (
            nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            for value in (gating.vision, gating.instruction, gating.fusion)
        )

    def choose(self, logits):
        p = torch.softmax(logits, -1)
        hard = F.one_hot(p.argmax(-1), self.half).to(p.dtype)
        return hard if self.is_hash else hard + p - p.detach()

    def forward(self, x):
        rows = []
        for sample, mask, e in zip(x, self.told["mask"], self.told["features"], strict=True):
            y = F.linear(sample, self.base.weight, self.base.bias)
            experts = zip(self.base.state.scaling, self.a, self.b, strict=True)
            outputs = [scaling * (sample @ a.t()) @ b.t() for scaling, a, b in experts]
            seen, asked = self.choose(self.vision @ sample[mask].mean(0)), self.choose(self.instruction @ e)
            y_vu = sum(g * out for g, out in zip(seen, outputs[: self.half], strict=True))
            y_if = sum(g * out for g, out in zip(asked, outputs[self.half :], strict=True))
            share = torch.softmax(torch.stack([y_vu @ self.fusion[0], y_if @ self.fusion[1]], -1), -1)
            rows.append(y + share[:, :1] * y_vu + share[:, 1:] * y_if)
        return torch.stack(rows)


def make_plain(mllm, samples, is_hash: bool) -> None:
    batch = mllm.collate(samples, with_answers=True)
    told = {
        "mask": batch.attention_mask.bool() & (batch.labels == -100),
        "features": text_features(mllm, samples).double(),
    }
    for path, layer in list(mllm.expert_layers.items()):
        parent, _, name = path.rpartition(".")
        setattr(mllm.model.get_submodule(parent), name, PlainTwoGroups(layer, told, is_hash))


def wide_gates(mllm) -> None:
    """Gates that choose differently from sample to sample."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in mllm.expert_layers.values():
            for value in layer.gating.parameters():
                value.copy_(torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_the_papers(legacy, stream):
    mllm, method = prepared("smolora", {**SMALL, "legacy": legacy}, stream, 0)
    wide_gates(mllm)
    samples = [sample for task in stream.tasks for sample in task.train[:2]]
    plain = copy.deepcopy(mllm)
    make_plain(plain, samples, legacy)
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        other, gating = plain.model.get_submodule(path), layer.gating
        for ours, parts, dim in ((layer.lora_a, other.a, 0), (layer.lora_b, other.b, 1)):
            grads = torch.cat([part.grad for part in parts], dim)
            torch.testing.assert_close(ours.grad, grads, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(ours, torch.cat(list(parts), dim), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gating.fusion.grad, other.fusion.grad, rtol=1e-7, atol=1e-12)
        for name in ("vision", "instruction"):
            if legacy:
                assert getattr(gating, name).grad is None
                assert torch.equal(getattr(gating, name), before[f"{path}.gating.{name}"])
            else:
                ours, theirs = getattr(gating, name), getattr(other, name)
                assert bool(theirs.grad.any())
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
                torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    projector = dict(plain.model.named_parameters())
    for name, value in mllm.model.get_submodule(mllm.projector_path).named_parameters(prefix=mllm.projector_path):
        torch.testing.assert_close(value, projector[name], rtol=1e-7, atol=1e-9)


def test_samples_choose_differently_and_the_choice_holds_while_decoding(stream):
    mllm, _ = learned("smolora", stream, **SMALL)
    wide_gates(mllm)
    layer = next(iter(mllm.expert_layers.values()))
    memory = {}
    prompt, mask = torch.randn(4, 5, layer.in_features), torch.ones(4, 5, dtype=torch.bool)
    mask[1, :2] = False
    features = torch.randn(4, 32)
    first = layer.gating(layer, prompt, Selection(prompt_mask=mask, features=features, memory=memory)) != 0
    assert (first.sum(-1) == 2).all() and (first[..., :3].sum(-1) == 1).all()
    assert len(set(first[:, 0].int().argmax(-1).tolist())) > 1
    later = Selection(prompt_mask=mask[:, :1], features=features, memory=memory)
    token = -prompt.mean(1, keepdim=True)
    assert torch.equal(layer.gating(layer, token, later)[:, 0] != 0, first[:, 0])
    forgetful = Selection(prompt_mask=torch.ones(4, 1, dtype=torch.bool), features=features)
    assert not torch.equal(layer.gating(layer, token, forgetful)[:, 0] != 0, first[:, 0])


def test_answers_and_pads_do_not_change_the_choice(stream):
    """The same prompts in a training batch, padded on the right, and in a generation batch, padded on the left."""
    mllm, _ = learned("smolora", stream, **SMALL)
    wide_gates(mllm)
    samples = items(stream)
    chosen = []
    for with_answers in (True, False):
        batch = mllm.collate(samples, with_answers=with_answers)
        memory = {}
        with torch.no_grad(), mllm.in_batch(batch, memory=memory):
            mllm.run_trunk(batch.input_ids, batch.attention_mask, batch.position_ids, batch.inputs)
        chosen.append(memory)
    assert chosen[0].keys() == set(mllm.expert_layers)
    for path, choice in chosen[0].items():
        assert torch.equal(choice, chosen[1][path])
    assert any(len(choice.unique(dim=0)) > 1 for choice in chosen[0].values())


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("smolora", stream, **SMALL)
    wide_gates(mllm)
    same_alone_and_mixed(mllm, items(stream))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(legacy, stream):
    mllm, method = learned("smolora", stream, legacy=legacy, **SMALL)
    other, _ = reloaded("smolora", stream, mllm, method, legacy=legacy, **SMALL)
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))
    path = next(iter(mllm.expert_layers))
    names = {name for name in mllm.trainable_state() if name.startswith(f"{path}.gating.")}
    assert names == {f"{path}.gating.{name}" for name in ("vision", "instruction", "fusion")}
    assert method.state_tensors() == {} and method.state_values() == {}
    trains = {name: value.requires_grad for name, value in mllm.expert_layers[path].gating.named_parameters()}
    assert trains == {"vision": not legacy, "instruction": not legacy, "fusion": True}


def test_it_sits_in_the_feed_forward_part_and_scales_by_the_stacked_rank(stream):
    mllm, _ = learned("smolora", stream, tasks=0, **SMALL)
    kinds = {path.rsplit(".", 1)[1] for path in mllm.expert_layers}
    assert kinds == {"gate_proj", "up_proj", "down_proj"} and mllm.experts.scaling == (24.0 / 12,) * 6
    with pytest.raises(ValueError, match="experts must be even and at least 4, got 5"):
        methods.create("smolora", experts=5)


def test_it_recomputes_the_same_choices_under_checkpointing(stream):
    """Gradients with and without recomputation agree."""
    grads = []
    for recompute in (False, True):
        mllm, method = prepared("smolora", SMALL, stream, 0)
        wide_gates(mllm)
        if recompute:
            mllm.enable_checkpointing()
        mllm.train()
        samples = list(stream.tasks[0].train[:3])
        with method.before_forward(samples):
            mllm.loss(mllm.collate(samples, with_answers=True)).backward()
        grads.append({name: value.grad for name, value in mllm.model.named_parameters() if value.requires_grad})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_run_that_is_cut_off_ends_the_same(legacy, tmp_path):
    """One form in float32, the other in bfloat16 with recomputation."""
    config = {} if legacy else {"bf16": True, "gradient_checkpointing": True}
    survives_cuts(tmp_path, "smolora", {**SMALL, "legacy": legacy}, **config)
