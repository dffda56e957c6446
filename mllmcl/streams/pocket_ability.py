"""pocket-ability: four small tasks from data that travels in packages, one ability each."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..assets import asset
from .building import Item, Recipe, loader, note, pick_balanced
from .drawing import icon_mask

SUMMARY = "four abilities: OCR, math, counting, GUI (built in, minutes on a CPU)"
SOURCES = {
    "digits": "OCR and math: the 1,797 handwritten digits of the UCI Optical Recognition data as scikit-learn (BSD-3) "
    "carries them, real records.",
    "counting": "Counting: crops of one real fluorescence micrograph with labelled nuclei (stardist, BSD-3).",
    "gui": "GUI: buttons composed for this stream from Material Design (Apache-2.0) and Font Awesome (OFL) icons, the "
    "latter held out for the test.",
}
NOTE = note(SOURCES)

# -- OCR and math: handwritten digits; split by image

NUM_TEST_DIGITS = 360  # the last ones
MARGIN = 2  # smallest difference of the two digits to compare


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 `[1797, 8, 8]` with ink 255, and labels `[1797]`."""
    rows = np.loadtxt(gzip.decompress(asset("digits").read_bytes()).decode().splitlines(), delimiter=",")
    return (rows[:, :64].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), rows[:, 64].astype(int)


def digit_pools(part: str) -> dict[int, np.ndarray]:
    """digit -> places of its pictures among those of a part."""
    labels = digits()[1]
    border = len(labels) - NUM_TEST_DIGITS
    places = np.arange(border) if part == "train" else np.arange(border, len(labels))
    return {digit: places[labels[places] == digit] for digit in range(10)}


def write_digit(
    picture: Image.Image, digit: np.ndarray, box: tuple[float, float, float, float], random: np.random.Generator
) -> None:
    """Draw a digit, uint8 ink, as large as the box allows, up to a jitter; in white ink if the paper is dark."""
    left, top, right, bottom = box
    side = round(min(right - left, bottom - top) * random.uniform(0.8, 1.0))
    mask = Image.fromarray(digit).resize((side, side), Image.BICUBIC)
    column = round(random.uniform(left, right - side))
    row = round(random.uniform(top, bottom - side))
    ink = 255 - picture.getpixel((0, 0))[0]
    picture.paste((ink, ink, ink), (column, row), mask)


def paper(size: int, random: np.random.Generator) -> Image.Image:
    """An empty picture, nearly black or nearly white."""
    shade = int(random.integers(0, 50))
    shade = 255 - shade if random.random() < 0.5 else shade
    return Image.new("RGB", (size, size), (shade, shade, shade))


def write_row(picture: Image.Image, row: Sequence[np.ndarray], random: np.random.Generator) -> None:
    """Digits side by side, in the middle."""
    side = picture.width / len(row)
    top = (picture.height - side) / 2
    for column, digit in enumerate(row):
        write_digit(picture, digit, (column * side, top, (column + 1) * side, top + side), random)


