"""Rehearsal: the share that is kept and mixed in; the loss is LoRA's."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .plain import equal, make_plain
from .stepping import our_step, plain_loss, plain_step, prepared, same_lora


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=200)


def test_one_step_on_the_mixture_is_loras(stream):
    mllm, method = prepared("rehearsal", {"rank": 3, "alpha": 6.0, "share": 0.01}, stream, 1)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = method.training_samples(stream.tasks[1])[-5:]
    assert {sample.task for sample in samples} == {"t0", "t1"}
    theirs = plain_step(plain, plain_loss(plain, samples))
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.001, 1), (0.01, 2), (0.1, 20), (0.2, 40), (1.0, 200)])
def test_a_share_of_every_earlier_task_is_mixed_in(share, kept, stream):
    _, method = prepared("rehearsal", {"share": share}, stream, 2)
    assert {name: len(ids) for name, ids in method.buffer.items()} == {"t0": kept, "t1": kept}
    mixed = method.training_samples(stream.tasks[2])
    assert [sample.id for sample in mixed[:200]] == [sample.id for sample in stream.tasks[2].train]
    assert [sample.id for sample in mixed[200:]] == method.buffer["t0"] + method.buffer["t1"]
    assert len({sample.id for sample in mixed}) == 200 + 2 * kept


def test_the_draw_is_the_seeds_and_a_smaller_one_is_part_of_a_larger(stream):
    def kept(share, seed):
        return set(prepared("rehearsal", {"share": share, "seed": seed}, stream, 1)[1].buffer["t0"])

    assert kept(0.1, 0) == kept(0.1, 0) < kept(0.2, 0) and kept(0.1, 0) != kept(0.1, 1)


def test_a_share_is_a_share(stream):
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            methods.create("rehearsal", share=share)


def test_a_stream_that_lost_samples_is_named(stream):
    _, method = prepared("rehearsal", {"share": 0.01}, stream, 1)
    method.buffer["t0"][0] = "gone"
    with pytest.raises(ValueError, match="the stream no longer holds 1 stored samples"):
        method.training_samples(stream.tasks[1])
