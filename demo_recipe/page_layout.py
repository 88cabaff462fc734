"""What stands on a page and where: elements in a division of the page into 20 x 20."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

import numpy as np

from demo_recipe.items import Extent
from demo_recipe.lexicon import HELD_OUT, TRAINED
from demo_recipe.page_print import PixelBox, Print, measure_text, place_letters

UNITS = 20  # a page is this many units wide and high; a unit is 25 of DocTags' 500
_ROOM = UNITS - 2  # without the margins

_WORDS = {n: tuple(word for word in TRAINED if len(word) == n) for n in range(2, 6)}
_PLANS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("title", "text"), 0.16), (("title", "list"), 0.16), (("title", "table"), 0.12),
    (("title", "text", "text"), 0.08), (("title", "text", "list"), 0.06), (("title",), 0.04),
    (("text",), 0.04), (("text", "text"), 0.04), (("text", "list"), 0.04), (("list",), 0.05),
    (("table",), 0.21),
)  # fmt: skip


@dataclass(frozen=True)
class Word:
    """A printed word with the boxes of its letters, in pixels."""

    text: str
    letters: tuple[PixelBox, ...]
    print: Print


@dataclass(frozen=True)
class Element:
    """One piece of a page.

    Attributes:
        kind: "title", "text", "list_item" or "table".
        box: Left, top, right, bottom in units of the page.
        rows: The words; a table's row by row, the first of them its header. Others have one row.
        bullet: The dot of a list item, in pixels.
    """

    kind: str
    box: tuple[int, int, int, int]
    rows: tuple[tuple[Word, ...], ...]
    bullet: PixelBox | None = None

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in reading order."""
        return tuple(word for row in self.rows for word in row)

    @property
    def extent(self) -> Extent:
        """Where it is, as shares of the page."""
        left, top, right, bottom = (edge / UNITS for edge in self.box)
        return left, top, right, bottom


@dataclass(frozen=True)
class Page:
    """A page of `size` pixels; list items that follow each other are one list."""

    size: tuple[int, int]
    elements: tuple[Element, ...]

    def of(self, kind: str) -> tuple[Element, ...]:
        """The elements of `kind`."""
        return tuple(element for element in self.elements if element.kind == kind)

    def extent(self, box: PixelBox) -> Extent:
        """`box` as shares of the page."""
        width, height = self.size
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height


@dataclass(frozen=True)
class _Frame:
    """The measures of a page: its size and its prints, in pixels; the left margin in units."""

    size: tuple[int, int]
    body: Print
    title: Print
    cells: Print
    left: int

    @property
    def unit(self) -> tuple[float, float]:
        """Width and height of a unit in pixels."""
        return self.size[0] / UNITS, self.size[1] / UNITS

    def units(self, pixels: float) -> int:
        """How many units hold a height of `pixels`."""
        return math.ceil(pixels / self.unit[1] - 0.05)

    def heights(self) -> dict[str, int]:
        """Height of a line of each kind of element, in units."""
        line, row = self.units(1.45 * self.body.cap), self.units(1.75 * self.cells.cap)
        title = self.units(1.36 * self.title.cap)
        return {"title": title, "text": line, "list_item": line, "table": row}


def lay_out(rng: np.random.Generator, size: tuple[int, int]) -> Page:
    """A page of `size` pixels with one to five lines; it follows from `rng`."""
    frame = _sample_frame(rng, size)
    heights = frame.heights()
    plan = _PLANS[int(rng.choice(len(_PLANS), p=[weight for _, weight in _PLANS]))][0]
    stack = [_sample_lines(rng, kind) for kind in plan]
    while sum(heights[kind] * count + 1 for kind, count in stack) - 1 > _ROOM:
        kind, count = stack[-1]
        if count > (2 if kind == "table" else 1):
            stack[-1] = (kind, count - 1)
        else:
            stack.pop()
    slack = _ROOM + 1 - sum(heights[kind] * count + 1 for kind, count in stack)
    top = 1 + int(rng.integers(min(slack, 2) + 1))
    slack -= top - 1
    elements: list[Element] = []
    for kind, count in stack:
        elements += _lay_out_element(rng, frame, (kind, count), top)
        gap = 1 + int(rng.random() < 0.3 and slack > 0)
        slack -= gap - 1
        top += heights[kind] * count + gap
    return Page(size, tuple(elements))


def _sample_frame(rng: np.random.Generator, size: tuple[int, int]) -> _Frame:
    """Prints of a legible size; small pictures have larger ones."""
    (width, height), scale = size, max(size) / 192
    body = min(max(scale * rng.uniform(22, 27), 15), 0.32 * height, width / 5.3)
    title = min(body * rng.uniform(1.3, 1.45), 0.36 * height)
    cells = min(max(scale * rng.uniform(20.5, 23.5), 14), 0.3 * height, width / 6.2)
    bold = Print(round(title), max(1, round(0.04 * title)))
    return _Frame(size, Print(round(body)), bold, Print(round(cells)), 1 + int(rng.integers(2)))


