"""ER: the two-batch loss, the per-task buffer and the reservoir."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F

from mllmcl import methods

from ..training.made_up_run import make_stream
from .plain import equal, make_plain
from .stepping import our_step, plain_step, prepared, recorded_draws, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=60)


def cross_entropy(plain, samples) -> torch.Tensor:
    batch = plain.collate(samples, with_answers=True)
    return F.cross_entropy(plain.answer_logits(batch), batch.answer_labels)


@pytest.mark.parametrize("buffer_batch", [None, 3])
def test_one_step_is_the_papers(buffer_batch, stream):
    """L = CE(new) + beta CE(buffer) on the very draw, then AdamW."""
    options = {"rank": 3, "alpha": 6.0, "beta": 0.7, "per_task": 6, "buffer_batch": buffer_batch}
    mllm, method = prepared("er", options, stream, 1)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[1].train[:5])
    with recorded_draws(method) as draws:
        ours = our_step(mllm, method, samples)
    (drawn,) = draws
    assert len({sample.id for sample in drawn}) == (buffer_batch or 5)
    assert {sample.id for sample in drawn} <= set(method.buffer["t0"])
    theirs = plain_step(plain, cross_entropy(plain, samples) + 0.7 * cross_entropy(plain, drawn))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)


def test_the_first_task_is_plain(stream):
    mllm, method = prepared("er", {}, stream, 0)
    batch = mllm.collate(list(stream.tasks[0].train[:3]), with_answers=True)
    loss = mllm.loss(batch)
    assert method.loss(batch, loss) is loss


def test_every_stored_sample_is_drawn(stream):
    _, method = prepared("er", {"per_task": 4}, stream, 2)
    seen = collections.Counter(sample.id for _ in range(60) for sample in method.draw(2)[0])
    assert set(seen) == {*method.buffer["t0"], *method.buffer["t1"]}
    assert len(method.draw(50)[0]) == 8


def test_the_reservoir_is_a_uniform_draw_of_constant_size(stream):
    """Over many seeds each of three tasks holds a third of it, whatever its place in the stream."""
    shares = collections.Counter()
    for seed in range(40):
        method = methods.create("er", capacity=12, seed=seed)
        method.stream = stream
        for count, task in enumerate(stream.tasks, 1):
            method.on_task_end(task)
            kept = copy.deepcopy(method.buffer)
            assert sum(map(len, kept.values())) == 12 and len(kept) == count
            method.on_task_end(task)
            assert method.buffer == kept
        shares.update({name: len(ids) for name, ids in method.buffer.items()})
        assert len(method.draw(100)[0]) == 12
    assert sum(shares.values()) == 480 and all(125 < share < 195 for share in shares.values())


@pytest.mark.parametrize("option", ["per_task", "capacity", "buffer_batch"])
def test_sizes_are_at_least_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        methods.create("er", **{option: 0})
