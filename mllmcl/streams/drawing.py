"""Drawing with PIL: icons from two icon fonts and SVG pictures on photographs, line, bar and candlestick charts."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..assets import asset

__all__ = ["background", "candlesticks", "icon_mask", "paste_icon", "paste_picture", "svg_picture", "weather_chart"]

SVG_WIDTH = 256  # pixels, before it is scaled
# charts are drawn this much larger, then reduced: smooth lines
OVERSAMPLE = 3


@functools.cache
def _glyphs(family: str) -> dict[str, str]:
    table = json.loads(asset(f"{family}-names").read_text())
    return {name: chr(int(code, 16)) for name, code in table.items()}


def icon_mask(family: str, name: str, size: int) -> Image.Image:
    """An icon as an 8-bit mask whose longer side is `size` pixels. family: "material" or "fontawesome"."""
    font = ImageFont.truetype(str(asset(f"{family}-font")), size * 2)
    glyph = _glyphs(family)[name]
    left, top, right, bottom = font.getbbox(glyph)
    mask = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(mask).text((-left, -top), glyph, fill=255, font=font)
    return _scaled(mask, size)


def _scaled(picture: Image.Image, size: int) -> Image.Image:
    """The picture with a longer side of `size` pixels."""
    scale = size / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.LANCZOS)


def svg_picture(path: Path, size: int) -> Image.Image:
    """An SVG file in RGBA without its empty rim, whose longer side is `size` pixels. Needs the package resvg-py."""
    return _scaled(_drawn_svg(path), size)


@functools.cache
def _drawn_svg(path: Path) -> Image.Image:
    import resvg_py

    # no fonts: what is installed on a machine must not decide a picture
    data = resvg_py.svg_to_bytes(svg_path=str(path), width=SVG_WIDTH, skip_system_fonts=True)
    with Image.open(io.BytesIO(data)) as picture:
        picture = picture.convert("RGBA")
    return picture.crop(picture.getbbox())


@functools.cache
def _photo(name: str) -> Image.Image:
    with Image.open(asset(f"photo-{name}")) as picture:
        return picture.convert("RGB")


def background(photo: str, size: int, random: np.random.Generator) -> Image.Image:
    """A random crop of a photograph, a little blurred."""
    picture = _photo(photo)
    side = int(random.integers(min(picture.size) // 3, min(picture.size)))
    left = int(random.integers(0, picture.width - side + 1))
    top = int(random.integers(0, picture.height - side + 1))
    crop = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.BILINEAR)
    return crop.filter(ImageFilter.GaussianBlur(float(random.uniform(0.5, 2.0))))


def paste_icon(picture: Image.Image, mask: Image.Image, random: np.random.Generator, turn: float = 12.0) -> Image.Image:
    """The icon in a colour that stands out, turned by up to `turn` degrees, at a random place."""
    mask, left, top = _placed(picture, mask, random, turn)
    under = np.asarray(picture.crop((left, top, left + mask.width, top + mask.height)), dtype=np.float64)
    low, high = ((200, 256), (0, 60))[int(under.mean() > 120)]
    colour = tuple(int(value) for value in random.integers(low, high, 3))
    out = picture.copy()
    out.paste(colour, (left, top), mask)
    return out


def paste_picture(
    picture: Image.Image, above: Image.Image, random: np.random.Generator, turn: float = 12.0
) -> Image.Image:
    """The RGBA picture `above`, turned by up to `turn` degrees, at a random place."""
    above, left, top = _placed(picture, above, random, turn)
    out = picture.copy()
    out.paste(above, (left, top), above)
    return out


def _placed(
    picture: Image.Image, above: Image.Image, random: np.random.Generator, turn: float
) -> tuple[Image.Image, int, int]:
    above = above.rotate(float(random.uniform(-turn, turn)), expand=True, resample=Image.BILINEAR)
    above = above.crop(above.getbbox())
    left = int(random.integers(0, max(1, picture.width - above.width + 1)))
    top = int(random.integers(0, max(1, picture.height - above.height + 1)))
    return above, left, top


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    side = size * OVERSAMPLE
    picture = Image.new("RGB", (side, side), (255, 255, 255))
    return picture, ImageDraw.Draw(picture), side


def _reduced(picture: Image.Image, size: int) -> np.ndarray:
    return np.asarray(picture.resize((size, size), Image.LANCZOS))


def weather_chart(highs: Sequence[float], rain: Sequence[float], size: int) -> np.ndarray:
    """Daily highs as a red line over daily rain as blue bars, uint8 `[size, size, 3]`."""
    picture, draw, side = _canvas(size)
    margin, middle = side // 16, side * 11 // 20
    step = (side - 2 * margin) / len(highs)
    low, span = min(highs), max(max(highs) - min(highs), 1e-6)
    points = [
        (margin + (day + 0.5) * step, middle - margin - (value - low) / span * (middle - 2 * margin))
        for day, value in enumerate(highs)
    ]
    draw.line(points, fill=(200, 30, 30), width=OVERSAMPLE * 2, joint="curve")
    top = max(max(rain), 1e-6)
    for day, value in enumerate(rain):
        height = value / top * (side - middle - 2 * margin)
        left = margin + day * step
        draw.rectangle((left, side - margin - height, left + step * 0.8, side - margin), fill=(40, 90, 200))
    draw.line((margin, side - margin, side - margin, side - margin), fill=(60, 60, 60), width=OVERSAMPLE)
    draw.line((margin, middle, side - margin, middle), fill=(190, 190, 190), width=OVERSAMPLE)
    return _reduced(picture, size)


def candlesticks(days: np.ndarray, size: int) -> np.ndarray:
    """Open, high, low, close `[n, 4]` as candles, green up and red down, uint8 `[size, size, 3]`."""
    picture, draw, side = _canvas(size)
    margin = side // 16
    low, high = float(days[:, 2].min()), float(days[:, 1].max())
    step = (side - 2 * margin) / len(days)

    def level(price: float) -> float:
        return side - margin - (price - low) / (high - low) * (side - 2 * margin)

    for day, (start, top, bottom, end) in enumerate(days):
        left = margin + day * step
        middle = left + step / 2
        colour = (30, 150, 70) if end >= start else (200, 40, 40)
        draw.line((middle, level(top), middle, level(bottom)), fill=colour, width=OVERSAMPLE)
        upper, lower = sorted((level(start), level(end)))
        draw.rectangle((left + step * 0.15, upper, left + step * 0.85, max(lower, upper + OVERSAMPLE)), fill=colour)
    return _reduced(picture, size)
