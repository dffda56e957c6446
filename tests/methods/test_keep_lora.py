"""KeepLoRA: A and the kept directions against SVDs of plain gradients, a step of B, what kept directions see."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mllmcl import methods

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .mixing import learned, survives_cuts
from .plain import equal, make_plain
from .stepping import our_step, plain_loss, plain_step, prepared, trainable

#: gradients over all samples of a task, so that a test need not know which are taken
OPTIONS = {"rank": 3, "alpha": 6.0, "gradient_share": 1.0, "gradient_energy": 0.8}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def gradients(mllm, task) -> dict[str, torch.Tensor]:
    """dL/dW of every linear on all training samples of a task in one batch, by a plain backward pass to W."""
    plain, found = copy.deepcopy(mllm).eval(), {}
    make_plain(plain, [True], equal)
    for path in mllm.expert_layers:
        found[path] = plain.model.get_submodule(path).base.weight.requires_grad_()
    plain_loss(plain, list(task.train)).backward()
    return {path: weight.grad for path, weight in found.items()}


def directions(rows: torch.Tensor, old: torch.Tensor, share: float) -> torch.Tensor:
    """`old`, then left singular vectors of the rest of rows^T until the share of all energy is reached."""
    left, values, _ = torch.linalg.svd(rows.T - old @ old.T @ rows.T, full_matrices=False)
    kept, count = (rows @ old).square().sum(), 0
    while kept < share * rows.square().sum():
        kept, count = kept + values[count].square(), count + 1
    return torch.cat((old, left[:, :count]), 1)


def base_weights(mllm) -> dict[str, torch.Tensor]:
    return {path: make_composed().model.get_submodule(path).weight.detach().double() for path in mllm.expert_layers}


def same_space(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-8)


def test_a_and_the_kept_directions_are_the_papers(stream):
    """Of the base before task 0, of its gradient after it; A of task 1 from its gradient outside of both."""
    mllm, method = prepared("keep_lora", OPTIONS, stream, 0)
    wanted = {}
    for path, weight in base_weights(mllm).items():
        wanted[path] = directions(weight, weight.new_zeros(weight.shape[1], 0), 0.6)
        same_space(method.bases[path], wanted[path])
    after = gradients(mllm, stream.tasks[0])
    method.on_task_end(stream.tasks[0])
    for path, gradient in after.items():
        num_old, wanted[path] = wanted[path].shape[1], directions(gradient, wanted[path], 0.8)
        same_space(method.bases[path], wanted[path])
        assert method.sizes[path] == [num_old, wanted[path].shape[1]]
    assert any(len(set(sizes)) == 2 for sizes in method.sizes.values())
    method.on_task_start(stream.tasks[1])
    for path, gradient in gradients(mllm, stream.tasks[1]).items():
        left, values, _ = torch.linalg.svd(gradient.T - wanted[path] @ wanted[path].T @ gradient.T)
        layer = mllm.expert_layers[path]
        assert values[2] > 1e-6 * values[0] and not layer.lora_b.any()
        signed = layer.lora_a.detach() @ left[:, :3]
        torch.testing.assert_close(signed.abs(), torch.eye(3).double(), rtol=0, atol=1e-5)


def test_one_step_moves_b_alone(stream):
    mllm, method = prepared("keep_lora", OPTIONS, stream, 1)
    assert mllm.experts.scaling == (2.0,)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    theirs = [plain.model.get_submodule(path) for path in mllm.expert_layers]
    for layer in theirs:
        layer.a.requires_grad_(False)
    samples = list(stream.tasks[1].train[:5])
    wanted = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), wanted, rtol=1e-9, atol=1e-9)
    assert {name.rpartition(".")[2] for name in trainable(mllm)} == {"lora_b"}
    for layer, other in zip(mllm.expert_layers.values(), theirs, strict=True):
        assert layer.lora_a.grad is None and torch.equal(layer.lora_a, other.a[0])
        torch.testing.assert_close(layer.lora_b.grad, other.b[0].grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(layer.lora_b, other.b[0], rtol=1e-7, atol=1e-9)


def test_kept_directions_pass_the_merged_weight_as_before(stream):
    """After steps of Adam with weight decay; earlier tasks stay in the weight."""
    mllm, method = prepared("keep_lora", OPTIONS, stream, 1)
    first = {path: layer.weight.detach().clone() for path, layer in mllm.expert_layers.items()}
    assert all((weight != first[path]).any() for path, weight in base_weights(mllm).items())
    for start in (0, 6):
        our_step(mllm, method, stream.tasks[1].train[start : start + 6])
        mllm.model.zero_grad(set_to_none=True)
    added = {path: 2.0 * (layer.lora_b @ layer.lora_a).detach() for path, layer in mllm.expert_layers.items()}
    method.on_task_end(stream.tasks[1])
    method.on_task_start(stream.tasks[2])
    for path, layer in mllm.expert_layers.items():
        kept = method.before(path, 1)
        torch.testing.assert_close(layer.weight.detach(), first[path] + added[path], rtol=1e-12, atol=1e-13)
        assert added[path].abs().max() > 1e-3
        torch.testing.assert_close(layer.weight @ kept, first[path] @ kept, rtol=0, atol=1e-12)


def test_a_rank_that_the_gradient_lacks_reads_nothing_kept(stream):
    """More rank rows than outputs: what no gradient chose stays outside of the kept space, or is 0."""
    mllm, method = prepared("keep_lora", {"rank": 64, "gradient_share": 1.0}, stream, 1)
    for path, layer in mllm.expert_layers.items():
        kept, a = method.before(path, 1), layer.lora_a.detach()
        assert len(a) == 64 > min(layer.weight.shape) and a.any() and not a[min(layer.weight.shape) :].any()
        assert float((a @ kept).abs().max()) < 1e-12


def test_taking_gradients_leaves_no_trace(stream):
    """No gradient of a parameter, no draw, no mode, nothing that trains more or less."""
    mllm, method = prepared("keep_lora", {**OPTIONS, "gradient_share": 0.4}, stream, 1)
    trains, drawn = set(trainable(mllm)), torch.get_rng_state()
    for mode in (True, False):
        mllm.train(mode)
        method.on_task_end(stream.tasks[1])
        assert all(layer.training == mode for layer in mllm.expert_layers.values())
    assert set(trainable(mllm)) == trains and torch.equal(torch.get_rng_state(), drawn)
    assert all(value.grad is None for value in mllm.model.parameters())
    assert not any(layer._forward_hooks for layer in mllm.expert_layers.values())


def test_unequal_batches_weigh_by_their_samples(stream):
    """10 samples are taken as 8 and 2."""
    mllm, method = prepared("keep_lora", {**OPTIONS, "gradient_share": 0.42}, stream, 0)
    ours, parts = method._gradients(stream.tasks[0]), list(method.batches(stream.tasks[0], 10, 8))
    assert [len(part) for part in parts] == [8, 2]
    taken = replace(stream.tasks[0], train=[sample for part in parts for sample in part])
    for path, gradient in gradients(mllm, taken).items():
        # the norms of the language model are float32 and differ with the batch
        assert (ours[path] - gradient).norm() < 1e-5 * gradient.norm()


def test_a_task_that_ends_twice_keeps_the_same(stream):
    _, method = prepared("keep_lora", OPTIONS, stream, 1)
    method.on_task_end(stream.tasks[1])
    once, sizes = {path: basis.clone() for path, basis in method.bases.items()}, copy.deepcopy(method.sizes)
    method.on_task_end(stream.tasks[1])
    assert method.sizes == sizes and all(len(counts) == 3 for counts in sizes.values())
    assert all(torch.equal(basis, once[path]) for path, basis in method.bases.items())


def test_gradients_are_float32_under_autocast(stream):
    mllm, method = make_composed(), methods.create("keep_lora", rank=2)
    method.setup(mllm, stream)
    method.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    assert {value.dtype for value in method._gradients(stream.tasks[0]).values()} == {torch.float32}


def test_a_half_precision_base_is_kept_as_exactly(stream):
    mllm, method = make_composed(), methods.create("keep_lora", rank=2, weight_energy=0.9)
    mllm.model.bfloat16()
    method.setup(mllm, stream)
    method.on_task_start(stream.tasks[0])
    for path, layer in mllm.expert_layers.items():
        weight = layer.weight.detach().double()
        wanted = directions(weight, weight.new_zeros(weight.shape[1], 0), 0.9)
        assert method.bases[path].dtype == torch.float32 and method.bases[path].shape == wanted.shape
        torch.testing.assert_close(
            method.bases[path].double() @ method.bases[path].double().T, wanted @ wanted.T, rtol=0, atol=1e-5
        )


def test_all_energy_is_at_most_the_whole_space(stream):
    """Float32, and nothing but rounding left to append: the bases stay orthonormal."""
    _, method = learned("keep_lora", stream, rank=2, weight_energy=1.0, gradient_energy=1.0)
    for name, basis in method.bases.items():
        assert basis.dtype == torch.float32 and basis.shape[1] <= len(basis) and len(method.sizes[name]) == 4
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=2e-6)


def test_wrong_options_are_refused():
    for option in ("weight_energy", "gradient_energy", "gradient_share"):
        for value in (0.0, 1.5):
            with pytest.raises(ValueError, match=rf"{option} must be in \(0, 1\], got {value}"):
                methods.create("keep_lora", **{option: value})


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "keep_lora", {"rank": 2})
