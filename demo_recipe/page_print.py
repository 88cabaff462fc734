"""Letters of the font that comes with Pillow, each with the exact box of its ink."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

PixelBox = tuple[int, int, int, int]  # left, top, right, bottom

_SPACE = 0.17  # between two letters' ink, as a share of the font's size
_WIDEST = 0.36  # the same at most: letters further apart look like two words


@dataclass(frozen=True)
class Print:
    """How words are printed: the font's size in pixels, and the pen's extra width."""

    size: int
    stroke: int = 0

    @property
    def cap(self) -> float:
        """Height of a capital letter in pixels."""
        return 0.7 * self.size


@dataclass(frozen=True)
class Letter:
    """One letter's ink, and how far its top lies above the baseline in pixels."""

    mask: Image.Image
    rise: int


@lru_cache(maxsize=4096)
def draw_letter(character: str, style: Print) -> Letter:
    """The ink of `character`, without the empty space around it."""
    font = ImageFont.load_default(style.size)
    side = 2 * style.size + 8
    canvas = Image.new("L", (side, side))
    baseline = side - style.size // 2 - 4
    at = (style.size // 2, baseline)
    pen = ImageDraw.Draw(canvas)
    pen.text(at, character, fill=255, font=font, anchor="ls", stroke_width=style.stroke)
    box = canvas.point(lambda value: 255 * (value > 24)).getbbox()
    assert box is not None
    return Letter(canvas.crop(box), baseline - box[1])


def measure_text(text: str, style: Print) -> float:
    """How wide `text` is from the first letter's ink to the last one's, in pixels."""
    inks = sum(draw_letter(character, style).mask.width for character in text)
    return inks + _SPACE * style.size * (len(text) - 1)


def place_letters(
    text: str, style: Print, left: float, right: float, baseline: float
) -> list[PixelBox]:
    """The boxes of the letters of `text`, spread evenly from `left` to at most `right`."""
    inks = [draw_letter(character, style) for character in text]
    gap = 0.0
    if len(text) > 1:
        gap = (right - left - sum(ink.mask.width for ink in inks)) / (len(text) - 1)
        gap = min(gap, _WIDEST * style.size)
    placed = []
    for ink in inks:
        x, y = round(left), round(baseline) - ink.rise
        placed.append((x, y, x + ink.mask.width, y + ink.mask.height))
        left += ink.mask.width + gap
    return placed
