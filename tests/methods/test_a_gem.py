"""A-GEM: one step written out, on both sides of the plane."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .plain import equal, make_plain
from .stepping import our_step, plain_loss, plain_step, prepared, recorded_draws, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize("mirrored", [False, True])
def test_one_step_is_the_papers(mirrored, stream, monkeypatch):
    """g - (g r / r r) r where g r < 0, else g; one of the two runs has the loss of the old samples mirrored."""
    mllm, method = prepared("a_gem", {"rank": 2, "alpha": 4.0, "buffer_batch": 3, "per_task": 5}, stream, 2)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[2].train[:5])
    sign = -1.0 if mirrored else 1.0
    original = method._gradient
    monkeypatch.setattr(method, "_gradient", lambda drawn, params: sign * original(drawn, params))
    with recorded_draws(method) as draws:
        ours = our_step(mllm, method, samples)
    (drawn,) = draws
    assert {sample.id for sample in drawn} <= {*method.buffer["t0"], *method.buffer["t1"]} and len(drawn) == 3
    products = []

    def change(params) -> None:
        loss = sign * plain.loss(plain.collate(drawn, with_answers=True))
        g = torch.cat([param.grad.flatten() for param in params])
        r = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)])
        products.append(float(g @ r))
        if products[0] < 0:
            g = g - (g @ r) / (r @ r) * r
            assert abs(float(g @ r)) < 1e-9 * float(r @ r)
        for param, part in zip(params, g.split([param.numel() for param in params]), strict=True):
            param.grad.copy_(part.view_as(param))

    theirs = plain_step(plain, plain_loss(plain, samples), change)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)
    # the product has another sign in each run
    assert (products[0] < 0) == mirrored


def test_a_zero_reference_changes_nothing():
    method = methods.create("a_gem")
    g = torch.randn(5)
    assert torch.equal(method._turned(g, torch.zeros(1, 5)), g)
    assert torch.equal(method._turned(g, g[None]), g)
    assert method._turned(g, -g[None]).abs().max() < 1e-6
