"""LLaCA: steps with a dynamic average against the formula, likeness of instructions, sets that stay, cuts."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .boundaries import items, learned, stored
from .mixing import survives_cuts
from .plain import make_plain, one
from .stepping import our_step, plain_loss, plain_step, prepared, trainable

#: of tasks of which the last is like the first
QUESTIONS = (
    ("how many cats are there", "how many dogs are on the sofa", "how many cats are there"),
    ("what colour is the cat", "?!", "which colour is the sofa, what colour"),
    ("are there many cats", "how many cats are there", "how many a day is it"),
)
OPTIONS = {"rank": 2, "alpha": 4.0, "reuse_above": 0.2, "base_weight": 0.3}


@pytest.fixture(scope="module")
def stream():
    """The made-up stream, its questions in turn those of the task."""
    found = make_stream()

    def asked(samples, texts):
        pairs = enumerate(samples)
        return [dataclasses.replace(sample, question=texts[place % len(texts)]) for place, sample in pairs]

    tasks = [
        dataclasses.replace(task, train=asked(task.train, texts), test=asked(task.test, texts))
        for task, texts in zip(found.tasks, QUESTIONS, strict=True)
    ]
    return dataclasses.replace(found, tasks=tuple(tasks))


def in_third_task(stream, **options):
    """Float64, in the third task, which trains the first of two sets; projector copies differ."""
    mllm, method = prepared("llaca", {**OPTIONS, **options}, stream, 2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in mllm.projector_layers.values():
            layer.expert_weight.add_(0.05 * torch.randn(layer.expert_weight.shape, generator=generator))
    # once more, from what the parameters are now
    method.on_task_start(stream.tasks[2])
    return mllm, method


def of_set(mllm, values: dict, which: int) -> list[torch.Tensor]:
    """The parts of a set: A and B of each layer, weight and bias of each projector copy."""
    rows = mllm.experts.rows(which)
    found = []
    for path in mllm.expert_layers:
        found += [values[f"{path}.lora_a"][rows], values[f"{path}.lora_b"][:, rows]]
    for path in mllm.projector_layers:
        found += [values[f"{path}.expert_weight"][which], values[f"{path}.expert_bias"][which]]
    return [value.detach() for value in found]


def plain_parts(mllm, plain, which: int) -> list[torch.nn.Parameter]:
    layers = [plain.model.get_submodule(path) for path in mllm.expert_layers]
    copies = [plain.model.get_submodule(path) for path in mllm.projector_layers]
    lora = [part for layer in layers for part in (layer.a[which], layer.b[which])]
    return lora + [part for layer in copies for part in (layer.weight, layer.bias)]


@pytest.mark.parametrize("legacy", [False, True])
def test_steps_and_averages_are_the_formulas(legacy, stream):
    """beta (1 + |g|) / (|d| |g - g_before|) is the old average's weight; twice that the parameter's with legacy."""
    mllm, method = in_third_task(stream, legacy=legacy)
    base = 0.01 if legacy else 0.3
    assert method.owners == [0, 1, 0] and mllm.experts.num_experts == 2
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True, False], one(0), 0)
    params = plain_parts(mllm, plain, 0)
    averages = [param.detach().clone() for param in params]
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    previous, weights = None, []
    for step in range(4):
        samples = list(stream.tasks[2].train[3 * step : 3 * step + 5])
        loss = plain_step(plain, plain_loss(plain, samples), lr=0.03)
        ours = our_step(mllm, method, samples, lr=0.03)
        torch.testing.assert_close(ours, loss, rtol=1e-9, atol=1e-9)
        grads = [param.grad.clone() for param in params]
        with torch.no_grad():
            for place, (average, param, grad) in enumerate(zip(averages, params, grads, strict=True)):
                weight = base
                if previous is not None:
                    moved = (param - average).abs().sum() * (grad - previous[place]).abs().sum()
                    found = float((1 + grad.abs().sum()) / moved) * (2 if legacy else 1)
                    weight = (found if legacy else 1 - found) if 0 < found < 1 else base
                    weights.append(weight)
                average.copy_((1 - weight) * average + weight * param)
        previous = grads
        for kind, theirs in (("grad", grads), ("average", averages), ("value", params)):
            held = {name: value.grad for name, value in trainable(mllm).items()} if kind == "grad" else None
            found = {"grad": held, "average": method.averages, "value": trainable(mllm)}[kind]
            for one_of_ours, other in zip(of_set(mllm, found, 0), theirs, strict=True):
                torch.testing.assert_close(one_of_ours, other.detach(), rtol=1e-7, atol=1e-10)
        plain.model.zero_grad()
        mllm.model.zero_grad(set_to_none=True)
    # the rule and its base both have a part
    assert 0 < sum(weight == base for weight in weights) / len(weights) < 0.9
    method.on_task_end(stream.tasks[2])
    after = dict(mllm.model.named_parameters())
    for value, average in zip(of_set(mllm, after, 0), averages, strict=True):
        torch.testing.assert_close(value, average, rtol=1e-7, atol=1e-10)
    for old, new in zip(of_set(mllm, before, 1), of_set(mllm, after, 1), strict=True):
        assert torch.equal(old, new)


def test_the_first_step_of_a_task_has_the_base_weight(stream):
    mllm, method = in_third_task(stream, base_weight=0.25)
    before = [value.clone() for value in of_set(mllm, trainable(mllm), 0)]
    our_step(mllm, method, stream.tasks[2].train[:4])
    grads = {name: value.grad.clone() for name, value in trainable(mllm).items()}
    now, averages = of_set(mllm, trainable(mllm), 0), of_set(mllm, method.averages, 0)
    for old, new, average in zip(before, now, averages, strict=True):
        torch.testing.assert_close(average, old + 0.25 * (new - old), rtol=1e-12, atol=1e-14)
        assert not torch.equal(old, new)
    assert all(torch.equal(method.previous[name], grad) for name, grad in grads.items())


def test_other_sets_count_nowhere(stream):
    """Whatever gradients and moves stand in their rows, averages are the same, and theirs do not move."""
    results = []
    for scale in (0.0, 1.0):
        mllm, method = in_third_task(stream)
        generator = torch.Generator().manual_seed(2)
        start = {name: value.clone() for name, value in method.averages.items()}
        own = {name: mask.expand(start[name].shape) for name, mask in method.parameter_masks().items()}
        for _ in range(2):
            with torch.no_grad():
                for name, value in trainable(mllm).items():
                    noise, move = torch.randn(2, *value.shape, generator=generator, dtype=value.dtype)
                    value.grad = torch.where(own[name], noise, scale * noise)
                    value.add_(torch.where(own[name], move, scale * move))
            method.after_step(None)
        assert all(
            torch.equal(old, new)
            for old, new in zip(of_set(mllm, start, 1), of_set(mllm, method.averages, 1), strict=True)
        )
        results.append(of_set(mllm, method.averages, 0))
    for one_run, other in zip(*results, strict=True):
        torch.testing.assert_close(one_run, other, rtol=1e-12, atol=1e-12)


def test_only_a_set_that_knows_a_task_has_averages(stream):
    mllm, method = prepared("llaca", OPTIONS, stream, 1)
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    our_step(mllm, method, stream.tasks[1].train[:4])
    assert method.acting == 1 and method.state_tensors() == {}
    moved = of_set(mllm, trainable(mllm), 1)
    method.on_task_end(stream.tasks[1])
    assert all(torch.equal(value, kept) for value, kept in zip(of_set(mllm, trainable(mllm), 1), moved, strict=True))
    for old, new in zip(of_set(mllm, before, 0), of_set(mllm, trainable(mllm), 0), strict=True):
        assert torch.equal(old, new)
    mllm, method = in_third_task(stream)
    names = set(trainable(mllm))
    assert set(method.state_tensors()) == {f"average/{name}" for name in names}
    our_step(mllm, method, stream.tasks[2].train[:4])
    kinds = ("average", "previous")
    assert set(method.state_tensors()) == {f"{kind}/{name}" for kind in kinds for name in names}
    method.on_task_end(stream.tasks[2])
    kept = {name: value.detach().clone() for name, value in trainable(mllm).items()}
    method.on_task_end(stream.tasks[2])
    assert method.state_tensors() == {} and all(
        torch.equal(kept[name], value) for name, value in trainable(mllm).items()
    )
    assert method.state_values() == {
        "known": 3,
        "owners": [0, 1, 0],
        "questions": [list(dict.fromkeys(texts)) for texts in QUESTIONS],
    }


def words(text: str) -> list[str]:
    return text.lower().replace("?", "").replace("!", "").replace(",", "").split()


def vectors(texts: list[str], documents: list[str]) -> list[dict]:
    """TF-IDF with dictionaries: smooth idf over the documents, unit length."""
    found = []
    for text in texts:
        counts = {word: words(text).count(word) for word in words(text)}
        for word in counts:
            holding = sum(word in words(document) for document in documents)
            counts[word] *= math.log((1 + len(documents)) / (1 + holding)) + 1
        size = math.sqrt(sum(value**2 for value in counts.values())) or 1.0
        found.append({word: value / size for word, value in counts.items()})
    return found


def mean_cosine(ones: list[str], others: list[str], documents: list[str]) -> float:
    cosines = [
        sum(value * other.get(word, 0.0) for word, value in one.items())
        for one in vectors(ones, documents)
        for other in vectors(others, documents)
    ]
    return sum(cosines) / len(cosines)


def unique(*groups) -> list[str]:
    return list(dict.fromkeys(text for texts in groups for text in texts))


def owners(stream, reuse_above: float) -> list[int]:
    mllm, method = learned("llaca", stream, reuse_above=reuse_above, rank=1)
    assert mllm.experts.num_experts == max(method.owners) + 1
    return method.owners


def test_a_task_trains_the_set_with_like_instructions(stream):
    """Thresholds about the likenesses, which are written out over all pairs."""
    first, second, third = (unique(texts) for texts in QUESTIONS)
    every = unique(*QUESTIONS)
    second_to_first = mean_cosine(second, first, unique(first, second))
    to_first, to_second = (mean_cosine(third, texts, every) for texts in (first, second))
    assert 0 < to_second < second_to_first < to_first < 1
    assert owners(stream, to_first * (1 + 1e-9)) == [0, 1, 2]
    assert owners(stream, to_first * (1 - 1e-9)) == [0, 1, 0]
    assert owners(stream, second_to_first * (1 + 1e-9)) == [0, 1, 0]
    assert owners(stream, second_to_first * (1 - 1e-9))[1] == 0


def test_of_two_sets_the_nearer_one_is_trained(stream):
    tasks = [stream.tasks[place] for place in (1, 0, 2)]
    assert owners(dataclasses.replace(stream, tasks=tuple(tasks)), 0.2) == [0, 1, 1]


def test_a_codebook_holds_the_instructions_of_all_tasks_of_the_set(stream):
    mllm, method = learned("llaca", stream, tasks=2, reuse_above=0.0, rank=1)
    likeness = mean_cosine(unique(QUESTIONS[2]), unique(*QUESTIONS[:2]), unique(*QUESTIONS))
    for factor, owner in ((1 - 1e-9, 0), (1 + 1e-9, 1)):
        method.reuse_above = likeness * factor
        method.on_task_start(stream.tasks[2])
        assert method.owners == [0, 0, owner] and mllm.experts.num_experts == owner + 1


def test_a_sample_has_the_set_whose_instructions_are_nearest(stream):
    mllm, method = learned("llaca", stream, **OPTIONS)
    asked = ["How many?", "the colour of the cat", "Which", "sofa sofa cat", "zebra how zebra", "Are the dogs there"]
    samples = [dataclasses.replace(stream.tasks[0].test[0], question=text) for text in asked]
    books, every = [unique(QUESTIONS[0], QUESTIONS[2]), unique(QUESTIONS[1])], unique(*QUESTIONS)
    scores = [[mean_cosine([text], book, every) for book in books] for text in asked]
    assert min(abs(one - other) for one, other in scores) > 1e-6
    expected = [int(second > first) for first, second in scores]
    ids = mllm.router(samples)
    assert ids.tolist() == expected and set(expected) == {0, 1} and ids.dtype == torch.int64
    assert [method.route([sample]).item() for sample in samples] == expected
    assert [method.task_of(expert) for expert in (0, 1, 2, -1)] == [0, 1, -1, -1]
    assert methods.create("llaca").route(samples).tolist() == [-1] * len(samples)


def test_what_a_task_added_counts_once_it_has_ended(stream):
    """Words of the task at hand say nothing before its end; what was asked before hides nothing after it."""
    _, method = learned("llaca", stream, tasks=1, **OPTIONS)
    early, samples = method.state_values(), items(stream)
    method.on_task_start(stream.tasks[1])
    assert method.route(samples).tolist() == [0] * len(samples)
    method.on_task_end(stream.tasks[1])
    assert set(method.route(samples).tolist()) == {0, 1}
    method.load_state({}, early)
    assert method.route(samples).tolist() == [0] * len(samples)


def test_state_in_the_middle_of_a_task_goes_on_bit_for_bit(stream):
    """Another model in the same place takes the state over, its hook having run anew, and makes the same step."""
    mllm, method = in_third_task(stream)
    our_step(mllm, method, stream.tasks[2].train[:4])
    mllm.model.zero_grad(set_to_none=True)
    held = stored(mllm, method)
    other, fresh = prepared("llaca", OPTIONS, stream, 0)
    other.grow_experts(1)
    parameters = dict(other.model.named_parameters())
    with torch.no_grad():
        for name, value in held["model"].items():
            parameters[name].copy_(value)
    fresh.load_state(held["method"], held["values"])
    fresh.on_task_start(stream.tasks[2])
    fresh.load_state(held["method"], held["values"])
    for one_model, its in ((mllm, method), (other, fresh)):
        our_step(one_model, its, stream.tasks[2].train[4:9])
        its.on_task_end(stream.tasks[2])
    theirs = trainable(other)
    assert all(torch.equal(value, theirs[name]) for name, value in trainable(mllm).items())
    assert its.state_values() == method.state_values()


def test_a_projector_that_does_not_train_is_shared(stream):
    mllm, method = learned("llaca", stream, train_projector=False, **OPTIONS)
    assert not mllm.projector_layers and method.owners == [0, 1, 0]


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"reuse_above must be in \[0, 1\], got 2"):
        methods.create("llaca", reuse_above=2)
    with pytest.raises(ValueError, match=r"base_weight must be in \(0, 1\), got 0"):
        methods.create("llaca", base_weight=0)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    cuts = (("_step", 10), ("write_adapters", 1), ("predict", 1), ("_step", 5))
    survives_cuts(tmp_path, "llaca", {"rank": 2, "reuse_above": 0.0}, cuts=cuts)
