"""DER++: what is stored of the teacher, and the three-batch loss."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.teachers import RowsOfSamples

from ..training.made_up_run import make_run, make_stream
from ..training.test_loop import final_tensors
from .plain import equal, make_plain
from .stepping import fill, our_step, plain_step, prepared, recorded_draws, same_lora

OPTIONS = {"rank": 3, "alpha": 6.0, "per_task": 4, "top_k": 5, "distil": 0.3, "beta": 0.7, "temperature": 2.0}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def logits(mllm, samples) -> torch.Tensor:
    return mllm.answer_logits(mllm.collate(samples, with_answers=True))


def test_one_step_is_the_papers(stream):
    """Teacher logits from the model as it was when the task ended, sample by sample; the divergence written out."""
    mllm, method = prepared("der_pp", OPTIONS, stream, 0)
    teacher = copy.deepcopy(mllm).eval()
    method.on_task_end(stream.tasks[0])
    method.on_task_start(stream.tasks[1])
    fill(mllm, torch.Generator().manual_seed(4))
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[1].train[:5])
    with recorded_draws(method) as draws:
        ours = our_step(mllm, method, samples)
    taught, labelled = draws
    assert len(taught) == len(labelled) == 4
    terms = []
    for sample in taught:
        with torch.no_grad():
            z = logits(teacher, [sample])
        for old, new in zip(z, logits(plain, [sample]), strict=True):
            best = old.argsort(descending=True)[:5]
            p = torch.exp(old[best] / 2.0) / torch.exp(old[best] / 2.0).sum()
            q = torch.softmax(new / 2.0, 0)[best]
            terms.append(2.0**2 * (p * (p / q).log()).sum())
    loss = plain.loss(plain.collate(samples, with_answers=True))
    loss = loss + 0.3 * torch.stack(terms).mean() + 0.7 * plain.loss(plain.collate(labelled, with_answers=True))
    torch.testing.assert_close(ours, plain_step(plain, loss), rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)


@pytest.mark.parametrize("options", [{"per_task": 4}, {"capacity": 6}], ids=str)
def test_stored_are_the_logits_of_the_model_that_had_learned_the_task(options, stream):
    mllm, method = prepared("der_pp", {"top_k": 5, **options}, stream, 0)
    wanted = {}
    for place, task in enumerate(stream.tasks):
        if place:
            method.on_task_start(task)
            fill(mllm, torch.Generator().manual_seed(place))
        for sample in task.train:
            with torch.no_grad():
                wanted[sample.id] = logits(mllm, [sample]).topk(5)
        method.on_task_end(task)
        method.on_task_end(task)
    ids = [sample_id for kept in method.buffer.values() for sample_id in kept]
    values, indices = (part.split(method.lengths.tolist()) for part in (method.values, method.indices))
    assert len(ids) == len(values) == (12 if "per_task" in options else 6)
    for sample_id, value, index in zip(ids, values, indices, strict=True):
        torch.testing.assert_close(value, wanted[sample_id].values, rtol=1e-9, atol=1e-9)
        assert torch.equal(index.long(), wanted[sample_id].indices)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_has_the_precision_of_the_run(bf16, tmp_path):
    make_run(tmp_path, "der_pp", {"per_task": 3}, bf16=bf16, max_steps=1, zero_shot=False, max_new_tokens=2)
    values = final_tensors(tmp_path)["method/values"]
    # what bfloat16 computed fits into it
    assert torch.equal(values.bfloat16().to(values.dtype), values) == bf16


def test_rows_of_a_draw_are_those_of_its_samples(stream):
    _, method = prepared("der_pp", OPTIONS, stream, 2)
    starts = [0, *method.lengths.cumsum(0).tolist()]
    places = torch.tensor([5, 0, 7])
    wanted = [row for place in places.tolist() for row in range(starts[place], starts[place + 1])]
    assert RowsOfSamples(method.lengths).of(places).tolist() == wanted and len(set(method.lengths.tolist())) > 1


def test_options_are_checked():
    with pytest.raises(ValueError, match="top_k must be at least 1 and temperature > 0, got 0"):
        methods.create("der_pp", top_k=0)
