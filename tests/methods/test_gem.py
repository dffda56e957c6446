"""GEM: the quadratic programme against every choice of active constraints, and one step written out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mllmcl.methods.gem import gem_gradient, nonnegative_quadratic

from ..training.made_up_run import make_stream
from .plain import equal, make_plain
from .stepping import fill, our_step, plain_loss, plain_step, prepared, recorded_draws, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def best_of_all(matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """argmin_{v >= 0} 1/2 v^T matrix v + linear^T v by trying every set of free entries."""
    best, least = torch.zeros_like(linear), 0.0
    for chosen in itertools.product([False, True], repeat=len(linear)):
        free = torch.tensor(chosen)
        if not free.any():
            continue
        v = torch.zeros_like(linear)
        v[free] = torch.linalg.solve(matrix[free][:, free], -linear[free])
        value = 0.5 * v @ matrix @ v + linear @ v
        if (v >= 0).all() and value < least:
            best, least = v, value
    return best


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_programme_is_solved(size):
    generator = torch.Generator().manual_seed(size)
    for trial in range(20):
        g = torch.randn(size, size + 2, generator=generator, dtype=torch.float64)
        # rows of very different length, and nearly parallel ones
        g *= 10.0 ** torch.randint(-3, 4, (size, 1), generator=generator)
        if trial % 4 == 0:
            g[-1] = g[0] * 3.0 + 0.01 * g[0].norm() * torch.randn(size + 2, generator=generator)
        linear = g @ torch.randn(size + 2, generator=generator, dtype=torch.float64)
        matrix = g @ g.T
        found, wanted = nonnegative_quadratic(matrix, linear), best_of_all(matrix, linear)
        # what counts is the sum of gradients
        torch.testing.assert_close(found @ g, wanted @ g, rtol=1e-3, atol=1e-3)
        assert (found >= 0).all()


def test_many_tasks_meet_the_conditions_of_the_optimum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g = torch.randn(15, 200, generator=generator, dtype=torch.float64)
        linear = g @ torch.randn(200, generator=generator, dtype=torch.float64)
        v = nonnegative_quadratic(g @ g.T, linear)
        slope = g @ g.T @ v + linear
        assert (v >= 0).all() and slope.min() > -1e-3 and (v * slope).abs().max() < 1e-3 and 0 < (v > 0).sum() < 15


def test_a_gradient_that_harms_no_task_stays():
    g = torch.tensor([1.0, 2.0, 0.5])
    references = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert torch.equal(gem_gradient(g, references, 0.5), g)
    assert torch.equal(gem_gradient(g, torch.zeros(2, 3), 0.5), g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_that_pull_the_same_way_count_as_one(dtype):
    """Gradients that are parallel, or the very same, make the matrix singular."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        row, g = torch.randn(2, 50, generator=generator, dtype=dtype)
        g = g if row @ g < 0 else -g
        wanted = gem_gradient(g, row[None], 0.0)
        for references in (torch.stack([row, row]), torch.stack([row, 3.7 * row, 1e-3 * row])):
            torch.testing.assert_close(gem_gradient(g, references, 0.0), wanted, rtol=1e-4, atol=1e-4)


def test_without_strength_it_is_the_nearest_gradient_that_harms_none():
    """Two old tasks whose half spaces meet in a corner; by hand."""
    g = torch.tensor([-1.0, -1.0, 2.0])
    references = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    torch.testing.assert_close(gem_gradient(g, references, 0.0), torch.tensor([0.0, 0.0, 2.0]))
    # paper: v = (1, 1/2), both raised by a half; public code: v >= 1/2 is met by v = (1, 1/2) already
    torch.testing.assert_close(gem_gradient(g, references, 0.5), torch.tensor([0.5, 1.0, 2.0]))
    found = gem_gradient(g, references, 0.5, legacy=True)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 2.0]), rtol=0, atol=2e-3)
    found = gem_gradient(g, references, 0.8, legacy=True)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6, 2.0]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_the_papers(legacy, stream):
    """The third task: gradients of two old tasks, the programme by trying all sets, then AdamW."""
    options = {"rank": 2, "alpha": 4.0, "buffer_batch": 3, "per_task": 5, "strength": 0.5, "legacy": legacy}
    mllm, method = prepared("gem", options, stream, 2)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[2].train[:5])
    with recorded_draws(method) as draws:
        ours = our_step(mllm, method, samples)
    assert [{sample.task for sample in drawn} for drawn in draws] == [{"t0"}, {"t1"}]
    turned = []

    def change(params) -> None:
        g = torch.cat([param.grad.flatten() for param in params])
        rows = []
        for drawn in draws:
            loss = plain.loss(plain.collate(drawn, with_answers=True))
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)]))
        rows = torch.stack(rows)
        matrix, linear = rows @ rows.T, rows @ g
        if legacy:
            matrix = matrix + 0.001 * torch.eye(2, dtype=matrix.dtype)
            v = best_of_all(matrix, linear + matrix @ torch.full((2,), 0.5, dtype=matrix.dtype)) + 0.5
        else:
            v = best_of_all(matrix, linear) + 0.5
        turned.append(bool((linear < 0).any()))
        g = g + rows.T @ v if turned[0] else g
        for param, part in zip(params, g.split([param.numel() for param in params]), strict=True):
            param.grad.copy_(part.view_as(param))

    theirs = plain_step(plain, plain_loss(plain, samples), change)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert turned == [True]
    same_lora(mllm, plain)


def test_a_parameter_without_gradient_takes_the_old_tasks(stream):
    mllm, method = prepared("gem", {}, stream, 1)
    fill(mllm, torch.Generator().manual_seed(2))
    params = [value for value in mllm.model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(params)
    for param in params[1:]:
        param.grad = torch.randn(param.shape, dtype=param.dtype)
    method.before_step(optimizer)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in params)
