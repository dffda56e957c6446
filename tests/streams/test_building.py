"""What the built-in streams have in common: balance, determinism, the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import logging
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmcl import streams
from mllmcl.streams import building
from mllmcl.streams.building import pick_balanced

from .marks import NEEDS_NPM, NEEDS_RESVG

NAMES = (
    "pocket-domain",
    "pocket-ability",
    pytest.param("pocket-domain-signs", marks=[NEEDS_NPM, NEEDS_RESVG]),
    pytest.param("pocket-ability-hard", marks=NEEDS_NPM),
)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_labels_are_balanced_and_candidates_used_evenly(sizes, count, repeat, seed):
    pools = {f"label {place}": [(place, item) for item in range(size)] for place, size in enumerate(sizes)}
    wanted = -(-count // len(pools))
    if not repeat and any(wanted - (place >= count % len(pools) > 0) > size for place, size in enumerate(sizes)):
        with pytest.raises(ValueError, match="different items with the answer"):
            pick_balanced(pools, count, np.random.default_rng(seed))
        return
    picked = pick_balanced(pools, count, np.random.default_rng(seed), repeat=repeat)
    labels = Counter(label for label, _ in picked)
    assert len(picked) == count
    assert max(labels.values()) - (min(labels.values()) if len(labels) == len(pools) else 0) <= 1
    for label, pool in pools.items():
        uses = Counter(item for other, item in picked if other == label)
        assert set(uses) <= set(pool)
        if uses:
            assert max(uses.values()) - (min(uses.values()) if len(uses) == len(pool) else 0) <= 1


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="1 different items with the answer 'b' are asked for, there are 0"):
        pick_balanced({"a": [1], "b": []}, 2, np.random.default_rng(0), repeat=True)


def loaded(name, request):
    return request.getfixturevalue(name.removeprefix("pocket-").replace("-", "_"))


def all_samples(stream):
    return [sample for task in stream.tasks for sample in [*task.train, *task.test]]


def fingerprint(stream) -> str:
    digest = hashlib.sha256()
    for sample in all_samples(stream):
        digest.update(repr((sample.id, sample.question, sample.answer, sample.metadata)).encode())
        digest.update(sample.image.tobytes())
    return digest.hexdigest()


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_default_sizes_ids_and_pictures(name, request):
    stream = loaded(name, request)
    stream.validate()
    for task in stream.tasks:
        assert (len(task.train), len(task.test)) == (384, 96)
        assert task.description.endswith(".") and task.scorer == "exact_match"
        # one question, two, or one for each action of the toolbar
        assert len({sample.question for sample in task.train}) in (1, 2, 24)
        for sample in [*task.train, *task.test]:
            assert sample.image.dtype == np.uint8 and sample.image.shape == (112, 112, 3)
            assert sample.task == task.name and sample.id.startswith(f"{task.name}/")
    assert "not the MLLM-CL benchmark" in stream.note and "no score here compares" in stream.note


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_balanced_and_known_from_training(name, request):
    for task in loaded(name, request).tasks:
        if (name, task.name) == ("pocket-ability-hard", "ocr"):
            # numbers of three digits: each place of them is balanced, not they
            continue
        for question in {sample.question for sample in task.test}:
            known = {sample.answer for sample in task.train if sample.question == question}
            for samples in (task.train, task.test):
                counts = Counter(sample.answer for sample in samples if sample.question == question)
                assert set(counts) == known and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_no_picture_occurs_twice(name, request):
    for task in loaded(name, request).tasks:
        train, test = (
            Counter((sample.image.tobytes(), sample.question) for sample in samples)
            for samples in (task.train, task.test)
        )
        assert max(train.values()) == max(test.values()) == 1, task.name
        assert not {image for image, _ in train} & {image for image, _ in test}, task.name


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_every_byte(name, home):
    def build(seed):
        shutil.rmtree(home / "streams", ignore_errors=True) if seed is None else None
        return fingerprint(streams.load(name, num_train=12, num_test=6, seed=seed or 0))

    kept = home / "streams"
    kept.rename(home / "kept") if kept.exists() else None
    try:
        first, other, again = build(0), build(1), build(None)
    finally:
        shutil.rmtree(kept, ignore_errors=True)
        (home / "kept").rename(kept) if (home / "kept").exists() else None
    assert first == again != other


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_tasks_do_not_depend_on_each_other(name, request, home):
    stream = loaded(name, request)
    last = stream.tasks[-1]
    alone = streams.load(name, tasks=[last.name])
    assert [task.name for task in alone.tasks] == [last.name]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(alone.tasks[0].test, last.test, strict=True))


@pytest.mark.network
def test_a_second_load_draws_nothing(domain, home, monkeypatch):
    """It reads the arrays that were built before."""
    from mllmcl.streams import pocket_domain

    def refuse(*_):
        raise AssertionError("built again")

    recipes = tuple(dataclasses.replace(recipe, make=refuse) for recipe in pocket_domain.RECIPES)
    monkeypatch.setattr(pocket_domain, "RECIPES", recipes)
    streams.load("pocket-domain")


@pytest.mark.network
@pytest.mark.parametrize("name", NAMES)
def test_another_image_size(name, home):
    for size in (64, 48):
        stream = streams.load(name, num_train=6, num_test=6, image_size=size)
        assert {sample.image.shape for sample in all_samples(stream)} == {(size, size, 3)}


@pytest.mark.network
def test_too_many_items_are_refused(home):
    with pytest.raises(ValueError, match=r"pocket-domain, task science, test: \d+ different items with the answer"):
        streams.load("pocket-domain", tasks=["science"], num_train=4, num_test=4000)


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))


def damage_length(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_all(path):
    path.write_bytes(b"nothing of use")


@pytest.mark.network
@pytest.mark.parametrize("damage", [damage_byte, damage_length, damage_all])
def test_a_damaged_cache_is_told_and_built_anew(damage, home, caplog):
    options = {"num_train": 5, "num_test": 5, "tasks": ["gui"]}
    before = fingerprint(streams.load("pocket-ability", **options))
    newest = max((home / "streams" / "pocket-ability").glob("gui-test-*"), key=lambda path: path.stat().st_mtime_ns)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert fingerprint(streams.load("pocket-ability", **options)) == before
    assert f"{newest} is damaged" in caplog.text and "is built anew" in caplog.text
    caplog.clear()
    assert fingerprint(streams.load("pocket-ability", **options)) == before
    assert not caplog.text


@pytest.mark.network
def test_changed_code_builds_anew(home, monkeypatch):
    options = {"num_train": 5, "num_test": 5, "tasks": ["gui"]}
    streams.load("pocket-ability", **options)
    count = len(list((home / "streams" / "pocket-ability").iterdir()))
    streams.load("pocket-ability", **options)
    assert len(list((home / "streams" / "pocket-ability").iterdir())) == count
    monkeypatch.setattr(building, "_code_digest", lambda module: "other code")
    streams.load("pocket-ability", **options)
    assert len(list((home / "streams" / "pocket-ability").iterdir())) == count + 2


@pytest.mark.parametrize(
    "stream, source",
    [
        ("pocket_ability_hard", "pocket_ability_hard"),
        ("pocket_ability_hard", "pocket_ability"),
        ("pocket_domain_signs", "pocket_domain"),
        ("pocket_domain", "drawing"),
        ("pocket_domain", "building"),
    ],
)
def test_the_code_that_counts_is_that_of_every_file_a_stream_uses(stream, source, monkeypatch):
    modules = {name: importlib.import_module(f"mllmcl.streams.{name}") for name in (stream, source)}
    before = building._code_digest(modules[stream])
    assert building._code_digest(modules[stream]) == before
    real = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: real(part) + "#" * (part is modules[source]))
    assert building._code_digest(modules[stream]) != before
    assert building._code_digest(importlib.import_module("mllmcl.streams.coin")) != before


def test_a_stream_is_not_built_anew_for_one_it_does_not_use(monkeypatch):
    easy, hard = (importlib.import_module(f"mllmcl.streams.pocket_ability{end}") for end in ("", "_hard"))
    before = building._code_digest(easy)
    real = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: real(part) + "#" * (part is hard))
    assert building._code_digest(easy) == before


@pytest.mark.network
def test_a_missing_library_is_told_with_what_brings_it(home, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    told = r"pocket-domain-signs, task driving is drawn by the package resvg-py: pip install 'mllmcl\[signs\]'"
    with pytest.raises(ImportError, match=told):
        streams.load("pocket-domain-signs")
    # only where it is asked for
    stream = streams.load("pocket-domain-signs", tasks=["science"], num_train=4, num_test=4)
    assert [task.name for task in stream.tasks] == ["science"]


@pytest.mark.network
@NEEDS_NPM
@NEEDS_RESVG
def test_another_version_of_a_library_builds_anew(home, monkeypatch):
    options = {"num_train": 3, "num_test": 3, "tasks": ["driving"]}
    folder = home / "streams" / "pocket-domain-signs"
    streams.load("pocket-domain-signs", **options)
    count = len(list(folder.iterdir()))
    streams.load("pocket-domain-signs", **options)
    assert len(list(folder.iterdir())) == count
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    streams.load("pocket-domain-signs", **options)
    assert len(list(folder.iterdir())) == count + 2
