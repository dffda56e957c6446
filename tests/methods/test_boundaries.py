"""What a method freezes, stores and chooses: task boundaries, routers, mixed batches, save and load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.routers import cluster

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .boundaries import items, learned, restore, routed_logits, stored
from .stepping import EVERY, LEGACY, our_step, trainable


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(name, options, stream):
    mllm, _ = learned(name, stream, **options)
    samples = items(stream)
    together = mllm.generate(samples, max_new_tokens=4)
    assert together == [answer for one in samples for answer in mllm.generate([one], max_new_tokens=4)]
    ids = None if mllm.router is None else mllm.router(samples)
    if ids is not None:
        assert mllm.generate(samples, experts=ids, max_new_tokens=4) == together
    single = torch.cat([routed_logits(mllm, [sample]) for sample in samples])
    torch.testing.assert_close(routed_logits(mllm, samples), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_plain_text_needs_no_sample(name, options, stream):
    mllm, _ = learned(name, stream, **options)
    text = " ".join(sample.question for sample in items(stream, 8))
    assert 1 < mllm.perplexity(text, window=16, batch_size=4) < float("inf")


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


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(name, options, stream):
    mllm, method = learned(name, stream, **options)
    held = stored(mllm, method)
    other, fresh = learned(name, stream, tasks=0, **options)
    if mllm.experts is not None and other.experts.num_experts < mllm.experts.num_experts:
        other.grow_experts(mllm.experts.num_experts - other.experts.num_experts)
    restore(other, fresh, held)
    again = stored(other, fresh)
    assert again["values"] == held["values"] and again["method"].keys() == held["method"].keys()
    assert all(torch.equal(value, held["method"][name]) for name, value in again["method"].items())
    samples = items(stream)
    if mllm.router is not None:
        assert torch.equal(mllm.router(samples), other.router(samples))
    assert torch.equal(routed_logits(mllm, samples), routed_logits(other, samples))


@pytest.mark.parametrize(("name", "options"), EVERY + LEGACY, ids=str)
def test_steps_leave_what_is_frozen_bit_for_bit(name, options, stream):
    """Two steps of every phase of two tasks: what a mask or requires_grad freezes stays, the rest moves."""
    torch.manual_seed(0)
    mllm, method = make_composed(), methods.create(name, **options)
    method.setup(mllm, stream)
    moved = set()
    for task in stream.tasks[:2]:
        method.on_task_start(task)
        for phase in method.phases(task):
            method.on_phase_start(task, phase)
            before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
            for start in (0, 6):
                our_step(mllm, method, phase.samples[start : start + 6])
                mllm.model.zero_grad(set_to_none=True)
            masks = method.parameter_masks()
            for key, value in mllm.model.named_parameters():
                changed = value.detach() != before[key]
                if not value.requires_grad:
                    assert not changed.any(), key
                elif key in masks:
                    assert not (changed & ~masks[key].expand(value.shape)).any(), key
                if changed.any():
                    moved.add(key)
        method.on_task_end(task)
    assert moved >= set(trainable(mllm))


def test_replay_stores_ids_and_mixes_them_in(stream):
    _, method = learned("replay", stream, tasks=2, per_task=5, repeat=2)
    assert {name: len(ids) for name, ids in method.buffer.items()} == {"t0": 5, "t1": 5}
    mixed = method.training_samples(stream.tasks[2])
    assert len(mixed) == len(stream.tasks[2].train) + 2 * 10
    assert method.training_samples(stream.tasks[0]) == list(stream.tasks[0].train)
    with pytest.raises(ValueError, match="per_task and repeat must be at least 1"):
        methods.create("replay", per_task=0)


def test_methods_are_found_created_and_refused(monkeypatch):
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")}
    for name, method in methods.available().items():
        assert name in files and method.name == name
        assert method.summary and method.source and method.stores and method.at_test and method.deviations
    with pytest.raises(ValueError, match="got 'mrlora'; did you mean mr_lora"):
        methods.create("mrlora")
    with pytest.raises(TypeError, match="method must be a name, got None"):
        methods.create(None)
    with pytest.raises(TypeError, match=r"method lora takes .*rank.*, got rnak"):
        methods.create("lora", rnak=3)
    with pytest.raises(ValueError, match=r"router must be one of .*, got 'coin'"):
        methods.create("mr_lora", router="coin")
    with pytest.raises(ValueError, match="experts must be at least 2, got 1"):
        methods.create("moelora", experts=1)


def test_a_package_of_its_own_brings_a_method(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from mllmcl.methods.base import LoraMethod\n\n\n"
        "class Theirs(LoraMethod):\n    name, summary, source, stores, at_test = "
        "'theirs', 'from outside', 'none', 'nothing', 'nothing'\n"
    )
    facts = tmp_path / "theirs-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    broken = "gone = nothing_of_the_kind:X\nraises = raises:X\nplain = os:path\nlora = theirs:Theirs\n"
    (facts / "entry_points.txt").write_text(f"[mllmcl.methods]\ntheirs = theirs:Theirs\n{broken}")
    path = os.pathsep.join([str(tmp_path), str(Path(methods.__file__).parents[2])])
    command = [sys.executable, "-m", "mllmcl", "methods"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert "from outside" in found.stdout and "theirs" in found.stdout and "mr_lora" in found.stdout
    for words in (
        "entry point gone = nothing_of_the_kind:X cannot be loaded: ModuleNotFoundError",
        "entry point raises = raises:X cannot be loaded: ZeroDivisionError",
        "entry point plain = os:path is no class derived from mllmcl.methods.Method",
        "entry point lora = theirs:Theirs has the name of a method that is here already",
    ):
        assert found.stderr.count(words) == 1, found.stderr
    code = "import mllmcl; mllmcl.methods.create('lora'); mllmcl.methods.create('gone')"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "ValueError: method gone: entry point gone = nothing_of_the_kind:X cannot be loaded" in found.stderr
