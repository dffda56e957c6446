"""EProj: a step on one projector alone, keys, expansion and reuse, retrieval for each sample."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.keys import query

from ..models.tiny import make_composed
from ..training.made_up_run import make_run, make_stream
from .boundaries import items
from .plain import equal, make_plain
from .soft import cosine, plain_adamw
from .stepping import our_step, prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


def test_one_step_moves_the_tasks_projector_alone(stream):
    mllm, method = prepared("eproj", {"reuse_above": 1.0}, stream, 1)
    with torch.no_grad():
        for layer in mllm.projector_layers.values():
            layer.expert_weight.add_(0.1 * torch.randn_like(layer.expert_weight))
    plain = copy.deepcopy(mllm)
    make_plain(plain, [False, True], equal, 1)
    samples = list(stream.tasks[1].train[:5])
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    ours = our_step(mllm, method, samples)
    layers = {path: plain.model.get_submodule(path) for path in mllm.projector_layers}
    loss = plain.loss(plain.collate(samples, with_answers=True))
    plain_adamw(loss, [value for layer in layers.values() for value in (layer.weight, layer.bias)])
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-9)
    for path, layer in mllm.projector_layers.items():
        for stack, value in ((layer.expert_weight, layers[path].weight), (layer.expert_bias, layers[path].bias)):
            torch.testing.assert_close(stack.grad[1], value.grad, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(stack[1], value, rtol=1e-7, atol=1e-9)
        assert torch.equal(layer.expert_weight[0], before[f"{path}.expert_weight"][0])
    moved = {name for name, value in mllm.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {f"{path}.{name}" for path in layers for name in ("expert_weight", "expert_bias")}
    assert not mllm.expert_layers


def test_a_key_is_what_training_it_would_end_at(stream):
    """No vector has a higher mean cosine with the task's features."""
    mllm, method = prepared("eproj", {}, stream, 0)
    features = query(mllm, stream.tasks[0].train).cpu().double()
    features = features / features.norm(dim=1, keepdim=True)
    key = torch.nn.Parameter(method.keys[0].double())
    mean = sum(cosine(q, key) for q in features) / len(features)
    assert torch.autograd.grad(mean, key)[0].abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        near = key.detach() + 0.1 * torch.randn(key.shape, generator=generator).double()
        assert sum(cosine(q, near) for q in features) / len(features) < mean


def started(stream, cosines: list[list[float]], reuse_above: float):
    """A method that has started tasks whose keys have these cosines with the tasks before."""
    method = methods.create("eproj", reuse_above=reuse_above)
    mllm = make_composed()
    method.setup(mllm, stream)
    owners = []
    for place, row in enumerate(cosines):
        rest = (1 - sum(value**2 for value in row)) ** 0.5
        method.keys = torch.cat([torch.eye(place, place + 1), torch.tensor([[*row, rest]])])
        method.owners = [*owners, method._owner(place)]
        owners = method.owners
    return method


def test_a_task_like_an_old_one_shares_its_projector(stream):
    method = started(stream, [[], [0.3], [0.2, 0.7], [0.65, 0.0, 0.7]], 0.6)
    # the second is new, the third is like the second, the fourth is most like the third and so has the second's
    assert method.owners == [0, 1, 1, 1]
    assert [method.task_of(expert) for expert in (0, 1, 2, -1)] == [0, 1, -1, -1]
    assert started(stream, [[], [0.8], [0.5, 0.5]], 0.6).owners == [0, 0, 1]


def test_reuse_grows_nothing_and_trains_on(stream):
    mllm, method = prepared("eproj", {"reuse_above": -1.0}, stream, 2)
    assert method.owners == [0, 0, 0] and mllm.experts.num_experts == 1 and mllm.experts.trainable == (True,)
    mllm, method = prepared("eproj", {"reuse_above": 1.0}, stream, 2)
    assert method.owners == [0, 1, 2] and mllm.experts.trainable == (False, False, True)


def test_each_sample_has_the_projector_of_the_nearest_key(stream):
    mllm, method = prepared("eproj", {"reuse_above": 1.0}, stream, 2)
    samples = items(stream)
    assert method.known == 2 and set(method.route(samples).tolist()) == {0, 1}
    method.on_task_end(stream.tasks[2])
    expected = [max(range(3), key=lambda t, q=q: cosine(q, method.keys[t]).item()) for q in query(mllm, samples).cpu()]
    assert method.route(samples).tolist() == expected and len(set(expected)) == 3
    method.owners = [0, 1, 0]
    assert method.route(samples).tolist() == [(0, 1, 0)[task] for task in expected]
    assert methods.create("eproj").route(samples).tolist() == [-1] * len(samples)


def test_a_run_writes_no_adapters_that_peft_could_not_open(tmp_path):
    report = make_run(tmp_path, "eproj", num_train_epochs=1, zero_shot=False, max_steps=1)
    assert report.matrix.num_learned == 3 and not (tmp_path / "adapters").exists()


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="reuse_above must be a cosine, got 2"):
        methods.create("eproj", reuse_above=2)
    with pytest.raises(ValueError, match="targets: None leaves the experts nothing unless projector_experts is set"):
        make_composed().add_experts(1, 1, 1.0, targets=None)
