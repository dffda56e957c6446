"""pocket-ability: splits by their source, answers derived once more from the carriers."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest
from PIL import Image

from mllmcl.assets import asset
from mllmcl.streams import pocket_ability

pytestmark = pytest.mark.network


def test_order(ability):
    assert [task.name for task in ability.tasks] == ["ocr", "math", "counting", "gui"]


@pytest.fixture(scope="module")
def written():
    """Rows of 64 brightnesses and the digit."""
    with gzip.open(asset("digits"), "rt") as file:
        return [[float(value) for value in row] for row in csv.reader(file)]


@pytest.mark.parametrize("name", ["ocr", "math"])
def test_digits_are_apart(ability, name):
    task = ability.task(name)
    train, test = (
        {place for sample in part for place in sample.metadata["digits"]} for part in (task.train, task.test)
    )
    assert len(train) > 300 and len(test) > 80 and not train & test
    assert max(train) < 1797 - 360 <= min(test)


def test_digits_are_read_right_and_shown(ability, written):
    likeness, of_another = [], []
    for sample in ability.task("ocr").test:
        (place,) = sample.metadata["digits"]
        assert sample.answer == str(int(written[place][64]))
        digit = np.array(written[place][:64]).reshape(8, 8)
        image = sample.image[:, :, 0].astype(float)
        ink = np.abs(image - np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]))
        # what both show once their empty margins are cut off
        likeness.append(np.corrcoef(*(cut(each).ravel() for each in (ink, digit)))[0, 1])
        another = np.array(written[place - 1][:64]).reshape(8, 8)
        of_another.append(np.corrcoef(*(cut(each).ravel() for each in (ink, another)))[0, 1])
    assert np.median(likeness) > 0.88 and np.median(of_another) < 0.6
    assert np.mean(np.greater(likeness, of_another)) > 0.95


def cut(ink) -> np.ndarray:
    rows, columns = np.nonzero(ink > 0.3 * ink.max())
    box = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(box.astype(np.float32)).resize((8, 8), Image.BOX))


def test_the_larger_number_is_larger(ability, written):
    task = ability.task("math")
    for sample in [*task.train, *task.test]:
        left, right = (int(written[place][64]) for place in sample.metadata["digits"])
        assert abs(left - right) >= 2 and sample.answer == ("left" if left > right else "right")


def test_rows_of_the_micrograph_are_apart(ability):
    task = ability.task("counting")
    train, test = (
        {row for sample in part for row in range(sample.metadata["row"], sample.metadata["row"] + 96)}
        for part in (task.train, task.test)
    )
    assert max(train) < min(test)


def test_nuclei_are_counted_right(ability):
    with Image.open(asset("nuclei-mask")) as picture:
        mask = np.asarray(picture)
    for sample in ability.task("counting").test:
        row, column = sample.metadata["row"], sample.metadata["column"]
        crop = mask[row : row + 96, column : column + 96]
        shares = {name: (crop == name).sum() / (mask == name).sum() for name in np.unique(crop) if name}
        assert all(share <= 0.15 or share >= 0.6 for share in shares.values())
        number = sum(share >= 0.6 for share in shares.values())
        assert number == sample.metadata["number"]
        assert sample.answer == ("few" if number <= 3 else "some" if number <= 5 else "many")
        assert number not in (3, 6)


def test_nuclei_are_shown_where_they_are(ability):
    with Image.open(asset("nuclei-image")) as picture:
        raw = np.sqrt(np.asarray(picture).astype(float))
    for sample in ability.task("counting").test[::8]:
        facts = sample.metadata
        crop = np.rot90(raw[facts["row"] : facts["row"] + 96, facts["column"] : facts["column"] + 96], facts["turns"])
        crop = crop[:, ::-1] if facts["flip"] else crop
        small = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((112, 112), Image.BILINEAR))
        assert np.corrcoef(small.ravel(), sample.image[:, :, 0].ravel())[0, 1] > 0.95


def test_icon_families_are_apart(ability):
    task = ability.task("gui")
    for samples, family, place in ((task.train, "material", 0), (task.test, "fontawesome", 1)):
        names = json.loads(asset(f"{family}-names").read_text())
        for sample in samples:
            assert sample.metadata["family"] == family and sample.metadata["icon"] in names
            assert sample.metadata["icon"] in pocket_ability.ACTIONS[sample.answer][place]
