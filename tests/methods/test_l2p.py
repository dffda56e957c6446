"""L2P: a step against the paper's formula, the vote of the public code, wrong options."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mllmcl import methods
from mllmcl.methods.keys import Keys, query, voted

from ..training.made_up_run import make_stream
from .boundaries import items
from .soft import answer_labels, by_hand, cosine, plain_adamw
from .stepping import our_step, prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


@pytest.mark.parametrize("legacy", [False, True])
def test_one_step_is_the_papers(legacy, stream):
    """Nearest keys, their prompts in a row, cross entropy and the pull, AdamW on pool and keys."""
    options = {"length": 2, "pool": 5, "chosen": 2, "pull": 0.3, "legacy": legacy}
    mllm, method = prepared("l2p", options, stream, 1)
    plain = copy.deepcopy(mllm)
    # of all tasks, so that the samples choose differently
    samples = [sample for task in stream.tasks for sample in task.train[:2]]
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    ours = our_step(mllm, method, samples)

    pool, keys = plain.prompts.weight, plain.model.prompt_keys.weight
    queries = query(plain, samples).double()
    likeness = [[cosine(q, key) for key in keys] for q in queries]
    chosen = [sorted(range(5), key=lambda n, row=row: -row[n].item())[:2] for row in likeness]
    assert len({tuple(row) for row in chosen}) > 1, "every sample takes the same prompts, so this shows nothing"
    if legacy:
        votes = [sum(n in row for row in chosen) for n in range(5)]
        chosen = [sorted(range(5), key=lambda n: (-votes[n], n))[:2]] * len(samples)
    logits = [by_hand(plain, s, torch.cat([pool[n] for n in row])) for s, row in zip(samples, chosen, strict=True)]
    pulls = [1 - likeness[place][n] for place, row in enumerate(chosen) for n in row]
    loss = F.cross_entropy(torch.cat(logits), answer_labels(plain, samples)) + 0.3 * sum(pulls) / len(samples)
    plain_adamw(loss, [pool, keys])

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-8, atol=1e-9)
    for one, other in ((mllm.prompts.weight, pool), (method.keys.weight, keys)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    moved = {name for name, value in mllm.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"soft_prompts.weight", "prompt_keys.weight"}


def test_cosines_are_averaged_over_groups():
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 3))
    found = Keys(keys, groups=3)(queries)
    for b in range(3):
        for n in range(4):
            parts = [cosine(queries[b, at : at + 2], keys[n, at : at + 2]) for at in (0, 2, 4)]
            torch.testing.assert_close(found[b, n], sum(parts) / 3)


def test_a_batch_votes_and_a_tie_goes_to_the_lower_id():
    ids = torch.tensor([[4, 1], [2, 4], [1, 3]])
    assert voted(ids, 6).tolist() == [[1, 4]] * 3
    assert voted(torch.tensor([[5], [0]]), 6).tolist() == [[0], [0]]


def test_only_the_vote_depends_on_the_batch(stream):
    samples = items(stream, 2)
    for legacy in (False, True):
        mllm, method = prepared("l2p", {"length": 1, "pool": 8, "chosen": 2, "legacy": legacy}, stream, 0)
        assert method.route(samples) is None
        method.on_task_end(stream.tasks[0])
        together = method.route(samples)
        alone = torch.cat([method.route([sample]) for sample in samples])
        assert (together == together[:1]).all() == legacy and torch.equal(together, alone) != legacy
        # the vote is that of the samples that are decoded together
        answers = mllm.generate(samples, max_new_tokens=2, batch_size=len(samples))
        assert answers == mllm.generate(samples, prompts=together, max_new_tokens=2)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"chosen must be in 1\.\.pool = 3, got 4"):
        methods.create("l2p", pool=3, chosen=4)
    with pytest.raises(ValueError, match="pull must not be negative, got -1"):
        methods.create("l2p", pull=-1)
