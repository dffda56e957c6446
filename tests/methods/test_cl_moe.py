"""CL-MoE: a step and its counts, the momentum by roles, the two routers at test, and the form of the public code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mllmcl import methods

from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .plain import make_plain, softmax
from .stepping import our_step, plain_loss, plain_step, prepared

SMALL = {"experts": 4, "rank": 2, "alpha": 16.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def count(method) -> None:
    """Counts as if a task had been trained, no two alike."""
    generator = torch.Generator().manual_seed(len(method.counts_TLE))
    order = torch.randperm(method.counts_LE.numel(), generator=generator)
    method.counts_LE = 1.0 + order.view(method.counts_LE.shape).float()


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_moeloras_and_counts_the_top_two_of_every_token(legacy, stream):
    mllm, method = prepared("cl_moe", {**SMALL, "legacy": legacy}, stream, 0)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True] * 4, softmax)
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].detach()}))
        for path, layer in mllm.expert_layers.items()
    ]
    routers = {path: layer.router_weight.detach().clone() for path, layer in mllm.expert_layers.items()}
    # of unequal length, so that there are pads that must not count
    samples = [sample for task in stream.tasks for sample in task.train[:2]]
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-9)
    for hook in hooks:
        hook.remove()
    mask = mllm.collate(samples, with_answers=True).attention_mask
    assert not mask.all()
    for place, (path, layer) in enumerate(mllm.expert_layers.items()):
        other = plain.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_b, torch.cat(list(other.b), 1), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.router_weight, other.router, rtol=1e-7, atol=1e-9)
        counts = [0] * 4
        for row in range(len(samples)):
            for position in range(int(mask[row].sum())):
                scores = (routers[path] @ inputs[path][row, position]).tolist()
                for expert in sorted(range(4), key=lambda e, scores=scores: -scores[e])[:2]:
                    counts[expert] += 1
        assert method.counts_LE[place].tolist() == ([0.0] * 4 if legacy else counts)
    assert not mllm.experts.routings and not mllm.experts.collect


def test_at_a_tasks_end_each_expert_moves_by_its_role(stream):
    mllm, method = learned("cl_moe", stream, tasks=2, before_end=count, **SMALL)
    task, gamma = stream.tasks[2], 0.7
    method.on_task_start(task)
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    with torch.no_grad():
        for value in mllm.trainable_state().values():
            value.add_(torch.randn(value.shape) * 0.1)
    tuned = {key: value.clone() for key, value in mllm.trainable_state().items()}
    count(method)
    counts = torch.cat([method.counts_TLE, method.counts_LE[None]]).tolist()
    method.on_task_end(task)
    roles = set()
    for place, (path, layer) in enumerate(mllm.expert_layers.items()):
        best = [set(sorted(range(4), key=lambda e, row=of_task[place]: -row[e])[:2]) for of_task in counts]
        for expert in range(4):
            is_new, was = expert in best[2], expert in best[0] | best[1]
            keep = 1.0 if not is_new else gamma if was else 1.0 - gamma
            roles.add(keep)
            rows = slice(2 * expert, 2 * expert + 2)
            for name, part in (("lora_a", (rows,)), ("lora_b", (slice(None), rows))):
                old, new = before[f"{path}.{name}"][part], tuned[f"{path}.{name}"][part]
                found = getattr(layer, name).detach()[part]
                torch.testing.assert_close(found, keep * old + (1 - keep) * new)
                assert keep < 1.0 or torch.equal(found, old)
        assert torch.equal(layer.router_weight, tuned[f"{path}.router_weight"])
    assert len(roles) == 3
    ends = {key: value.clone() for key, value in mllm.trainable_state().items()}
    method.on_task_end(task)
    assert all(torch.equal(value, ends[key]) for key, value in mllm.trainable_state().items())


def test_the_first_task_is_taken_over_as_tuned(stream):
    mllm, method = learned("cl_moe", stream, tasks=0, **SMALL)
    method.on_task_start(stream.tasks[0])
    with torch.no_grad():
        for value in mllm.trainable_state().values():
            value.add_(1.0)
    tuned = {key: value.clone() for key, value in mllm.trainable_state().items()}
    count(method)
    method.on_task_end(stream.tasks[0])
    assert all(torch.equal(value, tuned[key]) for key, value in mllm.trainable_state().items())


class Dual(nn.Module):
    """W x + s sum_i (beta g(x)_i + (1 - beta) G_i) B_i A_i x; G is set from outside."""

    def __init__(self, layer, task_gates: dict, beta: float):
        super().__init__()
        self.layer, self.task_gates, self.beta = layer, task_gates, beta

    def forward(self, x):
        layer, experts = self.layer, self.layer.state
        y = F.linear(x, layer.weight, layer.bias)
        token = torch.softmax(x @ layer.router_weight.t(), -1)
        a, b = layer.lora_a.split(experts.ranks), layer.lora_b.split(experts.ranks, 1)
        for i in range(len(a)):
            gate = self.beta * token[..., i, None] + (1 - self.beta) * self.task_gates[layer.path][i]
            y = y + gate * experts.scaling[i] * (x @ a[i].t()) @ b[i].t()
        return y


def test_at_test_the_token_router_and_the_tasks_counts_mix(stream):
    mllm, method = learned("cl_moe", stream, before_end=count, token_share=0.4, **SMALL)
    samples, paths = items(stream), list(mllm.expert_layers)
    plain, gates = copy.deepcopy(mllm), {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(plain.model.get_submodule(parent), name, Dual(plain.expert_layers[path], gates, 0.4))
    for sample in samples:
        task = stream.tasks.index(stream.task(sample.task))
        for place, path in enumerate(paths):
            row = method.counts_TLE[task, place].tolist()
            best = sorted(range(4), key=lambda e, row=row: -row[e])[:2]
            gates[path] = [row[e] / sum(row[b] for b in best) if e in best else 0.0 for e in range(4)]
        with torch.no_grad():
            theirs = plain.answer_logits(plain.collate([sample], with_answers=True))
        torch.testing.assert_close(routed_logits(mllm, [sample]), theirs, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("cl_moe", stream, before_end=count, **SMALL)
    same_alone_and_mixed(mllm, items(stream))


def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(stream):
    mllm, method = learned("cl_moe", stream, before_end=count, **SMALL)
    assert set(method.state_tensors()) == {"counts", "counts_of_tasks", "prototypes", "owners"}
    assert method.counts_TLE.shape == (3, len(mllm.expert_layers), 4) and len(method.chooser.owners) == 3
    other, _ = reloaded("cl_moe", stream, mllm, method, **SMALL)
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))


def test_legacy_is_moelora(stream):
    mllm, method = learned("cl_moe", stream, legacy=True, **SMALL)
    other, _ = learned("moelora", stream, **SMALL)
    assert mllm.router is None and method.state_tensors() == {}
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_run_that_is_cut_off_ends_the_same(legacy, tmp_path):
    """One form in float32, the other in bfloat16 with recomputation."""
    config = {} if legacy else {"bf16": True, "gradient_checkpointing": True}
    survives_cuts(
        tmp_path, "cl_moe", {**SMALL, "legacy": legacy}, cuts=(("_step", 11), ("write_adapters", 2)), **config
    )


def test_wrong_options_are_refused():
    for options, message in (
        ({"top_k": 5}, r"top_k must be in 1\.\.4, got 5"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1\.5"),
        ({"token_share": -1}, r"token_share must be in \[0, 1\], got -1"),
        ({"experts": 1}, "experts must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.create("cl_moe", **options)