def ocr(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    pools = {str(digit): places for digit, places in digit_pools(part).items()}
    for answer, place in pick_balanced(pools, count, random):
        picture = paper(size, random)
        write_digit(picture, digits()[0][place], (0, 0, size, size), random)
        question = "Which digit is written here?"
        yield Item(image=np.asarray(picture), question=question, answer=answer, metadata={"digits": [int(place)]})


def math(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    places = digit_pools(part)
    pairs = [(one, other) for one in range(10) for other in range(10)]
    pools = {
        "left": [pair for pair in pairs if pair[0] - pair[1] >= MARGIN],
        "right": [pair for pair in pairs if pair[1] - pair[0] >= MARGIN],
    }
    for answer, pair in pick_balanced(pools, count, random, repeat=True):
        picture = paper(size, random)
        chosen = [int(random.choice(places[digit])) for digit in pair]
        write_row(picture, [digits()[0][place] for place in chosen], random)
        question = "Which of the two numbers is larger, the left or the right one?"
        yield Item(image=np.asarray(picture), question=question, answer=answer, metadata={"digits": chosen})


# -- counting: nuclei in a crop; split by rows of the micrograph

ROWS = {"train": (0, 341), "test": (345, 512)}
CROP, STEP = 96, 3  # pixels
# 3 and 6 are left out: a miscount by one, of a nucleus at the rim, never gives another answer
COUNTS = {"few": range(0, 3), "some": range(4, 6), "many": range(7, 100)}


@functools.cache
def micrograph() -> tuple[np.ndarray, np.ndarray]:
    """Brightness uint8 `[512, 512]`, dark nuclei lifted, and the number of the nucleus of each pixel."""
    with Image.open(asset("nuclei-image")) as picture:
        raw = np.asarray(picture).astype(np.float64)
    with Image.open(asset("nuclei-mask")) as picture:
        mask = np.asarray(picture).astype(np.int64)
    low, high = np.percentile(raw, (1, 99))
    return (np.clip((raw - low) / (high - low), 0, 1) ** 0.5 * 255).astype(np.uint8), mask


@functools.cache
def count_nuclei(row: int, column: int, side: int = CROP) -> int | None:
    """Nuclei of the crop with this corner, at least 60 % in it; None if one is neither in nor out (15 to 60 %)."""
    mask = micrograph()[1]
    inside = np.bincount(mask[row : row + side, column : column + side].ravel(), minlength=len(_areas()))
    share = inside[1:] / np.maximum(_areas()[1:], 1)
    if ((share > 0.15) & (share < 0.6)).any():
        return None
    return int((share >= 0.6).sum())


@functools.cache
def _areas() -> np.ndarray:
    return np.bincount(micrograph()[1].ravel())


def nuclei_crops(
    part: str, counts: dict[str, Sequence[int]], sides: Sequence[int] = (CROP,)
) -> dict[str, list[tuple[int, int, int, int]]]:
    """answer -> row, column, side and number of nuclei of every crop of a part that has one of the answer's counts."""
    first, last = ROWS[part]
    pools: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in counts}
    for side in sides:
        for row in range(first, last - side + 1, STEP):
            for column in range(0, micrograph()[0].shape[1] - side + 1, STEP):
                number = count_nuclei(row, column, side)
                for name, numbers in counts.items():
                    if number in numbers:
                        pools[name].append((row, column, side, number))
    return pools


def nuclei_item(
    question: str, answer: str, where: tuple[int, int, int, int], size: int, random: np.random.Generator
) -> Item:
    """A crop, turned, perhaps flipped, brighter or darker."""
    row, column, side, number = where
    crop = micrograph()[0][row : row + side, column : column + side]
    turns, is_flipped = int(random.integers(4)), bool(random.random() < 0.5)
    crop = np.rot90(crop, turns)
    crop = np.clip((crop[:, ::-1] if is_flipped else crop) * random.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.BILINEAR).convert("RGB")
    metadata = {"row": row, "column": column, "side": side, "number": number, "turns": turns, "flip": is_flipped}
    return Item(image=np.asarray(picture), question=question, answer=answer, metadata=metadata)


def counting(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    question = "How many cell nuclei are here, few (up to 2), some (4 or 5) or many (7 or more)?"
    for answer, where in pick_balanced(nuclei_crops(part, COUNTS), count, random, repeat=True):
        yield nuclei_item(question, answer, where, size, random)


# -- GUI: what a button does; split by icon family

ACTIONS = {
    "print": (("printer", "printer-outline", "printer-pos"), ("print",)),
    "save": (("content-save", "content-save-outline", "floppy"), ("floppy-disk",)),
    "search": (("magnify", "magnify-expand", "text-search"), ("magnifying-glass",)),
    "delete": (("delete", "trash-can", "delete-outline", "trash-can-outline"), ("trash", "trash-can")),
    "lock": (("lock", "lock-outline"), ("lock",)),
    "call": (("phone", "phone-outline", "phone-classic"), ("phone", "phone-flip")),
    "mail": (("email", "email-outline", "email-variant"), ("envelope", "envelope-open")),
    "configure": (("cog", "cog-outline"), ("gear",)),
}
FAMILIES = {"train": "material", "test": "fontawesome"}


def gui(part: str, count: int, size: int, random: np.random.Generator) -> Iterator[Item]:
    family = FAMILIES[part]
    pools = {name: designs[part == "test"] for name, designs in ACTIONS.items()}
    for answer, icon in pick_balanced(pools, count, random, repeat=True):
        yield Item(
            image=_button(family, icon, size, random),
            question="What does this button do?",
            answer=answer,
            metadata={"family": family, "icon": icon},
        )


def theme(random: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """Colours of background, button and icon, light or dark."""
    is_dark = random.random() < 0.5
    bounds = ((18, 70), (60, 120), (215, 256)) if is_dark else ((215, 256), (170, 230), (0, 70))
    return tuple(tuple(int(value) for value in random.integers(*bound, 3)) for bound in bounds)


def draw_button(picture: Image.Image, icon: Image.Image, left: float, top: float, side: float, face, ink) -> None:
    """A button with rounded corners and the icon in its middle."""
    ImageDraw.Draw(picture).rounded_rectangle((left, top, left + side, top + side), radius=side * 0.16, fill=face)
    corner = round(left + (side - icon.width) / 2), round(top + (side - icon.height) / 2)
    picture.paste(ink, corner, icon)


def _button(family: str, icon: str, size: int, random: np.random.Generator) -> np.ndarray:
    ground, face, ink = theme(random)
    picture = Image.new("RGB", (size, size), ground)
    side = size * random.uniform(0.7, 0.92)
    left, top = (random.uniform(0, size - side) for _ in range(2))
    mask = icon_mask(family, icon, round(side * random.uniform(0.6, 0.78)))
    draw_button(picture, mask, left, top, side, face, ink)
    return np.asarray(picture)


RECIPES = (
    Recipe(name="ocr", description="Reading handwritten digits.", make=ocr),
    Recipe(name="math", description="Comparing two handwritten numbers by their size.", make=math),
    Recipe(name="counting", description="Counting cell nuclei in microscope pictures.", make=counting),
    Recipe(name="gui", description="Buttons of graphical user interfaces and what they do.", make=gui),
)

load = loader(__name__, "pocket-ability", RECIPES, NOTE)
