"""O-LoRA: the penalty and a step against the paper's formula, what stays frozen, and the form of MCITlib."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl_kernels import orthogonality_loss

from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .plain import equal, make_plain, one
from .stepping import our_step, prepared

OPTIONS = {"rank": 2, "alpha": 6.0, "orthogonality": 0.3, "size": 0.2}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def test_the_penalty_sums_every_overlap_and_moves_the_new_side_only():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5), (3, 5), (2, 7), (2, 5)]
    new = [torch.randn(r, k, generator=generator, dtype=torch.float64, requires_grad=True) for r, k in shapes]
    old = [torch.randn(4, k, generator=generator, dtype=torch.float64, requires_grad=True) for _, k in shapes]
    found = orthogonality_loss(new, old)
    expected = sum(
        abs(float(a[i].detach() @ b[j].detach()))
        for a, b in zip(new, old, strict=True)
        for i in range(len(a))
        for j in range(len(b))
    )
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    found.backward()
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a.grad, (a @ b.t()).sign().detach() @ b.detach())
        assert b.grad is None


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_the_papers(legacy, stream):
    """Third task: forward, loss, gradients and AdamW written out with one parameter for each expert."""
    mllm, method = prepared("o_lora", {**OPTIONS, "legacy": legacy}, stream, 2)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [legacy, legacy, True], one(2) if legacy else equal)
    layers = {path: plain.model.get_submodule(path) for path in mllm.expert_layers}
    samples = list(stream.tasks[2].train[:5])
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}

    ours = our_step(mllm, method, samples)

    plain.train()
    loss = plain.loss(plain.collate(samples, with_answers=True))
    for layer in layers.values():
        for a in layer.a[:2]:
            old = a if legacy else a.detach()
            loss = loss + 0.3 * (layer.a[2] @ old.t()).abs().sum()
        loss = loss + 0.2 * ((layer.a[2] ** 2).sum().sqrt() + (layer.b[2] ** 2).sum().sqrt())
    loss.backward()
    moving = [value for value in plain.model.parameters() if value.requires_grad]
    if legacy:
        # no gradient reaches the old B, and a parameter without one does not move
        for layer in layers.values():
            assert all(b.grad is None or not b.grad.any() for b in layer.b[:2])
        still = {id(b) for layer in layers.values() for b in layer.b[:2]}
        moving = [value for value in moving if id(value) not in still]
    torch.optim.AdamW(moving, lr=0.01, weight_decay=0.1).step()

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        other = layers[path]
        grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in other.a]
        torch.testing.assert_close(layer.lora_a.grad, torch.cat(grads), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(layer.lora_a, torch.cat(list(other.a)), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.lora_b, torch.cat(list(other.b), 1), rtol=1e-7, atol=1e-9)
        assert torch.equal(layer.lora_b[:, :4], before[f"{path}.lora_b"][:, :4])
        moved = not torch.equal(layer.lora_a[:4], before[f"{path}.lora_a"][:4])
        assert moved == legacy


def test_a_new_lora_adds_nothing_at_first_and_old_ones_stay(stream):
    mllm, method = learned("o_lora", stream, tasks=2, rank=3)
    before = {key: value.clone() for key, value in mllm.trainable_state().items()}
    samples = items(stream)
    logits = routed_logits(mllm, samples)
    method.on_task_start(stream.tasks[2])
    assert mllm.experts.trainable == (False, False, True)
    torch.testing.assert_close(routed_logits(mllm, samples), logits, rtol=1e-5, atol=1e-5)
    for path, layer in mllm.expert_layers.items():
        assert torch.equal(layer.lora_a[:6], before[f"{path}.lora_a"]) and not layer.lora_b[:, 6:].any()
        assert torch.equal(layer.lora_b[:, :6], before[f"{path}.lora_b"])


def test_what_is_stored_brings_a_fresh_model_to_the_same_logits(stream):
    mllm, method = learned("o_lora", stream)
    other, fresh = reloaded("o_lora", stream, mllm, method)
    assert fresh.known == 3
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("o_lora", stream)
    same_alone_and_mixed(mllm, items(stream))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_run_that_is_cut_off_ends_the_same(legacy, tmp_path):
    """One form in float32, the other in bfloat16 with recomputation."""
    config = {"bf16": True, "gradient_checkpointing": True} if legacy else {}
    survives_cuts(tmp_path, "o_lora", {"rank": 2, "legacy": legacy, "size": 0.01}, **config)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"orthogonality and size must not be negative, got -1 and 0\.0"):
        methods.create("o_lora", orthogonality=-1)
