"""Capital letters and digits, drawn one at a time, so that where each one is, is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from demo_recipe.draw import RGB
from demo_recipe.items import Extent

MEASURE = 192  # the long side, in pixels, at which sizes of letters are thought of


@dataclass(frozen=True)
class Face:
    """How letters look: `size` and `stroke` are in pixels, the others shares of the size.

    Attributes:
        size: The font's size.
        stroke: How much thicker than the font's own a stroke is, to each side.
        spacing: Space between letters beyond the font's own.
        narrowest: Room that a narrow letter, such as I, has at least.
    """

    size: int
    stroke: int = 0
    spacing: float = 0.1
    narrowest: float = 0.4


@dataclass(frozen=True)
class Stamp:
    """A letter's ink, as a mask, and where its top is, seen from the baseline."""

    mask: Image.Image
    top: int


@lru_cache(maxsize=64)
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=1536)
def _make_stamp(letter: str, size: int, stroke: int) -> Stamp:
    """`letter` cut out tightly."""
    margin = size + stroke
    canvas = Image.new("L", (2 * margin, 2 * margin))
    pen = ImageDraw.Draw(canvas)
    pen.text((size // 2, margin), letter, 255, _load_font(size), anchor="ls", stroke_width=stroke)
    box = canvas.getbbox()
    assert box is not None, letter
    return Stamp(canvas.crop(box), box[1] - margin)


@lru_cache(maxsize=64)
def _measure_advance(letter: str) -> float:
    """How far the pen moves on, as a share of the size."""
    return _load_font(200).getlength(letter) / 200


@lru_cache(maxsize=1)
def measure_cap_height() -> float:
    """The height of a capital letter, as a share of the size."""
    return _make_stamp("H", 200, 0).mask.height / 200


def round_size(pixels: float) -> int:
    """`pixels` rounded down to one of the sizes that are kept in store; at least 6."""
    step = 1 if pixels < 40 else 2 if pixels < 80 else 6
    return max(6, int(pixels) // step * step)


def measure_width(text: str, face: Face) -> float:
    """The width of `text` in pixels."""
    return (
        face.size * sum(_measure_room(letter, face) for letter in text) - face.size * face.spacing
    )


def draw_text(
    picture: Image.Image, text: str, at: tuple[float, float], face: Face, rgb: RGB
) -> list[Extent]:
    """The tight extent of each letter of `text`, written from `at` on the baseline."""
    x, baseline = at
    extents = []
    for letter in text:
        room = (_measure_room(letter, face) - face.spacing) * face.size
        stamp = _make_stamp(letter, face.size, face.stroke)
        left = round(x + (room - stamp.mask.width) / 2)
        top = round(baseline) + stamp.top
        picture.paste(rgb, (left, top), stamp.mask)
        right, bottom = left + stamp.mask.width, top + stamp.mask.height
        extents.append(_make_extent(picture, (left, top, right, bottom)))
        x += room + face.spacing * face.size
    return extents


def compute_luminance(rgb: RGB) -> float:
    """How bright `rgb` is to the eye, 0 to 255."""
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _measure_room(letter: str, face: Face) -> float:
    return max(_measure_advance(letter), face.narrowest) + face.spacing


def _make_extent(picture: Image.Image, box: tuple[int, int, int, int]) -> Extent:
    """`box` in shares of the picture; a letter that leaves the picture is a fault."""
    left, top, right, bottom = box
    width, height = picture.size
    assert 0 <= left < right <= width, (box, picture.size)
    assert 0 <= top < bottom <= height, (box, picture.size)
    return left / width, top / height, right / width, bottom / height
