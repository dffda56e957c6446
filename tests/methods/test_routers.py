"""Routers: their formulas, their state, and that one registry names them all."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mllmcl import methods
from mllmcl.methods.features import Anchors, image_features, text_features
from mllmcl.methods.routers import RouterOptions, available_routers, find_router

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .mixing import items, learned, reloaded, same_alone_and_mixed, survives_cuts

QUESTIONS = (
    ("how many cats are there", "how many dogs are on the sofa", "how many"),
    ("what colour is the cat", "what colour is the sofa", "which colour is it"),
    ("is there a sofa", "is it a cat or a dog", "is it the dog's sofa"),
)


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def with_questions(stream, samples: int = 3):
    """The stream with short training sets and other questions."""
    tasks = [
        dataclasses.replace(
            task,
            train=[
                dataclasses.replace(sample, question=text)
                for sample, text in zip(task.train[:samples], QUESTIONS[place], strict=True)
            ],
        )
        for place, task in enumerate(stream.tasks)
    ]
    return dataclasses.replace(stream, tasks=tuple(tasks))


def made(name: str, mllm, tasks, known: int = 3):
    router = find_router(name)(mllm, tasks, RouterOptions())
    for place in range(known):
        router.learn(place)
    return router


def test_text_features_are_mean_embeddings_of_unit_length(stream, monkeypatch):
    monkeypatch.setattr("mllmcl.methods.features.CHUNK", 2)
    mllm = make_composed()
    samples = [dataclasses.replace(stream.tasks[0].test[0], question=text) for text in ("a", "what is it", "")]
    table = mllm.model.get_input_embeddings().weight
    for found, sample in zip(text_features(mllm, samples), samples, strict=True):
        ids = mllm.tokenizer(sample.question, add_special_tokens=False)["input_ids"]
        expected = torch.zeros(table.shape[1]) if not ids else torch.stack([table[i] for i in ids]).mean(0)
        torch.testing.assert_close(found, expected / max(float(expected.norm().detach()), 1e-12), rtol=1e-5, atol=1e-6)


def test_the_clip_router_adds_the_cosines_of_two_towers(stream):
    mllm = make_composed()
    tasks = with_questions(stream).tasks
    router = made("clip", mllm, tasks)
    samples = [sample for task in tasks for sample in task.train] + items(stream)
    scores = torch.zeros(len(samples), len(tasks))
    for tower in (image_features, text_features):
        for place, task in enumerate(tasks):
            anchor = sum(tower(mllm, [sample])[0] for sample in task.train) / len(task.train)
            for row, sample in enumerate(samples):
                feature = tower(mllm, [sample])[0]
                scores[row, place] += feature @ anchor / (feature.norm() * anchor.norm())
    assert router(samples).tolist() == scores.argmax(1).tolist()
    torch.testing.assert_close(router.anchors.cosines(router.anchors.features(samples)).sum(0), scores)


def test_the_tfidf_router_is_a_cosine_of_weighted_counts(stream):
    """Written out with dictionaries; questions with unknown and repeated words among them."""
    tasks = with_questions(stream).tasks
    router = made("tfidf", None, tasks)
    documents = [text.replace("'", " ").split() for group in QUESTIONS for text in group]
    weight = {
        word: math.log((1 + len(documents)) / (1 + sum(word in document for document in documents))) + 1
        for document in documents
        for word in document
    }
    vectors = []
    for group in QUESTIONS:
        words = [word for text in group for word in text.replace("'", " ").split()]
        vectors.append({word: words.count(word) * weight[word] for word in words})

    def cosine(one: dict, other: dict) -> float:
        size = math.sqrt(sum(v * v for v in one.values())) * math.sqrt(sum(v * v for v in other.values()))
        return sum(value * other.get(word, 0.0) for word, value in one.items()) / size if size else 0.0

    asked = ["How many?", "the colour of the cat", "is it", "sofa sofa cat", "zebra how zebra", "Is the cat there"]
    expected = []
    for text in asked:
        words = text.lower().replace("?", "").split()
        question = {word: words.count(word) * weight[word] for word in words if word in weight}
        scores = [cosine(question, vector) for vector in vectors]
        assert sorted(scores)[-1] > sorted(scores)[-2] + 1e-6
        expected.append(scores.index(max(scores)))
    assert len(set(expected)) == 3
    samples = [dataclasses.replace(stream.tasks[0].test[0], question=text) for text in asked]
    assert router(samples).tolist() == expected
    assert router([dataclasses.replace(samples[0], question="zebra")]).tolist() == [0]


@pytest.mark.parametrize("name", sorted(available_routers()))
def test_every_router_tells_the_tasks_apart_and_keeps_its_state(name, stream):
    mllm, method = learned("mr_lora", stream, router=name)
    samples = items(stream, 4)
    ids = method.route(samples)
    own = find_router(name).num_experts
    assert set(ids.tolist()) <= {own, own + 1, own + 2}
    if not own:
        assert ids.tolist() == [stream.tasks.index(stream.task(sample.task)) for sample in samples]
    _, fresh = reloaded("mr_lora", stream, mllm, method, router=name)
    assert torch.equal(fresh.route(samples), ids)
    _, unlearned = learned("mr_lora", stream, tasks=0, router=name)
    assert unlearned.route(samples).tolist() == [-1] * len(samples)
    before = {key: value.clone() for key, value in method.state_tensors().items()}
    method.on_task_end(stream.tasks[2])
    assert all(torch.equal(value, before[key]) for key, value in method.state_tensors().items())
    assert torch.equal(method.route(samples), ids)


@pytest.mark.parametrize("name", ["clip", "tfidf"])
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(name, stream):
    mllm, _ = learned("mr_lora", stream, router=name)
    same_alone_and_mixed(mllm, items(stream))


def test_the_names_come_from_the_classes(monkeypatch):
    for router in available_routers().values():
        assert router.name and router.summary
    with pytest.raises(ValueError) as refused:
        methods.create("mr_lora", router="coin")
    assert all(name in str(refused.value) for name in available_routers())
    other = type("Coin", (), {"name": "coin", "num_experts": 0})
    monkeypatch.setattr("mllmcl.methods.routers.available_routers", lambda: {"coin": other})
    assert methods.create("mr_lora", router="coin").first == 0


def test_without_an_image_a_sample_is_like_nothing_seen(stream):
    mllm = make_composed()
    blind = [dataclasses.replace(sample, image=None) for sample in items(stream)]
    anchors = Anchors(mllm, ("text",))
    anchors.learn(0, blind)
    assert anchors.cosines(anchors.features(blind)).shape == (1, len(blind), 1)
    both = Anchors(mllm)
    both.learn(0, items(stream))
    alike = both.cosines(both.features([blind[0], items(stream)[1]]))
    assert sorted(alike[:, 0, 0].abs().gt(0).tolist()) == [False, True] and (alike[:, 1, 0] > 0.1).all()


@pytest.mark.parametrize("name", ["clip", "tfidf"])
def test_a_run_that_is_cut_off_ends_the_same(name, tmp_path):
    survives_cuts(tmp_path, "mr_lora", {"router": name}, cuts=(("write_adapters", 2), ("predict", 2)))
