"""Merging at boundaries: the algebra, what is saved, and what an exported adapter says."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mllmcl import methods
from mllmcl.models.adapter_files import export_expert

from ..models.tiny import make_composed
from ..training.made_up_run import make_run, make_stream
from ..training.test_loop import final_tensors
from .plain import equal, make_plain
from .stepping import fill, our_step, plain_loss, plain_step, prepared, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize(("rslora", "scaling"), [(True, 6.0 / math.sqrt(3)), (False, 2.0)])
def test_one_step_of_the_second_task_is_the_papers(rslora, scaling, stream):
    """W of the second task is W + s B A of the first, written out; the step is that of a LoRA on it."""
    mllm, method = prepared("lora_merged", {"rank": 3, "alpha": 6.0, "rslora": rslora}, stream, 0)
    assert mllm.experts.scaling == pytest.approx((scaling,))
    merged = {
        path: layer.weight + scaling * layer.lora_b.detach() @ layer.lora_a.detach()
        for path, layer in mllm.expert_layers.items()
    }
    samples = list(stream.tasks[1].train[:5])
    batch = mllm.collate(samples, with_answers=True)
    with torch.no_grad():
        before = mllm.answer_logits(batch)
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    with torch.no_grad():
        torch.testing.assert_close(mllm.answer_logits(batch), before, rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        torch.testing.assert_close(layer.weight.detach(), merged[path], rtol=1e-12, atol=1e-13)
        assert not layer.lora_b.any() and not layer.weight.requires_grad
    fill(mllm, torch.Generator().manual_seed(4))
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    for path, weight in merged.items():
        plain.model.get_submodule(path).base.weight.data.copy_(weight)
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-10)
    same_lora(mllm, plain)


def test_a_fresh_lora_differs_from_the_merged_one(stream):
    mllm, method = prepared("lora_merged", {}, stream, 0)
    old = {path: layer.lora_a.detach().clone() for path, layer in mllm.expert_layers.items()}
    method.on_task_start(stream.tasks[1])
    assert all((layer.lora_a != old[path]).any() for path, layer in mllm.expert_layers.items())


def test_nothing_is_merged_before_the_second_task(stream):
    mllm, method = prepared("lora_merged", {}, stream, 0)
    base = make_composed()
    for path, layer in mllm.expert_layers.items():
        assert torch.equal(layer.weight, base.model.get_submodule(path).weight.double())
    assert method.state_tensors() == {} and method.state_values() == {"num_merged": 0}


def test_experts_with_a_learned_router_are_not_merged(stream):
    mllm, _ = prepared("moelora", {}, stream, 0)
    with pytest.raises(ValueError, match="cannot be merged"):
        mllm.merge_experts()
    with pytest.raises(ValueError, match="there are no experts to merge"):
        make_composed().merge_experts()


def test_a_half_precision_base_takes_the_sum_rounded_once(stream):
    mllm, method = make_composed(), methods.create("lora_merged")
    mllm.model.bfloat16()
    method.setup(mllm, stream)
    method.on_task_start(stream.tasks[0])
    fill(mllm, torch.Generator().manual_seed(4))
    wanted = {
        path: (layer.weight.float() + 2.0 * layer.lora_b.detach() @ layer.lora_a.detach()).bfloat16()
        for path, layer in mllm.expert_layers.items()
    }
    method.on_task_start(stream.tasks[1])
    for path, layer in mllm.expert_layers.items():
        assert layer.weight.dtype == torch.bfloat16
        torch.testing.assert_close(layer.weight.detach(), wanted[path], rtol=0.008, atol=0.0)
        assert (layer.weight == wanted[path]).float().mean() > 0.99


def test_a_checkpoint_holds_the_merged_weights_once(tmp_path):
    make_run(tmp_path, "lora_merged", max_new_tokens=2)
    names = list(final_tensors(tmp_path))
    merged = [name for name in names if name.startswith("method/merged/")]
    assert len(merged) == 2 * 7 and all(name.endswith("proj.weight") for name in merged)
    assert not [name for name in names if name.startswith("model/") and name.endswith("_proj.weight")]


def test_an_exported_adapter_tells_which_base_it_goes_on(stream, tmp_path):
    mllm, method = prepared("lora_merged", {}, stream, 0)
    export_expert(mllm, 0, tmp_path / "first")
    method.on_task_start(stream.tasks[1])
    export_expert(mllm, 0, tmp_path / "second")
    assert "published base" not in (tmp_path / "first" / "README.md").read_text()
    assert "weights of its linears 1 times before" in (tmp_path / "second" / "README.md").read_text()
