"""pocket-domain: splits by their source, answers derived once more from the carriers."""

from __future__ import annotations

import csv
import gzip
from datetime import date

import numpy as np
import pytest
from PIL import Image

from mllmcl.assets import asset
from mllmcl.streams import pocket_domain

pytestmark = pytest.mark.network

THIRDS = ("start", "middle", "end")


def facts(samples, *keys):
    return {tuple(sample.metadata[key] for key in keys) for sample in samples}


def test_order(domain):
    assert [task.name for task in domain.tasks] == ["remote_sensing", "medical", "driving", "science", "finance"]


def test_stripes_of_the_earth_are_apart(domain):
    task = domain.task("remote_sensing")
    assert not facts(task.train, "stripe") & facts(task.test, "stripe")
    for sample in [*task.train, *task.test]:
        west = sample.metadata["west"]
        # the whole tile, not only its corner
        assert (west + 180) // 20 == (west + 180 + 3.2 - 1e-6) // 20 == sample.metadata["stripe"]


def test_climates_and_pixels_are_those_of_the_place(domain):
    with Image.open(asset("koeppen-geiger")) as picture:
        zones = np.asarray(picture)
    with Image.open(asset("blue-marble")) as picture:
        marble = np.asarray(picture.convert("RGB"))
    # Koeppen letters A to E, in the order of the zone numbers; 32 is the sea
    borders, names = (5, 9, 18, 30, 32), ("tropical", "arid", "temperate", "continental", "polar")
    task = domain.task("remote_sensing")
    for sample in [*task.test, *task.train[::3]]:
        west, north = sample.metadata["west"], sample.metadata["north"]
        rows, columns = (slice(round(at * 36), round((at + 3.2) * 36)) for at in (90 - north, west + 180))
        tile = zones[rows, columns].ravel()
        land = tile[tile < 32]
        counts = np.bincount(np.searchsorted(borders, land, side="right"), minlength=5)
        assert names[counts.argmax()] == sample.answer
        assert land.size > 0.88 * tile.size and counts.max() > 0.83 * land.size
        rows, columns = (slice(round(at * 15), round(at * 15) + 48) for at in (90 - north, west + 180))
        assert np.allclose(marble[rows, columns].mean((0, 1)), sample.image.mean((0, 1)), atol=1.5)


def brain(name) -> np.ndarray:
    header_and_body = gzip.decompress(asset(f"mni152-{name}").read_bytes())
    return np.frombuffer(header_and_body[352:], np.uint8).reshape(189, 233, 197)  # [z, y, x]


