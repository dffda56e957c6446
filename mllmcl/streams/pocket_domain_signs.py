"""pocket-domain-signs: pocket-domain with real traffic signs in its driving task, tested on unseen national designs."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ImageEnhance, ImageFilter

from ..assets import asset
from . import pocket_domain
from .base import Stream, chosen_tasks
from .building import Item, Recipe, build_stream, loading, note, pick_balanced
from .drawing import background, paste_picture, svg_picture

SUMMARY = (
    "pocket-domain with the meanings of traffic signs in driving, a harder level (built in, needs npm and resvg-py)"
)
SOURCES = {
    **pocket_domain.SOURCES,
    "driving": "Driving: drawings of official traffic signs of many countries (Mapillary sprite source, MIT), composed "
    "for this stream on scikit-image photographs (CC0, NASA), no photographs of signs; the last two designs of each "
    "meaning are held out for the test, some of which look much like another one and some like none.",
}
NOTE = note(SOURCES) + " All tasks but driving are those of pocket-domain, item by item."

# meanings with many designs, no two of them alike; the answer is what follows the kind
MEANINGS = (
    "regulatory--stop",
    "regulatory--no-parking",
    "regulatory--no-overtaking",
    "regulatory--weight-limit",
    "warning--pedestrians-crossing",
    "warning--roadworks",
    "warning--wild-animals",
    "warning--low-flying-aircraft",
    "warning--roundabout",
    "warning--tunnel",
    "warning--tractors",
    "warning--traffic-signals",
)
NUM_TEST_DESIGNS = 2  # the last ones


@functools.cache
def designs() -> dict[str, list[Path]]:
    """meaning -> the files of its designs, in the order of their numbers."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in asset("traffic-signs").iterdir():
        meaning, number = re.fullmatch(r"(.+)--g(\d+)\.svg", path.name).groups()
        found.setdefault(meaning, []).append((int(number), path))
    return {meaning: [path for _, path in sorted(pairs)] for meaning, pairs in found.items()}


def sign_pools(part: str) -> dict[str, list[Path]]:
    """answer -> the designs of a part."""
    chosen = slice(-NUM_TEST_DESIGNS, None) if part == "test" else slice(-NUM_TEST_DESIGNS)
    return {meaning.split("--")[1].replace("-", " "): designs()[meaning][chosen] for meaning in MEANINGS}


def driving(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    photos = pocket_domain.PHOTOS[part]
    for answer, path in pick_balanced(sign_pools(part), count, random, repeat=True):
        photo = photos[int(random.integers(len(photos)))]
        sign = svg_picture(path, round(size * random.uniform(0.5, 0.8)))
        picture = paste_picture(background(photo, size, random), sign, random)
        picture = ImageEnhance.Brightness(picture).enhance(float(random.uniform(0.6, 1.2)))
        # in pixels of the default size
        picture = picture.filter(ImageFilter.GaussianBlur(float(random.uniform(0.0, 1.2)) * size / 112))
        yield Item(
            image=np.asarray(picture),
            question="What does this traffic sign mean?",
            answer=answer,
            metadata={"sign": path.stem, "photo": photo},
        )


RECIPES = (
    Recipe(
        name="driving",
        description="Traffic signs of many countries and their meanings.",
        make=driving,
        libraries={"resvg-py": "signs"},
    ),
)


@loading
def load(*, tasks: list[str] | None, **options) -> Stream:
    """Its own driving beside the other tasks of `pocket-domain`."""
    name = "pocket-domain-signs"
    chosen = chosen_tasks([recipe.name for recipe in pocket_domain.RECIPES], tasks)
    own = [recipe.name for recipe in RECIPES if recipe.name in chosen]
    others = [task for task in chosen if task not in own]
    found = []
    # first what may lack a package
    if own:
        found += build_stream(sys.modules[__name__], name, RECIPES, NOTE, tasks=own, **options).tasks
    if others:
        found += pocket_domain.load(tasks=others, **options).tasks
    return Stream(name=name, tasks=tuple(sorted(found, key=lambda task: chosen.index(task.name))), note=NOTE)
