"""GPM: bases against an SVD of the inputs, a step against the paper's projection, what old inputs see."""

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
from .stepping import fill, our_step, plain_loss, plain_step, prepared, trainable

#: all 24 samples of a task, so that a test need not know which are taken
OPTIONS = {"rank": 3, "alpha": 6.0, "threshold": 0.9, "threshold_step": 0.02, "basis_samples": 30}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.fixture(scope="module")
def uneven(stream):
    """Questions of unequal length, so that a batch is padded."""

    def longer(task):
        train = [replace(one, question=one.question + " then" * (at % 3)) for at, one in enumerate(task.train)]
        return replace(task, train=train)

    return replace(stream, tasks=tuple(longer(task) for task in stream.tasks))


def inputs(mllm, task) -> dict[str, torch.Tensor]:
    """What each layer reads for the training samples of a task, one after the other and without padding, `[n, K]`."""
    plain, found = copy.deepcopy(mllm).eval(), {path: [] for path in mllm.expert_layers}
    make_plain(plain, [True], equal)
    for path, rows in found.items():
        layer = plain.model.get_submodule(path)
        layer.register_forward_pre_hook(lambda _layer, args, rows=rows: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for sample in task.train:
            plain_loss(plain, [sample])
    return {path: torch.cat(rows) for path, rows in found.items()}


def papers_basis(x_nK: torch.Tensor, old_Kk: torch.Tensor, share: float) -> torch.Tensor:
    """The paper's: SVD of what the old directions leave of R = x^T; add until the norm reaches the share."""
    all_Kn = x_nK.T
    rest_Kn = all_Kn - old_Kk @ old_Kk.T @ all_Kn
    left, values, _ = torch.linalg.svd(rest_Kn, full_matrices=False)
    kept = (old_Kk.T @ all_Kn).square().sum()
    count = 0
    while kept < share * all_Kn.square().sum():
        kept = kept + values[count].square()
        count += 1
    return torch.cat((old_Kk, left[:, :count]), 1)


def test_bases_are_the_papers(uneven):
    """Tasks 0 and 1: the same subspace for every layer, orthonormal, the old columns first."""
    mllm, method = prepared("gpm", OPTIONS, uneven, 0)
    first = inputs(mllm, uneven.tasks[0])
    method.on_task_end(uneven.tasks[0])
    wanted = {path: papers_basis(x, x.new_zeros(x.shape[1], 0), 0.9) for path, x in first.items()}
    old = {path: method.bases[method.leaders[path]] for path in first}
    method.on_task_start(uneven.tasks[1])
    fill(mllm, torch.Generator().manual_seed(4))
    second = inputs(mllm, uneven.tasks[1])
    method.on_task_end(uneven.tasks[1])
    for path, x in second.items():
        assert old[path].shape == wanted[path].shape
        torch.testing.assert_close(old[path] @ old[path].T, wanted[path] @ wanted[path].T, rtol=0, atol=1e-7)
        both, basis = papers_basis(x, wanted[path], 0.92), method.bases[method.leaders[path]]
        assert basis.shape == both.shape and torch.equal(basis[:, : old[path].shape[1]], old[path])
        torch.testing.assert_close(basis @ basis.T, both @ both.T, rtol=0, atol=1e-7)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)
    assert all(0 < old[path].shape[1] < len(old[path]) for path in old)
    assert any(method.bases[name].shape[1] > method.sizes[name][1] for name in method.bases)


def test_layers_that_read_the_same_share_a_basis(stream):
    _, method = prepared("gpm", OPTIONS, stream, 1)
    assert {path.rpartition(".")[2]: name.rpartition(".")[2] for path, name in method.leaders.items()} == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
        "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
    }  # fmt: skip
    assert len(method.bases) == 2 * 4 and set(method.bases) == set(method.leaders.values())
    assert all(path.rpartition(".")[0][:-4] == name.rpartition(".")[0][:-4] for path, name in method.leaders.items())


