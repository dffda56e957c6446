"""Forward, loss, every gradient and one optimizer step of each method against a plain version of it, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .plain import equal, make_plain, one, softmax
from .stepping import our_step, plain_loss, plain_step, prepared

# name, options, task, gates of the plain version, experts that train, projector copy
CASES = (
    ("lora", {"rank": 3, "alpha": 6.0}, 0, equal, [True], None),
    ("replay", {"rank": 3, "alpha": 6.0}, 0, equal, [True], None),
    ("moelora", {"experts": 3, "rank": 2, "alpha": 12.0}, 0, softmax, [True] * 3, None),
    ("mage", {"rank": 2, "alpha": 4.0}, 0, equal, [True, True, True, False], None),
    ("mr_lora", {"rank": 3, "alpha": 6.0}, 1, one(1), [False, True], 1),
    ("mr_lora", {"rank": 2, "alpha": 6.0, "router": "mllm"}, 1, one(2), [False, False, True], 2),
)


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize(
    ("name", "options", "task", "weigh", "trains", "copied"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES]
)
def test_one_step_is_the_papers(name, options, task, weigh, trains, copied, stream):
    mllm, method = prepared(name, options, stream, task)
    plain = copy.deepcopy(mllm)
    make_plain(plain, trains, weigh, copied)
    samples = list(stream.tasks[task].train[:5])
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    torch.testing.assert_close(
        our_step(mllm, method, samples), plain_step(plain, plain_loss(plain, samples)), rtol=1e-9, atol=1e-9
    )
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        for ours, parts, dim in ((layer.lora_a, other.a, 0), (layer.lora_b, other.b, 1)):
            theirs = torch.cat(list(parts), dim)
            grads = [part.grad if part.grad is not None else torch.zeros_like(part) for part in parts]
            torch.testing.assert_close(ours.grad, torch.cat(grads, dim), rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        keep = ~torch.tensor(trains).repeat_interleave(torch.tensor(layer.state.ranks))
        assert torch.equal(layer.lora_a[keep], before[f"{path}.lora_a"][keep])
        assert torch.equal(layer.lora_b[:, keep], before[f"{path}.lora_b"][:, keep])
        if layer.router_weight is not None:
            torch.testing.assert_close(layer.router_weight.grad, other.router.grad, rtol=1e-8, atol=1e-12)
    for path, layer in mllm.projector_layers.items():
        other = plain.model.get_submodule(path)
        torch.testing.assert_close(layer.expert_weight[copied], other.weight, rtol=1e-7, atol=1e-9)
        rest = [place for place in range(len(trains)) if place != copied]
        assert torch.equal(layer.expert_weight[rest], before[f"{path}.expert_weight"][rest])


def test_finetuning_is_adamw_on_everything(stream):
    mllm, method = prepared("finetune", {}, stream, 0)
    plain = copy.deepcopy(mllm)
    samples = list(stream.tasks[0].train[:5])
    torch.testing.assert_close(our_step(mllm, method, samples), plain_step(plain, plain_loss(plain, samples)))
    moved = 0
    for (name, ours), theirs in zip(mllm.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)
        moved += ours.requires_grad
    vision = [
        name for name, value in mllm.model.named_parameters() if name.startswith("vision") and value.requires_grad
    ]
    assert moved > 10 and not vision


def test_moelora_divides_alpha_by_the_stacked_rank(stream):
    mllm, _ = prepared("moelora", {"experts": 4, "rank": 2, "alpha": 16.0}, stream, 0)
    assert mllm.experts.scaling == (16.0 / 8,) * 4 and mllm.experts.ranks == (2,) * 4


@pytest.mark.parametrize("legacy", [False, True])
def test_mage_averages_and_takes_the_average_over(legacy, stream):
    """The weight of every entry, written out; the average becomes the parameter at the task's end, twice the same."""
    mllm, method = prepared("mage", {"rank": 2, "alpha": 4.0, "legacy": legacy, "base_weight": 0.2}, stream, 1)
    method.on_task_start(stream.tasks[1])
    trained = {name: value for name, value in mllm.model.named_parameters() if value.requires_grad}
    assert any(name.startswith(mllm.projector_path) for name in trained) != legacy
    average = {name: value.detach().clone() for name, value in trained.items()}
    fisher = {name: torch.zeros_like(value) for name, value in average.items()}
    generator = torch.Generator().manual_seed(2)
    held = []
    for _ in range(3):
        for value in trained.values():
            value.grad = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        method.before_step(None)
        with torch.no_grad():
            for value in trained.values():
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.01)
        method.after_step(None)
        for name, value in trained.items():
            fisher[name] = 0.9 * fisher[name] + 0.1 * value.grad**2
            d = value.detach() - average[name]
            beta = 0.8 * d.abs().mean() * fisher[name].mean() / (d.abs() * fisher[name])
            beta = torch.full_like(d, 0.99) if legacy else beta.clamp(0.08, 1.0)
            average[name] = beta * average[name] + (1 - beta) * value.detach()
            held.append(beta.flatten())
    shares = torch.cat(held)
    assert legacy or (0.1 < (shares == 1).double().mean() < 0.9 and (shares < 0.5).double().mean() > 0.02)
    for name, value in average.items():
        torch.testing.assert_close(method.averages[name], value, rtol=1e-9, atol=1e-12)
    method.on_task_end(stream.tasks[1])
    ends = {name: value.detach().clone() for name, value in trained.items()}
    method.on_task_end(stream.tasks[1])
    for name, value in trained.items():
        assert torch.equal(value, ends[name]) and torch.equal(value, method.averages[name])


def test_mage_trains_the_first_task_plainly(stream):
    mllm, method = prepared("mage", {"rank": 2}, stream, 0)
    our_step(mllm, method, stream.tasks[0].train[:5])
    ends = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    method.on_task_end(stream.tasks[0])
    assert method.state_tensors() == {}
    assert all(torch.equal(value, ends[name]) for name, value in mllm.model.named_parameters())


def test_mage_trains_what_the_modality_says(stream):
    mllm, method = prepared("mage", {"modalities": {"t1": "text to image"}}, stream, 0)
    assert mllm.experts.trainable == (True, True, True, False)
    method.on_task_start(stream.tasks[1])
    assert mllm.experts.trainable == (True, False, False, True)
    with pytest.raises(ValueError, match="modality must be one of"):
        methods.create("mage", modality="smell")
