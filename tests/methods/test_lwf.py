"""LwF: the old model's answers to the new samples, taken once, and the loss on them."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .mixing import survives_cuts
from .plain import equal, make_plain
from .stepping import fill, our_step, plain_loss, plain_step, prepared, same_lora

OPTIONS = {"rank": 3, "alpha": 6.0, "distil": 0.6, "temperature": 3.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


@pytest.mark.parametrize("top_k", [5, None])
def test_one_step_is_the_papers(top_k, stream):
    """With every logit kept it is the full divergence; with few, the others are one event."""
    mllm, method = prepared("lwf", OPTIONS, stream, 0)
    vocabulary = mllm.head.weight.shape[0]
    method.top_k = top_k or vocabulary - 1
    teacher = copy.deepcopy(mllm).eval()
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    fill(mllm, torch.Generator().manual_seed(4))
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[1].train[4:9])
    terms = []
    # in the same passes, for norms of the tower are float32 and others would round otherwise
    with torch.no_grad():
        batch = teacher.collate(stream.tasks[1].train, with_answers=True)
        old_rows = teacher.answer_logits(batch)[batch.answer_positions // batch.input_ids.shape[1] < 9]
    batch = plain.collate(samples, with_answers=True)
    rows = plain.answer_logits(batch)
    for old, new in zip(old_rows[-len(rows) :], rows, strict=True):
        p, q = torch.softmax(old / 3.0, 0), torch.softmax(new / 3.0, 0)
        if top_k:
            best = old.argsort(descending=True)[:top_k]
            p, q = p[best], q[best]
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        terms.append(3.0**2 * (p * (p / q).log()).sum())
    loss = torch.nn.functional.cross_entropy(rows, batch.answer_labels) + 0.6 * torch.stack(terms).mean()
    torch.testing.assert_close(our_step(mllm, method, samples), plain_step(plain, loss), rtol=1e-9, atol=1e-10)
    same_lora(mllm, plain, 1e-7)


def test_the_first_task_is_plain(stream):
    mllm, method = prepared("lwf", OPTIONS, stream, 0)
    samples = list(stream.tasks[0].train[:5])
    expected = plain_loss(mllm.eval(), samples).detach()
    assert method.teacher == () and torch.equal(our_step(mllm, method, samples), expected)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="distil must not be negative, got -1"):
        methods.create("lwf", distil=-1.0)
    with pytest.raises(ValueError, match=r"top_k must be at least 1 and temperature > 0, got 0 and 2\.0"):
        methods.create("lwf", top_k=0)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "lwf", {"rank": 2, "top_k": 8})
