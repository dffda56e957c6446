"""Batched answering with a model that can be looked into."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mllmcl.evaluation import check_batching, evaluate


@dataclass(frozen=True)
class Item:
    id: str
    task: str
    question: str
    answer: str


class Echo:
    """Answers with the question's last word and the expert it was given; a batch beyond `breaks_at` spoils its last."""

    def __init__(self, router=None, breaks_at=None):
        self.router, self.breaks_at = router, breaks_at
        self.calls = []

    def generate(self, samples, experts="route", *, max_new_tokens, batch_size):
        self.calls.append((len(samples), experts, max_new_tokens, batch_size))
        ids = experts.tolist() if isinstance(experts, torch.Tensor) else experts
        ids = ids if isinstance(ids, list) and len(ids) == len(samples) else [None] * len(samples)
        texts = [f"{sample.question.split()[-1]}-{expert}" for sample, expert in zip(samples, ids, strict=True)]
        if self.breaks_at is not None and len(texts) >= self.breaks_at:
            texts[-1] = "broken"
        return texts


ITEMS = [Item(f"i{at}", "ab"[at % 2], "word " * (at * 7 % 5) + f"w{at}", f"w{at}-{at % 3}") for at in range(23)]


def by_id(samples):
    return torch.tensor([int(sample.id[1:]) % 3 for sample in samples])


def test_order_experts_and_scores_belong_to_each_sample():
    asked = []
    model = Echo(router=lambda samples: asked.append(len(samples)) or by_id(samples))
    done = []
    found = evaluate(model, ITEMS, batch_size=2, max_new_tokens=5, progress=done.append)
    assert [item.id for item in found] == [item.id for item in ITEMS]
    assert [item.prediction for item in found] == [item.answer for item in ITEMS]
    assert [item.expert for item in found] == [at % 3 for at in range(23)]
    assert all(type(item.expert) is int for item in found)
    assert [item.score for item in found] == [1.0] * 23
    assert asked == [23]
    assert sum(done) == 23
    assert len(done) == 3
    assert {call[2:] for call in model.calls} == {(5, 2)}


def test_like_lengths_share_a_batch():
    seen = []

    class Spy(Echo):
        def generate(self, samples, experts="route", **options):
            seen.extend(len(sample.question) for sample in samples)
            return super().generate(samples, experts, **options)

    evaluate(Spy(), ITEMS, batch_size=3)
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
def test_ids_given_are_used_and_recorded(kind):
    ids = [-1, 0, 1, 2] * 5 + [0, 1, 2]
    given = {"list": ids, "tensor": torch.tensor(ids), "array": np.array(ids)}[kind]
    found = evaluate(Echo(router=by_id), ITEMS, experts=given, batch_size=4)
    assert [item.expert for item in found] == ids
    assert [item.prediction.split("-", 1)[1] for item in found] == [str(one) for one in ids]


@pytest.mark.parametrize(("experts", "passed"), [("route", "route"), (None, None), ([0.5, 0.5], [0.5, 0.5])])
def test_without_a_single_expert_none_is_recorded(experts, passed):
    model = Echo()
    found = evaluate(model, ITEMS[:3], experts=experts)
    assert [item.expert for item in found] == [None] * 3
    assert model.calls[0][1] == passed


def test_float_rows_follow_their_samples():
    rows = torch.arange(46.0).reshape(23, 2)
    model = Echo()
    evaluate(model, ITEMS, experts=rows, batch_size=32)
    order = sorted(range(23), key=lambda at: (len(ITEMS[at].question), at))
    assert torch.equal(model.calls[0][1], rows[order])


def test_scorer_of_each_task():
    items = [Item("1", "a", "say yes", "yes"), Item("2", "b", "say yes", "yes")]
    found = evaluate(Echo(), items, scorer={"a": "exact_match", "b": "substring"})
    assert [item.score for item in found] == [0.0, 1.0]
    with pytest.raises(ValueError, match="none for b"):
        evaluate(Echo(), items, scorer={"a": "exact_match"})


def test_no_samples():
    assert evaluate(Echo(router=by_id), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": [0, 1]}, "one id for each of 23 samples"),
        ({"experts": torch.ones(2, 4)}, "one row for each of 23 samples"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"scorer": "exact"}, "scorer: expected one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Echo(), ITEMS, **options)


def test_a_model_that_drops_an_answer():
    class Short(Echo):
        def generate(self, samples, experts="route", **options):
            return super().generate(samples, experts, **options)[1:]

    with pytest.raises(ValueError, match="expected 23 answers, got 22"):
        evaluate(Short(), ITEMS)


def test_check_batching_names_what_differs():
    assert check_batching(Echo(router=by_id), ITEMS, 4) == []
    found = check_batching(Echo(router=by_id, breaks_at=4), ITEMS[:9], 4)
    assert found == [
        {"id": "i3", "alone": "w3-0", "batched": "broken"},
        {"id": "i7", "alone": "w7-1", "batched": "broken"},
    ]
