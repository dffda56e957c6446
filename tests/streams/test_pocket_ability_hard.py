"""pocket-ability-hard: splits by their source, answers derived once more from the carriers."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mllmcl.assets import asset
from mllmcl.streams import drawing, pocket_ability, pocket_ability_hard

from .marks import NEEDS_NPM
from .test_pocket_ability import cut

pytestmark = [pytest.mark.network, NEEDS_NPM]


def test_order(ability_hard):
    assert [task.name for task in ability_hard.tasks] == ["ocr", "math", "counting", "gui"]


@pytest.fixture(scope="module")
def written():
    """The pictures of each digit, ink from 0 to 1."""
    files = [json.loads((asset("mnist-digits") / f"{digit}.json").read_text()) for digit in range(10)]
    return [np.array(file["data"]).reshape(-1, 28, 28) for file in files]


def test_there_are_ten_thousand_digits_and_none_is_in_both_parts(written):
    assert sum(len(pictures) for pictures in written) == 10_000
    seen = {part: set() for part in ("train", "test")}
    for part, digests in seen.items():
        for digit, places in pocket_ability_hard.digit_pools(part).items():
            digests.update(written[digit][place].tobytes() for place in places)
    assert not seen["train"] & seen["test"] and len(seen["train"]) > 7900 and len(seen["test"]) > 1900


@pytest.mark.parametrize("name", ["ocr", "math"])
def test_digits_are_apart(ability_hard, written, name):
    task = ability_hard.task(name)
    train, test = (
        {tuple(pair) for sample in part for pair in sample.metadata["digits"]} for part in (task.train, task.test)
    )
    assert len(train) > 600 and len(test) > 150 and not train & test
    for digit, pictures in enumerate(written):
        last_of_train = max(place for other, place in train if other == digit)
        assert last_of_train < 0.81 * len(pictures) <= 1.02 * min(place for other, place in test if other == digit)


def test_numbers_are_read_from_left_to_right(ability_hard):
    task = ability_hard.task("ocr")
    for samples in (task.train, task.test):
        for sample in samples:
            assert sample.answer == "".join(str(digit) for digit, _ in sample.metadata["digits"])
        for place in range(3):
            counts = Counter(sample.answer[place] for sample in samples)
            assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 1
    # most numbers of the test are new ones
    assert len({s.answer for s in task.test} - {s.answer for s in task.train}) > 30


def test_the_sum_is_right_and_of_every_size(ability_hard):
    task = ability_hard.task("math")
    for samples in (task.train, task.test):
        for sample in samples:
            assert int(sample.answer) == sum(digit for digit, _ in sample.metadata["digits"])
        assert {int(sample.answer) for sample in samples} == set(range(19))


@pytest.mark.parametrize("name", ["ocr", "math"])
def test_digits_are_shown_in_their_order(ability_hard, written, name):
    likeness, of_another = [], []
    for sample in ability_hard.task(name).test:
        row = sample.metadata["digits"]
        image = sample.image[:, :, 0].astype(float)
        ink = np.abs(image - image[0, 0])
        for column, part in enumerate(np.array_split(ink, len(row), axis=1)):
            digit, place = row[column]
            likeness.append(np.corrcoef(cut(part).ravel(), cut(written[digit][place]).ravel())[0, 1])
            another = written[(digit + 1) % 10][place // 2]
            of_another.append(np.corrcoef(cut(part).ravel(), cut(another).ravel())[0, 1])
    assert np.median(likeness) > 0.9 and np.median(of_another) < 0.6
    assert np.mean(np.greater(likeness, of_another)) > 0.97


def test_rows_of_the_micrograph_are_apart(ability_hard):
    task = ability_hard.task("counting")
    train, test = (
        {row for s in part for row in range(s.metadata["row"], s.metadata["row"] + s.metadata["side"])}
        for part in (task.train, task.test)
    )
    assert max(train) < min(test) and max(test) < 512


def test_nuclei_are_counted_right_and_shown_where_they_are(ability_hard):
    with Image.open(asset("nuclei-mask")) as picture:
        mask = np.asarray(picture)
    with Image.open(asset("nuclei-image")) as picture:
        raw = np.sqrt(np.asarray(picture).astype(float))
    for sample in ability_hard.task("counting").test:
        facts = sample.metadata
        box = tuple(slice(facts[key], facts[key] + facts["side"]) for key in ("row", "column"))
        crop = mask[box]
        shares = {name: (crop == name).sum() / (mask == name).sum() for name in np.unique(crop) if name}
        assert all(share <= 0.15 or share >= 0.6 for share in shares.values())
        assert sample.answer == str(sum(share >= 0.6 for share in shares.values()))
        light = np.rot90(raw[box], facts["turns"])
        light = np.ascontiguousarray(light[:, ::-1] if facts["flip"] else light)
        small = np.asarray(Image.fromarray(light).resize((112, 112), Image.BILINEAR))
        assert np.corrcoef(small.ravel(), sample.image[:, :, 0].ravel())[0, 1] > 0.85
    assert {sample.answer for sample in ability_hard.task("counting").test} == set("0123456789")


def test_the_size_of_a_crop_tells_little(ability_hard):
    task = ability_hard.task("counting")
    answers: dict[int, Counter] = {}
    for sample in task.train:
        answers.setdefault(sample.metadata["side"], Counter())[sample.answer] += 1
    guessed = [answers[sample.metadata["side"]].most_common(1)[0][0] == sample.answer for sample in task.test]
    assert np.mean(guessed) < 0.3


def test_exactly_one_button_does_what_is_asked(ability_hard):
    task = ability_hard.task("gui")
    assert len(pocket_ability_hard.ACTIONS) == 24
    for samples, family, place in ((task.train, "material", 0), (task.test, "fontawesome", 1)):
        names = json.loads(asset(f"{family}-names").read_text())
        asked = Counter()
        for sample in samples:
            action = sample.question.removeprefix("Which button do you press to ").removesuffix("?")
            asked[action, sample.answer] += 1
            shown = sample.metadata["icons"]
            assert sample.metadata["family"] == family and len(shown) == 4 and set(shown) <= names.keys()
            right = [icon in pocket_ability_hard.ACTIONS[action][place] for icon in shown]
            assert [name for name, fits in zip(pocket_ability_hard.PLACES, right, strict=True) if fits] == [
                sample.answer
            ]
        # every action in every place, equally often
        assert len(asked) == 96 and set(asked.values()) == {len(samples) // 96}


def test_no_icon_stands_for_two_actions():
    for place in (0, 1):
        icons = [icon for designs in pocket_ability_hard.ACTIONS.values() for icon in designs[place]]
        assert len(set(icons)) == len(icons)
    easy = {designs for designs in pocket_ability.ACTIONS.values()}
    assert easy <= set(pocket_ability_hard.ACTIONS.values())


def test_the_icons_are_where_they_are_said_to_be(ability_hard):
    right = []
    for sample in ability_hard.task("gui").test:
        masks = [drawing.icon_mask("fontawesome", name, 40) for name in sample.metadata["icons"]]
        drawn = [cut(np.asarray(mask).astype(float)).ravel() for mask in masks]
        shown = [cut(part).ravel() for part in icons_of(sample.image)]
        likeness = np.corrcoef(shown, drawn)[:4, 4:]
        right.append((likeness.argmax(1) == np.arange(4)).all())
    assert np.mean(right) > 0.95


def icons_of(image) -> list[np.ndarray]:
    """The ink of the four buttons, from top left to bottom right."""
    pixels = image.astype(int)
    colours = [np.array(colour) for colour, _ in Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(3)]
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = min(colours, key=lambda colour: -(edge == colour).all(1).sum())
    face, ink = (colour for colour in colours if colour is not ground)
    rows, columns = np.nonzero(np.abs(pixels - ground).sum(2) > 0)
    box = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    share = np.abs(box - face).sum(2) / np.abs(ink - face).sum()
    half = [part for row in np.array_split(share, 2) for part in np.array_split(row, 2, axis=1)]
    # without the corners of the buttons
    margin = round(half[0].shape[0] * 0.12)
    return [np.clip(part[margin:-margin, margin:-margin], 0, 1) for part in half]