def _sample_lines(rng: np.random.Generator, kind: str) -> tuple[str, int]:
    """The kind of the lines of a piece of the plan, and how many they are."""
    if kind in ("title", "text"):
        return kind, 1
    return ("list_item" if kind == "list" else kind), 2 + int(rng.integers(2))


def _lay_out_element(
    rng: np.random.Generator, frame: _Frame, lines: tuple[str, int], top: int
) -> list[Element]:
    """The elements of one piece of the plan, from `top` units downwards."""
    kind, count = lines
    height = frame.heights()[kind]
    if kind == "table":
        return [_lay_out_table(rng, frame, count, top)]
    return [_lay_out_line(rng, frame, kind, top + i * height) for i in range(count)]


def _lay_out_line(rng: np.random.Generator, frame: _Frame, kind: str, top: int) -> Element:
    """A title, a text of one or two words, or a list item; as wide as its print asks for."""
    style = frame.title if kind == "title" else frame.body
    (unit, _), height = frame.unit, frame.heights()[kind]
    indent = 0.75 * style.size if kind == "list_item" else 0.0
    pad = 0.15 * style.size
    room = (UNITS - 1 - frame.left) * unit - 2 * pad - indent
    space = 0.55 * style.size
    count = 2 if kind == "text" and rng.random() < 0.4 else 1
    while True:
        texts = [_sample_text(rng, kind, 5 if count == 1 else 3) for _ in range(count)]
        natural = sum(measure_text(text, style) for text in texts) + space * (count - 1)
        if natural <= room:
            break
        if rng.random() < 0.1:
            count = 1
    wide = max(1, math.ceil((natural + 2 * pad + indent) / unit - 0.35))
    box = (frame.left, top, min(frame.left + wide, UNITS - 1), top + height)
    left, right = box[0] * unit + pad + indent, box[2] * unit - pad
    stretch = (right - left - space * (count - 1)) / (natural - space * (count - 1))
    baseline = (box[1] + box[3]) / 2 * frame.unit[1] + style.cap / 2
    words = []
    for text in texts:
        end = left + measure_text(text, style) * stretch
        words.append(Word(text, tuple(place_letters(text, style, left, end, baseline)), style))
        left = end + space
    bullet = None
    if indent:
        side = max(3, round(0.34 * style.size))
        x, y = round(box[0] * unit + pad), round(baseline - style.cap / 2 - side / 2)
        bullet = (x, y, x + side, y + side)
    return Element(kind, box, (tuple(words),), bullet)


def _lay_out_table(rng: np.random.Generator, frame: _Frame, rows: int, top: int) -> Element:
    """A ruled table of two or three columns, each as wide as the longest word asks for."""
    style, (unit, tall) = frame.cells, frame.unit
    columns = 2 if rows == 3 and rng.random() < 0.6 else 2 + int(rng.integers(2))
    most = (UNITS - 1 - frame.left) // columns
    longest = max(1, min(3, int((most * unit - 0.5 * style.size) / (0.78 * style.size))))
    room = longest * 0.78 * style.size
    wide = min(most, math.ceil((room + 0.5 * style.size) / unit) + int(rng.integers(2)))
    height = frame.heights()["table"]
    grid = []
    for row in range(rows):
        cells = []
        for column in range(columns):
            kind = "header" if row == 0 else "cell"
            text = _sample_text(rng, kind, longest)
            while measure_text(text, style) > wide * unit - 0.4 * style.size:
                text = _sample_text(rng, kind, longest)
            left = (frame.left + column * wide) * unit + 0.25 * style.size
            baseline = (top + (row + 0.5) * height) * tall + style.cap / 2
            placed = place_letters(text, style, left, left + measure_text(text, style), baseline)
            cells.append(Word(text, tuple(placed), style))
        grid.append(tuple(cells))
    box = (frame.left, top, frame.left + columns * wide, top + rows * height)
    return Element("table", box, tuple(grid))


def _sample_text(rng: np.random.Generator, kind: str, longest: int) -> str:
    """A word, a number or a string of letters; never a lone O or I, which look like digits."""
    numbers = {"title": 0.0, "text": 0.1, "list_item": 0.3, "header": 0.0, "cell": 0.6}[kind]
    if rng.random() < numbers:
        digits = 1 + int(rng.integers(min(longest, 3)))
        return str(rng.integers(10 ** (digits - 1), 10**digits))
    shortest = 1 if kind in ("header", "cell") or longest == 1 else 2
    length = int(rng.integers(shortest, longest + 1))
    if length in _WORDS and rng.random() < 0.6:
        return str(rng.choice(_WORDS[length]))
    letters = [c for c in string.ascii_uppercase if length > 1 or c not in "OI"]
    while True:
        drawn = "".join(rng.choice(letters, length))
        if drawn not in HELD_OUT:
            return drawn
