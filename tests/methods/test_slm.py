"""SLM: steps of keys and of increments against the formulas of the paper; retrieval; the batch of the public code."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.keys import query

from ..training.made_up_run import make_stream
from .boundaries import items
from .plain import make_plain
from .soft import cosine, plain_adamw
from .stepping import our_step, prepared

#: 44 features, so that the last group is one narrower
OPTIONS = {"rank": 2, "alpha": 3.0, "slots": 3, "chosen": 2, "groups": 5}


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


def likeness(mllm, samples, keys, groups: int = 5) -> list[list[torch.Tensor]]:
    """Mean over groups of the cosine of each sample's features with each key."""
    found = []
    for q in query(mllm, samples).to(keys.dtype):
        step = -(-len(q) // groups)
        parts = range(0, len(q), step)
        found.append([sum(cosine(q[at : at + step], key[at : at + step]) for at in parts) / groups for key in keys])
    return found


def weights(row, candidates) -> dict[int, float]:
    """Slot to weight of one sample: the two nearest of the candidates, in proportion to their likeness."""
    near = sorted(candidates, key=lambda slot: -row[slot].item())[:2]
    shares = [max(row[slot].item(), 1e-6) for slot in near]
    return dict(zip(near, [share / sum(shares) for share in shares], strict=True))


def averaged(rows):
    """The same mean row for every sample."""
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)]] * len(rows)


def mixed_samples(stream) -> list:
    return [sample for task in stream.tasks for sample in task.train[:2]]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_step_of_the_keys_is_the_papers(legacy, stream):
    """The mean likeness of the two nearest keys of the task that are not hidden; AdamW on the task's keys alone."""
    options = {**OPTIONS, "mask_rate": 0.4, "legacy": legacy}
    mllm, method = prepared("slm", options, stream, 1)
    method.on_phase_start(stream.tasks[1], method.phases(stream.tasks[1])[0])
    keys = torch.nn.Parameter(method.keys.weight[3:6].detach().clone())
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    samples = mixed_samples(stream)
    torch.manual_seed(5)
    hidden = torch.rand(len(samples), 3) < 0.4
    assert hidden.any() and hidden.sum(1).max() > 1, "no sample has too few keys left, so this shows less"
    torch.manual_seed(5)
    ours = our_step(mllm, method, samples)

    rows = likeness(mllm, samples, keys)
    rows = averaged(rows) if legacy else rows
    near = []
    for row, gone in zip(rows, hidden.tolist(), strict=True):
        near += sorted(range(3), key=lambda slot, row=row, gone=gone: (gone[slot], -row[slot].item()))[:2]
    loss = -sum(rows[place // 2][slot] for place, slot in enumerate(near)) / len(near)
    plain_adamw(loss, [keys])
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(method.keys.weight.grad[3:6], keys.grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(method.keys.weight[3:6], keys, rtol=1e-8, atol=1e-10)
    rest = [0, 1, 2, 6, 7, 8]
    assert torch.equal(method.keys.weight[rest], before["slot_keys.weight"][rest])
    moved = {name for name, value in mllm.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"slot_keys.weight"}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_step_of_the_increments_is_the_papers(legacy, stream):
    """W + sum w_n B_n A_n for each sample with the two nearest slots of the task; AdamW on those slots alone."""
    mllm, method = prepared("slm", {**OPTIONS, "legacy": legacy}, stream, 1)
    method.on_phase_start(stream.tasks[1], method.phases(stream.tasks[1])[1])
    plain = copy.deepcopy(mllm)
    samples = mixed_samples(stream)
    rows = likeness(plain, samples, method.keys.weight)
    rows = averaged(rows) if legacy else rows
    chosen = [weights(row, range(3, 6)) for row in rows]
    assert legacy or len({tuple(sorted(one)) for one in chosen}) > 1
    table = torch.tensor([[one.get(slot, 0.0) for one in chosen] for slot in range(9)], dtype=torch.float64)
    own = [slot in range(3, 6) for slot in range(9)]
    make_plain(plain, own, lambda x, router, count: table[:, :, None, None])
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    ours = our_step(mllm, method, samples)

    plain.train()
    loss = plain.loss(plain.collate(samples, with_answers=True))
    layers = [plain.model.get_submodule(path) for path in mllm.expert_layers]
    moving = [part for layer in layers for stack in (layer.a, layer.b) for part in stack[3:6]]
    plain_adamw(loss, moving)
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-9)
    for layer, other in zip(mllm.expert_layers.values(), layers, strict=True):
        rank_rows = slice(6, 12)
        torch.testing.assert_close(
            layer.lora_a.grad[rank_rows], torch.cat([a.grad for a in other.a[3:6]]), rtol=1e-8, atol=1e-12
        )
        torch.testing.assert_close(layer.lora_a, torch.cat(list(other.a)), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.lora_b, torch.cat(list(other.b), 1), rtol=1e-7, atol=1e-9)
    moved = {name for name, value in mllm.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {f"{path}.{name}" for path in mllm.expert_layers for name in ("lora_a", "lora_b")}
    assert all(path.endswith("o_proj") for path in mllm.expert_layers)


def test_at_test_the_slots_of_all_known_tasks_are_looked_at(stream):
    samples = items(stream, 2)
    mllm, method = prepared("slm", OPTIONS, stream, 1)
    method.on_task_end(stream.tasks[1])
    gates = method.route(samples)
    rows = likeness(mllm, samples, method.keys.weight)
    for gate, row in zip(gates, rows, strict=True):
        expected = weights(row, range(6))
        torch.testing.assert_close(gate, torch.tensor([expected.get(slot, 0.0) for slot in range(9)]).to(gate))
    used = {slot for gate in gates for slot in gate.nonzero().flatten().tolist()}
    assert len(used) > 2 and used & {0, 1, 2} and used & {3, 4, 5}
    fresh = methods.create("slm", **OPTIONS)
    assert fresh.known == 0 and fresh.route(samples).tolist() == [-1] * len(samples)


def test_only_the_public_codes_average_depends_on_the_batch(stream):
    samples = items(stream, 2)
    for legacy in (False, True):
        mllm, method = prepared("slm", {**OPTIONS, "legacy": legacy}, stream, 1)
        method.on_task_end(stream.tasks[1])
        together = method.route(samples)
        alone = torch.cat([method.route([sample]) for sample in samples])
        assert torch.allclose(together, together[:1]) == legacy and torch.allclose(together, alone) != legacy
        assert mllm.routes_batches == legacy


def test_slots_start_at_nothing_and_keys_at_right_angles(stream):
    mllm, method = prepared("slm", OPTIONS, stream, 0)
    fresh = methods.create("slm")
    assert [phase.name for phase in method.phases(stream.tasks[0])] == ["keys", "train"]
    assert mllm.experts.scaling == (1.5,) * 9 and mllm.experts.num_experts == 9 and fresh.alpha == fresh.rank
    keys = method.keys.weight
    torch.testing.assert_close(keys @ keys.t(), torch.eye(9).double(), rtol=1e-6, atol=1e-6)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"chosen must be in 1\.\.slots = 2, got 3"):
        methods.create("slm", slots=2, chosen=3)
    with pytest.raises(ValueError, match=r"mask_rate must be in \[0, 1\), got 1"):
        methods.create("slm", mask_rate=1)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        methods.create("slm", groups=0)
