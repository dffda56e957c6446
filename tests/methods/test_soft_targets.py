"""Soft targets: the closed form against the written-out target, and the public code's average."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl_kernels import soft_target_cross_entropy

from ..training.made_up_run import make_stream
from .plain import equal, make_plain
from .stepping import our_step, plain_step, prepared, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def written_out(plain, samples, alpha: float, legacy: bool) -> torch.Tensor:
    """The target of every position of the shifted batch, zero where there is no answer, as a matrix."""
    batch = plain.collate(samples, with_answers=True)
    z = plain.head(plain.hidden_states(batch))[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    q = torch.full_like(z, alpha / (z.shape[1] - 1))
    q.scatter_(1, labels.clamp(min=0)[:, None], 1.0 - alpha)
    q[labels < 0] = 0.0
    terms = -(q * z.log_softmax(1)).sum(1)
    return terms.mean() if legacy else terms.sum() / (labels >= 0).sum()


@pytest.mark.parametrize("name", ["soft_targets", "msgm"])
@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_the_papers(name, legacy, stream):
    options = {"rank": 3, "alpha": 6.0, "soft_alpha": 0.2, "legacy": legacy}
    mllm, method = prepared(name, options, stream, 1)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[1].train[:5])
    theirs = plain_step(plain, written_out(plain, samples, 0.2, legacy))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)


def test_without_softness_it_is_cross_entropy_and_the_least_loss_is_at_the_target():
    hidden, head = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, 8, 3, 3, 1])
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(soft_target_cross_entropy(hidden, head, labels, alpha=0.0), plain)
    q = torch.full((5, 9), 0.1 / 8, dtype=torch.float64).scatter_(1, labels[:, None], 0.9)
    z = q.log().requires_grad_()
    loss = soft_target_cross_entropy(z, torch.eye(9, dtype=torch.float64), labels, alpha=0.1)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.abs().max() < 1e-12
    torch.testing.assert_close(loss.detach(), -(q * q.log()).sum(1).mean())


def test_the_softness_is_a_share():
    for alpha in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"soft_alpha must be in \[0, 1\)"):
            methods.create("soft_targets", soft_alpha=alpha)


def test_a_head_with_a_bias_is_refused(stream):
    mllm, method = prepared("soft_targets", {}, stream, 0)
    mllm.head.bias = torch.nn.Parameter(torch.zeros(mllm.head.out_features))
    with pytest.raises(ValueError, match="has a bias"):
        method.answer_loss(mllm.collate(list(stream.tasks[0].train[:2]), with_answers=True))
