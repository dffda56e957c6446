"""PackNet: a step in what is free, pruning, retraining, and views of one packed LoRA."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .boundaries import learned
from .mixing import survives_cuts
from .plain import make_plain, one
from .stepping import fill, our_step, plain_loss, prepared

OPTIONS = {"rank": 3, "alpha": 6.0, "prune": 0.4}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def begun(stream, phase_name: str):
    """A float64 model in a phase of its second task; A and B are random, those of the first task pruned."""
    mllm, method = prepared("packnet", OPTIONS, stream, 0)
    method.on_phase_start(stream.tasks[0], method.phases(stream.tasks[0])[1])
    method.on_task_end(stream.tasks[0])
    task = stream.tasks[1]
    method.on_task_start(task)
    train, retrain = method.phases(task)
    assert (train.name, retrain.name, retrain.epochs) == ("train", "retrain", 0.5)
    method.on_phase_start(task, train)
    free = {name: owners == 0 for name, owners in method.owners.items()}
    other = copy.deepcopy(mllm)
    fill(other, torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, weight in method._acting(1):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6), dtype=weight.dtype)
            weight.copy_(torch.where(free[name], 0.3 * drawn, weight))
    if phase_name == "retrain":
        method.on_phase_start(task, retrain)
    return mllm, method


@pytest.mark.parametrize(("phase", "owner"), [("train", 0), ("retrain", 2)])
def test_a_step_moves_only_the_entries_of_its_phase(phase, owner, stream):
    """AdamW on all entries of the task's view, after which every entry of another owner is put back."""
    mllm, method = begun(stream, phase)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [False, True], one(1), 1)
    samples = list(stream.tasks[1].train[:5])
    params = [value for value in plain.model.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in params]
    loss = plain_loss(plain, samples)
    loss.backward()
    torch.optim.AdamW(params, lr=0.01, weight_decay=0.1).step()
    moved = {id(value): old for value, old in zip(params, before, strict=True)}
    torch.testing.assert_close(our_step(mllm, method, samples), loss.detach(), rtol=1e-9, atol=1e-9)
    count = 0
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        pairs = (("lora_a", layer.lora_a[3:], other.a[1]), ("lora_b", layer.lora_b[:, 3:], other.b[1]))
        for kind, ours, theirs in pairs:
            may = method.owners[f"{path}.{kind}"] == owner
            expected = torch.where(may, theirs.detach(), moved[id(theirs)])
            torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
            assert torch.equal(ours[~may], expected[~may])
            count += int(may.sum())
    assert count > 0


def test_pruning_keeps_the_largest_of_what_is_free(stream):
    _, method = begun(stream, "train")
    before = {name: (weight.clone(), method.owners[name].clone()) for name, weight in method._acting(1)}
    method.on_phase_start(stream.tasks[1], method.phases(stream.tasks[1])[1])
    for name, weight in method._acting(1):
        old, owners = before[name]
        order = sorted((places for places in (owners == 0).nonzero().tolist()), key=lambda at: -abs(old[tuple(at)]))
        kept = {tuple(at) for at in order[: round(0.6 * len(order))]}
        assert {tuple(at) for at in (method.owners[name] == 2).nonzero().tolist()} == kept
        assert torch.equal(method.owners[name] == 1, owners == 1)
        assert torch.equal(weight, old.where(method.owners[name] != 0, 0.0))


def test_experts_are_views_of_one_packed_lora(stream):
    """After steps of all phases expert t has what tasks 0..t own, bit for bit, and nothing else."""
    torch.manual_seed(0)
    mllm, method = make_composed(), methods.create("packnet", **OPTIONS, dropout=0.0)
    method.setup(mllm, stream)
    for task in stream.tasks:
        method.on_task_start(task)
        for phase in method.phases(task):
            method.on_phase_start(task, phase)
            our_step(mllm, method, phase.samples[:6])
            mllm.model.zero_grad(set_to_none=True)
        method.on_task_end(task)
    packed = dict(method._acting(2))
    for expert in range(3):
        for name, weight in method._acting(expert):
            owners = method.owners[name]
            assert torch.equal(weight, packed[name].where((owners > 0) & (owners <= expert + 1), 0.0))
    counts = [sum(int((owners == place).sum()) for owners in method.owners.values()) for place in (1, 2, 3)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_the_next_task_starts_from_the_packed_entries(stream):
    _, method = learned("packnet", stream, tasks=1)
    method.on_task_start(stream.tasks[1])
    pairs = zip(method._acting(1), method._acting(0), strict=True)
    for (name, weight), (_, before) in pairs:
        assert torch.equal(weight, before.where(method.owners[name] == 1, 0.0))
        assert weight.any() and (weight == 0).any()


def test_owners_are_what_is_stored(stream):
    _, method = learned("packnet", stream, tasks=2)
    owners = {name: value for name, value in method.state_tensors().items() if name.startswith("owners/")}
    assert len(owners) == len(method.owners) and all(value.dtype == torch.uint8 for value in owners.values())


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"prune must be in \(0, 1\), got 1"):
        methods.create("packnet", prune=1.0)
    with pytest.raises(ValueError, match="router must be one of"):
        methods.create("packnet", router="coin")


@pytest.mark.slow
def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "packnet", {"rank": 2})
