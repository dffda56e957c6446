"""MulKI: two teachers weighed sample by sample, prototypes of all tasks."""

from __future__ import annotations

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.routers import cluster

from ..training.made_up_run import make_stream
from .mixing import survives_cuts
from .pairs import in_second_task, rows_of, same_step
from .soft import cosine
from .stepping import our_step, plain_loss, prepared

OPTIONS = {"rank": 3, "alpha": 6.0, "distil": 1.7, "align": 0.3, "tau": 0.2, "prototypes": 2}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def seen(model, centres, samples):
    """Of each sample alone: softmax of its likeness `[P]` and its mean answer loss."""
    found = []
    for batch, _, hidden in rows_of(model, samples):
        prompt = hidden[: int((batch.labels[0] < 0).sum())]
        feature = prompt.sum(0) / len(prompt)
        likeness = torch.stack([cosine(feature, centre) for centre in centres])
        terms = [
            -torch.log_softmax(model.head(hidden[place]), 0)[label]
            for place, label in zip(batch.answer_positions, batch.answer_labels, strict=True)
        ]
        found.append((torch.softmax(likeness / 0.2, 0), sum(terms) / len(terms)))
    return found


def test_one_step_is_the_formula(stream):
    mllm, method, plain, previous, base = in_second_task("mulki", OPTIONS, stream)
    samples = [*stream.tasks[1].train[:3], *stream.tasks[0].train[:3]]
    with torch.no_grad():
        teachers = [seen(base, method.centres, samples), seen(previous, method.centres, samples)]
    divergence, own = [], []
    weights = []
    for place, (q, _) in enumerate(seen(plain, method.centres, samples)):
        ease = [torch.exp(-teacher[place][1]) for teacher in teachers]
        weights.append(float(ease[0] / sum(ease)))
        for teacher, one in zip(teachers, ease, strict=True):
            p = teacher[place][0]
            divergence.append(one / sum(ease) * (p * (p / q).log()).sum())
        own.append(sum(q[at] for at in range(len(q)) if method.owners[at] == 1).log())
    assert max(weights) - min(weights) > 0.01
    loss = plain_loss(plain, samples) + (1.7 * sum(divergence) - 0.3 * sum(own)) / len(samples)
    same_step(mllm, method, samples, plain, loss)


def test_the_base_alone_teaches_in_the_first_task(stream):
    mllm, method = prepared("mulki", {**OPTIONS, "align": 0.0}, stream, 0)
    samples = list(stream.tasks[0].train[:4])
    loss = plain_loss(mllm.eval(), samples).detach()
    with torch.no_grad():
        p = [row for row, _ in _base_seen(mllm, method, samples)]
        q = [row for row, _ in seen(mllm, method.centres, samples)]
    divergence = sum((one * (one / other).log()).sum() for one, other in zip(p, q, strict=True)) / len(samples)
    torch.testing.assert_close(our_step(mllm, method, samples), loss + 1.7 * divergence, rtol=1e-8, atol=1e-10)


def _base_seen(mllm, method, samples):
    with mllm.base_model_only():
        return seen(mllm, method.centres, samples)


def test_prototypes_are_centres_of_prompts_by_the_model_at_hand(stream):
    mllm, method = prepared("mulki", OPTIONS, stream, 0)
    method.on_task_end(stream.tasks[0])
    features = []
    with torch.no_grad():
        for batch, _, hidden in rows_of(mllm.eval(), stream.tasks[1].train):
            mean = hidden[: int((batch.labels[0] < 0).sum())].mean(0)
            features.append(mean / mean.norm())
    first = method.centres.clone()
    method.on_task_start(stream.tasks[1])
    method.on_task_start(stream.tasks[1])
    assert method.owners.tolist() == [0, 0, 1, 1] and torch.equal(method.centres[:2], first)
    torch.testing.assert_close(method.centres[2:], cluster(torch.stack(features), 2), rtol=1e-6, atol=1e-8)


def test_wrong_options_are_refused():
    for options, match in (
        ({"distil": -1.0}, "distil must not be negative, got -1.0"),
        ({"align": -1.0}, "align must not be negative, got -1.0"),
        ({"tau": 0.0}, "tau must be > 0 and prototypes at least 1, got 0.0 and 4"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.create("mulki", **options)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "mulki", {"rank": 2, "prototypes": 2})
