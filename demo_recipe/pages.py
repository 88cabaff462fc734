"""Pictures of small printed pages: a title, lines of text, lists and tables.

Every element fills a rectangle of a division of the page into 20 x 20, so that its location
in DocTags is a multiple of 25 and can be told from the picture. Words are printed letter by
letter, with a little more space than usual.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from demo_recipe.draw import RGB, sample_rgb
from demo_recipe.items import Glyph, LabeledPicture
from demo_recipe.page_layout import UNITS, Element, Page, Word, lay_out
from demo_recipe.page_print import draw_letter
from demo_recipe.page_questions import TAGS as TAGS
from demo_recipe.page_questions import makers

KINDS: tuple[str, ...] = (*string.ascii_uppercase, *string.digits, "bullet", "rule")

_INKS = ("black", "black", "black", "black", "blue", "red", "purple")


@dataclass
class _Canvas:
    """A page on its way to a picture: what is drawn, and what has been labelled."""

    picture: Image.Image
    rgb: RGB
    color: str
    glyphs: list[Glyph] = field(default_factory=list)

    def label(self, kind: str, box: tuple[int, int, int, int], rank: int = -1) -> None:
        """Notes that `kind` has been drawn at `box`, in pixels."""
        width, height = self.picture.size
        extent = box[0] / width, box[1] / height, box[2] / width, box[3] / height
        self.glyphs.append(Glyph(kind, extent, color=self.color, rank=rank))


def sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels of a page: mostly upright, about 3 to 4."""
    long_side = round(192 * np.exp(rng.random() ** 1.5 * np.log(640 / 192)))
    short_side = round(long_side * rng.uniform(0.7, 1.0))
    return (short_side, long_side) if rng.random() < 0.85 else (long_side, short_side)


def sample(rng: np.random.Generator, size: tuple[int, int]) -> LabeledPicture:
    """A page of `size` (width, height) pixels and who asks about it; it follows from `rng`."""
    page = lay_out(rng, size)
    picture, glyphs = render(rng, page)
    return LabeledPicture(picture, glyphs, makers(page), "white")


def render(rng: np.random.Generator, page: Page) -> tuple[Image.Image, tuple[Glyph, ...]]:
    """The picture of `page`, dark on nearly white, and its labels."""
    name = str(rng.choice(_INKS))
    white: RGB = (255, 255, 255) if rng.random() < 0.5 else sample_rgb(rng, "white")
    canvas = _Canvas(Image.new("RGB", page.size, white), sample_rgb(rng, name), name)
    shaded = bool(rng.random() < 0.5)
    for element in page.elements:
        if element.kind == "table":
            _draw_table(canvas, element, shaded)
        for word in element.words:
            _draw_word(canvas, word)
        if element.kind == "list_item":
            _draw_bullet(canvas, element)
    return canvas.picture, tuple(canvas.glyphs)


def _draw_word(canvas: _Canvas, word: Word) -> None:
    """Prints a word; a letter's rank is its place in the word."""
    for rank, (character, box) in enumerate(zip(word.text, word.letters, strict=True)):
        mask = draw_letter(character, word.print).mask
        canvas.picture.paste(canvas.rgb, box[:2], mask)
        canvas.label(character, box, rank)


def _draw_bullet(canvas: _Canvas, element: Element) -> None:
    """A dot at the left end of a list item."""
    assert element.bullet is not None
    left, top, right, bottom = element.bullet
    side = 4 * (right - left)  # drawn large and reduced, for a smooth edge
    dot = Image.new("L", (side, side))
    ImageDraw.Draw(dot).ellipse((0, 0, side - 1, side - 1), fill=255)
    canvas.picture.paste(canvas.rgb, (left, top), dot.reduce(4))
    canvas.label("bullet", (left, top, right, bottom))


def _draw_table(canvas: _Canvas, element: Element, shaded: bool) -> None:
    """The rules of a table, and the shade of its header."""
    pen = ImageDraw.Draw(canvas.picture)
    width, height = canvas.picture.size
    thick = max(1, round(max(width, height) / 192))
    x0, y0, x1, y1 = element.box
    columns, rows = len(element.rows[0]), len(element.rows)
    xs = [round(width * (x0 + (x1 - x0) * i / columns) / UNITS) for i in range(columns + 1)]
    ys = [round(height * (y0 + (y1 - y0) * i / rows) / UNITS) for i in range(rows + 1)]
    if shaded:
        pen.rectangle((xs[0], ys[0], xs[-1] - 1, ys[1] - 1), fill=(222, 222, 222))
    for x in xs:
        left = min(x, xs[-1] - thick)
        pen.rectangle((left, ys[0], left + thick - 1, ys[-1] - 1), fill=canvas.rgb)
    for y in ys:
        top = min(y, ys[-1] - thick)
        pen.rectangle((xs[0], top, xs[-1] - 1, top + thick - 1), fill=canvas.rgb)
    canvas.label("rule", (xs[0], ys[0], xs[-1], ys[-1]))