def test_one_step_of_the_second_task_is_the_papers(stream):
    mllm, method = prepared("gpm", OPTIONS, stream, 1)
    bases = {path: method.bases[method.leaders[path]] for path in mllm.expert_layers}
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[1].train[:5])
    theirs = {path: plain.model.get_submodule(path).a[0] for path in bases}
    free = {path: torch.eye(len(basis)).double() - basis @ basis.T for path, basis in bases.items()}
    whole = {}

    def project(_params):
        for path, a in theirs.items():
            whole[path] = a.grad.clone()
            a.grad.copy_(a.grad @ free[path])

    wanted = plain_step(plain, plain_loss(plain, samples), project)
    torch.testing.assert_close(our_step(mllm, method, samples), wanted, rtol=1e-9, atol=1e-9)
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_a.grad, other.a[0].grad, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(layer.lora_a, theirs[path] @ free[path], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.lora_b.grad, other.b[0].grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(layer.lora_b, other.b[0], rtol=1e-7, atol=1e-9)
        # the projection is not nothing
        assert (whole[path] - layer.lora_a.grad).norm() > 0.05 * whole[path].norm()


def test_what_was_kept_sees_no_update(stream):
    """After steps of Adam with weight decay, every direction of M passes the merged weight as it passed the old one."""
    mllm, method = prepared("gpm", OPTIONS, stream, 0)
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    old = {path: layer.weight.detach().clone() for path, layer in mllm.expert_layers.items()}
    for start in (0, 6, 12):
        our_step(mllm, method, stream.tasks[1].train[start : start + 6])
        mllm.model.zero_grad(set_to_none=True)
    method.on_task_end(stream.tasks[1])
    method.on_task_start(stream.tasks[2])
    for path, layer in mllm.expert_layers.items():
        basis = method.before(method.leaders[path], 1)
        assert (layer.weight - old[path]).abs().max() > 1e-4
        torch.testing.assert_close(layer.weight @ basis, old[path] @ basis, rtol=0, atol=1e-12)
        basis = method.before(method.leaders[path], 2)
        assert float((layer.lora_a @ basis).detach().abs().max()) < 1e-12


def test_old_answers_move_less_than_without_it(stream):
    def moved(name, options):
        mllm, method = prepared(name, {"rank": 3, "train_projector": False, **options}, stream, 0)
        mllm.eval()
        batch = mllm.collate(stream.tasks[0].train[:8], with_answers=True)
        with torch.no_grad():
            before = mllm.answer_logits(batch)
        method.on_task_end(stream.tasks[0])
        method.on_task_start(stream.tasks[1])
        for _ in range(4):
            our_step(mllm, method, stream.tasks[1].train[:6])
            mllm.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            return (mllm.eval().answer_logits(batch) - before).norm()

    assert moved("gpm", {"threshold": 0.998}) < 0.25 * moved("lora_merged", {})


def test_the_projector_trains_in_the_first_task_only(stream):
    for place in (0, 1):
        mllm, _ = prepared("gpm", OPTIONS, stream, place)
        trains = [name.startswith(mllm.projector_path) for name in trainable(mllm)]
        assert any(trains) == (place == 0) and not all(trains)
    mllm, _ = prepared("gpm", {**OPTIONS, "train_projector": False}, stream, 0)
    assert not any(name.startswith(mllm.projector_path) for name in trainable(mllm))


def test_a_task_that_ends_twice_keeps_the_same(stream):
    mllm, method = prepared("gpm", {**OPTIONS, "basis_samples": 5}, stream, 1)
    mllm.train()
    method.on_task_end(stream.tasks[1])
    assert all(layer.training and not layer._forward_pre_hooks for layer in mllm.expert_layers.values())
    once = {name: basis.clone() for name, basis in method.bases.items()}
    sizes = copy.deepcopy(method.sizes)
    method.on_task_end(stream.tasks[1])
    assert method.sizes == sizes and all(len(counts) == 3 for counts in sizes.values())
    assert all(torch.equal(basis, once[name]) for name, basis in method.bases.items())


def test_covariances_are_float32_under_autocast(stream):
    mllm, method = make_composed(), methods.create("gpm")
    method.setup(mllm, stream)
    method.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    assert {gram.dtype for gram in method._grams(stream.tasks[0]).values()} == {torch.float32}


def test_all_energy_is_at_most_the_whole_space(stream):
    """Float32, and nothing but rounding left to append: the bases stay orthonormal."""
    _, method = learned("gpm", stream, threshold=1.0)
    for name, basis in method.bases.items():
        assert basis.dtype == torch.float32 and basis.shape[1] <= len(basis) and len(method.sizes[name]) == 4
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=2e-6)


def test_wrong_options_are_refused():
    for options, match in (
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\] .*, got 0.0 and 0.003"),
        ({"threshold_step": -0.1}, "threshold_step at least 0, got 0.97 and -0.1"),
        ({"basis_samples": 0}, "basis_samples must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.create("gpm", **options)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "gpm", {"rank": 2, "basis_samples": 6})