def test_slices_are_apart(domain):
    task = domain.task("medical")
    for axis in (0, 1, 2, None):
        train, test = (
            {sample.metadata["slice"] for sample in samples if sample.metadata.get("axis") == axis}
            for samples in (task.train, task.test)
        )
        assert train and test and not train & test
        # blocks of eight
        assert not {place // 8 for place in train} & {place // 8 for place in test}


def test_tissue_is_that_of_the_maps_and_the_cross_is_on_it(domain):
    gray, white, picture = brain("gm") / 255, brain("wm") / 255, brain("t1")
    asked = [sample for sample in domain.task("medical").test if "voxel" in sample.metadata]
    seen, true = [], []
    for sample in asked:
        x, y, z = sample.metadata["voxel"]
        expected = {"gray matter": gray[z, y, x] > 0.8, "white matter": white[z, y, x] > 0.8}
        expected["fluid"] = gray[z, y, x] < 0.15 and white[z, y, x] < 0.15 and picture[z, y, x] > 0
        assert [name for name, holds in expected.items() if holds] == [sample.answer]
        image = sample.image.astype(int)
        red = np.argwhere((image[:, :, 0] > 200) & (image[:, :, 1:].max(2) < 60))
        row, column = ((red.min(0) + red.max(0)) / 2).round().astype(int)
        seen.append(image[row, column].mean())
        true.append(picture[z, y, x])
    # the picture between the arms of the cross is the voxel that was asked for
    assert np.corrcoef(seen, true)[0, 1] > 0.98


def test_planes_show_that_slice(domain):
    picture = brain("t1")
    for sample in [sample for sample in domain.task("medical").test if "axis" in sample.metadata][::6]:
        axis, place = sample.metadata["axis"], sample.metadata["slice"]
        assert sample.answer == ("sagittal", "coronal", "axial")[axis]
        plane = np.take(picture, place, 2 - axis)[::-1]
        square = np.zeros((233, 233), np.uint8)
        top, left = ((233 - length) // 2 for length in plane.shape)
        square[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
        small = np.asarray(Image.fromarray(square).resize((112, 112), Image.BILINEAR))
        likeness = [np.corrcoef(side.ravel(), sample.image[:, :, 0].ravel())[0, 1] for side in (small, small[:, ::-1])]
        assert max(likeness) > 0.99


def test_icon_families_and_photos_are_apart(domain):
    task = domain.task("driving")
    assert facts(task.train, "family") == {("material",)} and facts(task.test, "family") == {("fontawesome",)}
    assert not facts(task.train, "photo") & facts(task.test, "photo")
    assert len({sample.answer for sample in task.test}) == 10
    for sample in [*task.train, *task.test]:
        assert sample.metadata["icon"] in pocket_domain.ICONS[sample.answer][sample.metadata["family"] == "fontawesome"]


def test_the_icon_is_in_the_picture(domain):
    """A person is taller than wide, a side view of a truck wider than tall: the icon's pixels say so."""
    shapes = {"pedestrian": [], "truck": []}
    for sample in domain.task("driving").test:
        if sample.answer in shapes and sample.metadata["photo"] != "rocket":
            image = sample.image.astype(int)
            # gravel and grass are gray and never near black or white together with a hue
            mask = np.ptp(image, axis=2) > 12
            rows, columns = np.nonzero(mask)
            if mask.sum() > 200:
                shapes[sample.answer].append(np.ptp(rows) / np.ptp(columns))
    assert len(shapes["pedestrian"]) > 2 and np.median(shapes["pedestrian"]) > 1.2
    assert len(shapes["truck"]) > 2 and np.median(shapes["truck"]) < 0.95


def is_red(image):
    return (image[:, :, 0] > image[:, :, 1] + 60) & (image[:, :, 0] > image[:, :, 2] + 60)


def is_blue(image):
    return image[:, :, 2] > image[:, :, 0] + 60


def test_weather_days_are_apart(domain):
    task = domain.task("science")
    days = [
        {date.fromisoformat(text) for pair in facts(part, "first_day", "last_day") for text in pair}
        for part in (task.train, task.test)
    ]
    assert max(days[0]) < min(days[1])


def test_weather_answers_follow_from_the_table_and_the_picture(domain):
    with asset("seattle-weather").open() as file:
        rows = {row["date"].replace("/", "-"): row for row in csv.DictReader(file)}
    names = list(rows)
    for sample in domain.task("science").test:
        first, last = (names.index(sample.metadata[key]) for key in ("first_day", "last_day"))
        window = [rows[name] for name in names[first : last + 1]]
        assert len(window) == 30
        image = sample.image.astype(int)
        if "warmer" in sample.question:
            highs = [float(row["temp_max"]) for row in window]
            assert (sample.answer == "warmer") == (sum(highs[20:]) - sum(highs[:10]) > 0)
            height = [np.nonzero(is_red(image)[:, part])[0].mean() for part in (slice(7, 40), slice(72, 105))]
            assert (sample.answer == "warmer") == (height[1] < height[0])
        else:
            rain = [sum(float(row["precipitation"]) for row in window[at : at + 10]) for at in (0, 10, 20)]
            assert sample.answer == THIRDS[int(np.argmax(rain))]
            drawn = [is_blue(image)[:, round(at) : round(at + 98 / 3)].sum() for at in (7, 7 + 98 / 3, 7 + 196 / 3)]
            assert sample.answer == THIRDS[int(np.argmax(drawn))]


def test_price_days_are_apart(domain):
    task = domain.task("finance")
    last = max(date.fromisoformat(sample.metadata["last_day"]) for sample in task.train)
    assert last < min(date.fromisoformat(sample.metadata["first_day"]) for sample in task.test)
    assert facts(task.train, "index") == facts(task.test, "index") == {("sp500",), ("nasdaq",)}


def test_price_answers_follow_from_the_table_and_the_picture(domain):
    tables = {}
    for index in ("sp500", "nasdaq"):
        with gzip.open(asset(index), "rt") as file:
            rows = [(row["Date"].split("/"), row) for row in csv.DictReader(file)]
        tables[index] = {f"{int(year)}-{int(month):02}-{int(day):02}": row for (month, day, year), row in rows}
    for sample in domain.task("finance").test:
        table = tables[sample.metadata["index"]]
        names = list(table)
        first, last = (names.index(sample.metadata[key]) for key in ("first_day", "last_day"))
        window = [table[name] for name in names[first : last + 1]]
        assert len(window) == 20
        drawn = sample.image.astype(int).min(2) < 180
        if "up or down" in sample.question:
            assert (sample.answer == "up") == (float(window[-1]["Close"]) > float(window[0]["Open"]))
        else:
            highs = [float(row["High"]) for row in window]
            assert sample.answer == THIRDS[sum(int(np.argmax(highs)) >= border for border in (7, 14))]
            top = np.nonzero(drawn)[1][np.nonzero(drawn)[0].argmin()]
            assert sample.answer == THIRDS[sum((top - 7) / 98 * 20 >= border for border in (7, 14))]
