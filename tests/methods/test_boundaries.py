"""What a method freezes, stores and chooses: task boundaries, routers, mixed batches, save and load."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.routers import cluster

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def learned(name: str, stream, tasks: int = 3, **options):
    """A method that has ended some tasks, with experts that differ."""
    torch.manual_seed(0)
    mllm = make_composed()
    method = methods.create(name, **options)
    method.setup(mllm, stream)
    generator = torch.Generator().manual_seed(3)
    for task in stream.tasks[:tasks]:
        method.on_task_start(task)
        with torch.no_grad():
            for layer in mllm.expert_layers.values():
                layer.lora_b.add_(torch.randn(layer.lora_b.shape, generator=generator) * 0.2)
            for layer in mllm.projector_layers.values():
                noise = torch.randn(layer.expert_weight.shape, generator=generator)
                layer.expert_weight.add_(noise * 0.1)
        method.on_task_end(task)
    return mllm.eval(), method


def items(stream, count=4):
    return [sample for task in stream.tasks for sample in task.test[:count]]


@pytest.mark.parametrize("options", [{"router": "prototype"}, {"router": "oracle"}, {"router": "mllm"}], ids=str)
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(options, stream):
    mllm, method = learned("mr_lora", stream, **options)
    samples = items(stream)
    ids = method.route(samples)
    together = mllm.generate(samples, experts=ids, max_new_tokens=4)
    alone = []
    for place, sample in enumerate(samples):
        alone += mllm.generate([sample], experts=ids[place : place + 1], max_new_tokens=4)
    assert together == alone
    assert mllm.generate(samples, max_new_tokens=4) == together
    batch = mllm.collate(samples, with_answers=True)
    with torch.no_grad(), mllm.use_experts(ids):
        mixed = mllm.answer_logits(batch)
    single = []
    for place, sample in enumerate(samples):
        with torch.no_grad(), mllm.use_experts(ids[place : place + 1]):
            single.append(mllm.answer_logits(mllm.collate([sample], with_answers=True)))
    torch.testing.assert_close(mixed, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_prototypes_route_separated_tasks_and_nothing_before_the_first(stream):
    _, method = learned("mr_lora", stream)
    samples = items(stream, 8)
    assert method.route(samples).tolist() == [stream.tasks.index(stream.task(sample.task)) for sample in samples]
    fresh, other = learned("mr_lora", stream, tasks=0)
    assert other.route(samples).tolist() == [-1] * len(samples)
    assert fresh.generate(samples[:3], max_new_tokens=3) == fresh.generate(samples[:3], experts="off", max_new_tokens=3)


def test_the_oracle_knows_the_task_and_takes_the_base_for_an_unknown_one(stream):
    _, method = learned("mr_lora", stream, tasks=2, router="oracle")
    assert method.route([task.test[0] for task in stream.tasks]).tolist() == [0, 1, -1]


def test_the_letter_router_names_known_experts_only(stream):
    _, method = learned("mr_lora", stream, tasks=2, router="mllm")
    assert set(method.route(items(stream)).tolist()) <= {1, 2}
    first, second = method.phases(stream.tasks[0]), method.phases(stream.tasks[1])
    assert [phase.name for phase in first] == ["train"] and [phase.name for phase in second] == ["train", "router"]
    letters = {sample.answer for sample in second[1].samples}
    assert letters == {"A", "B"} and len(second[1].samples) == 2 * 20
    assert all(task.description in second[1].samples[0].question for task in stream.tasks[:2])


def test_clusters_are_deterministic_and_right():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator) * 10
    points = (centres[:, None] + 0.1 * torch.randn(3, 20, 8, generator=generator)).reshape(-1, 8)
    found = cluster(points, 3)
    assert torch.equal(found, cluster(points, 3))
    assert torch.cdist(found, centres).amin(1).max() < 0.2 and set(torch.cdist(found, centres).argmin(1).tolist()) == {
        0,
        1,
        2,
    }
    assert len(cluster(points[:2], 5)) == 2


def test_old_experts_stay_and_the_new_one_starts_at_nothing(stream):
    mllm, method = learned("mr_lora", stream, tasks=1)
    before = {name: value.clone() for name, value in mllm.trainable_state().items()}
    method.on_task_start(stream.tasks[1])
    rank = method.rank
    for path, layer in mllm.expert_layers.items():
        assert torch.equal(layer.lora_a[:rank], before[f"{path}.lora_a"])
        assert torch.equal(layer.lora_b[:, :rank], before[f"{path}.lora_b"]) and not layer.lora_b[:, rank:].any()
    for path, layer in mllm.projector_layers.items():
        assert torch.equal(layer.expert_weight[1], layer.weight)
        assert torch.equal(layer.expert_weight[:1], before[f"{path}.expert_weight"])


@pytest.mark.parametrize("name", ["lora", "replay", "moelora", "mage", "mr_lora"])
def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(name, stream):
    mllm, method = learned(name, stream)
    tensors = {key: value.clone() for key, value in method.state_tensors().items()}
    values = method.state_values()
    other, fresh = learned(name, stream, tasks=0)
    while other.experts.num_experts < mllm.experts.num_experts:
        other.grow_experts(1)
    other.load_trainable_state(mllm.trainable_state())
    fresh.load_state(tensors, values)
    samples = items(stream)
    batch, again = (model.collate(samples, with_answers=True) for model in (mllm, other))
    routes = None if mllm.router is None else mllm.router(samples)
    if routes is not None:
        assert torch.equal(routes, other.router(samples))
    with torch.no_grad(), mllm.use_experts(routes), other.use_experts(routes):
        assert torch.equal(mllm.answer_logits(batch), other.answer_logits(again))


def test_replay_stores_ids_and_mixes_them_in(stream):
    _, method = learned("replay", stream, tasks=2, per_task=5, repeat=2)
    assert {name: len(ids) for name, ids in method.buffer.items()} == {"t0": 5, "t1": 5}
    mixed = method.training_samples(stream.tasks[2])
    assert len(mixed) == len(stream.tasks[2].train) + 2 * 10
    assert method.training_samples(stream.tasks[0]) == list(stream.tasks[0].train)
    with pytest.raises(ValueError, match="per_task and repeat must be at least 1"):
        methods.create("replay", per_task=0)


def test_methods_are_found_created_and_refused(monkeypatch):
    assert set(methods.available()) >= {"finetune", "lora", "mage", "moelora", "mr_lora", "replay"}
    for method in methods.available().values():
        assert method.summary and method.source and method.stores and method.at_test and method.deviations
    with pytest.raises(ValueError, match="got 'mrlora'; did you mean mr_lora"):
        methods.create("mrlora")
    with pytest.raises(TypeError, match=r"method lora takes .*rank.*, got rnak"):
        methods.create("lora", rnak=3)
    with pytest.raises(ValueError, match=r"router must be one of .*, got 'coin'"):
        methods.create("mr_lora", router="coin")
    with pytest.raises(ValueError, match="experts must be at least 2, got 1"):
        methods.create("moelora", experts=1)


def test_a_third_party_registers_by_entry_point(monkeypatch):
    class Theirs(methods.Method):
        name = "theirs"

    class Entry:
        name = "theirs"

        @staticmethod
        def load():
            return Theirs

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry] if group == "mllmcl.methods" else [])
    assert isinstance(methods.create("theirs"), Theirs)
