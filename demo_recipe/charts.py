"""Pictures of bar charts: two to five bars on an axis that always ends at ten."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo_recipe import chart_questions
from demo_recipe.chart_questions import Bar
from demo_recipe.draw import COLOR_NAMES, RGB, sample_rgb
from demo_recipe.items import Box, Extent, Glyph, LabeledPicture
from demo_recipe.lettering import (
    MEASURE,
    Face,
    compute_luminance,
    draw_text,
    measure_cap_height,
    measure_width,
    round_size,
)
from demo_recipe.questions import pick

KINDS = ("bar", *string.ascii_uppercase)

TOP = 10  # the highest value, where the plot ends
_NARROWEST = 22  # pixels from bar to bar where the long side has MEASURE
_COUNTS = (0.16, 0.28, 0.32, 0.24)  # of 2, 3, 4 and 5 bars
_APART = 75  # least distance of two bars' colors
_SEEN = 100  # least distance of a bar's color from the background


@dataclass(frozen=True)
class Plot:
    """Where bars may stand, in pixels: `bottom` is the axis, `top` the line of the value TOP."""

    left: int
    top: int
    right: int
    bottom: int

    def height_of(self, value: int) -> int:
        """The y of the line of `value`."""
        return round(self.bottom - (self.bottom - self.top) * value / TOP)


def sample(rng: np.random.Generator, size: tuple[int, int]) -> LabeledPicture:
    """A picture of `size` (width, height) pixels with a bar chart, and its turns."""
    width, height = size
    unit = max(size) / MEASURE
    cap = min(unit * 14 + rng.random() * max(0.0, 0.11 * height - unit * 14), 0.18 * height)
    most = max(2, min(5, int(0.88 * width / (_NARROWEST * unit))))
    weights = np.array(_COUNTS[: most - 1])
    count = 2 + int(rng.choice(len(weights), p=weights / weights.sum()))
    plot = Plot(
        left=round(width * (0.03 + 0.06 * rng.random())),
        top=round(height * (0.03 + 0.05 * rng.random())),
        right=round(width * (0.97 - 0.04 * rng.random())),
        bottom=round(height - 1.25 * cap - unit * (3 + 3 * rng.random())),
    )
    background = _sample_background(rng)
    picture = Image.new("RGB", size, background[1])
    _draw_grid(rng, picture, plot, background[1])
    colors = _sample_colors(rng, background, count)
    extents = _draw_bars(rng, picture, plot, colors, sample_values(rng, count))
    letters = _sample_letters(rng, count)
    under = _write_letters(rng, picture, plot, letters, (cap, _pick_contrast(background[1])))
    bars = tuple(
        Bar(letter, name, value, Box(extent), Box(place))
        for letter, (name, _), (extent, value), place in zip(
            letters, colors, extents, under, strict=True
        )
    )
    return LabeledPicture(picture, _make_glyphs(bars), chart_questions.makers(bars), background[0])


def _make_glyphs(bars: tuple[Bar, ...]) -> tuple[Glyph, ...]:
    glyphs = []
    for i, bar in enumerate(bars):
        glyphs += [
            Glyph("bar", bar.box.extent, bar.color, rank=i, total=len(bars), value=bar.value),
            Glyph(bar.letter, bar.letter_box.extent, rank=i),
        ]
    return tuple(glyphs)


def sample_values(rng: np.random.Generator, count: int, most: int = TOP) -> list[int]:
    """`count` values up to `most` of which one alone is the highest, and one alone the lowest."""
    while True:
        values = [int(value) for value in rng.integers(1, most + 1, size=count)]
        if values.count(max(values)) == values.count(min(values)) == 1:
            return values


def _sample_letters(rng: np.random.Generator, count: int) -> str:
    """`count` different letters: A, B, C and so on, or a later run, or any."""
    draw = rng.random()
    if draw < 0.4:
        return string.ascii_uppercase[:count]
    if draw < 0.55:
        start = int(rng.integers(26 - count))
        return string.ascii_uppercase[start : start + count]
    return "".join(string.ascii_uppercase[i] for i in rng.permutation(26)[:count])


def _sample_background(rng: np.random.Generator) -> tuple[str, RGB]:
    draw = rng.random()
    name = "white" if draw < 0.65 else "black" if draw < 0.8 else pick(rng, COLOR_NAMES)
    return name, sample_rgb(rng, name)


def _sample_colors(
    rng: np.random.Generator, background: tuple[str, RGB], count: int
) -> list[tuple[str, RGB]]:
    """Names and colors of `count` bars, each far from the others and from the background."""
    colors: list[tuple[str, RGB]] = []
    while len(colors) < count:
        name = pick(rng, COLOR_NAMES)
        rgb = sample_rgb(rng, name)
        fresh = name not in (background[0], *(other for other, _ in colors))
        apart = all(_compute_distance(rgb, other) > _APART for _, other in colors)
        if fresh and apart and _compute_distance(rgb, background[1]) > _SEEN:
            colors.append((name, rgb))
    return colors


def _compute_distance(one: RGB, other: RGB) -> float:
    return float(np.linalg.norm(np.subtract(one, other)))


def _mix(one: RGB, other: RGB, share: float) -> RGB:
    """A color `share` of the way from `one` to `other`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _pick_contrast(rgb: RGB) -> RGB:
    """Black or white, whichever is better seen on `rgb`."""
    return (0, 0, 0) if compute_luminance(rgb) > 120 else (255, 255, 255)


def _draw_grid(rng: np.random.Generator, picture: Image.Image, plot: Plot, ground: RGB) -> None:
    """Thin lines at each unit or each second one, stronger at five and ten, and the axes."""
    pen = ImageDraw.Draw(picture)
    thick = max(1, round(max(picture.size) / MEASURE))
    strong = _pick_contrast(ground)
    step = 1 if rng.random() < 0.65 else 2
    faint = 0.12 + 0.1 * rng.random()
    half = rng.random() < 0.5 and step == 1
    for value in range(step, TOP + 1, step):
        share = faint * 2 if half and value % 5 == 0 else faint
        y = plot.height_of(value)
        pen.line((plot.left, y, plot.right, y), _mix(ground, strong, share), thick)
    axis = _mix(ground, strong, 0.6 + 0.4 * rng.random())
    if rng.random() < 0.6:
        pen.line((plot.left, plot.top, plot.left, plot.bottom), axis, thick)
    pen.rectangle((plot.left, plot.bottom, plot.right, plot.bottom + thick - 1), axis)


def _draw_bars(
    rng: np.random.Generator,
    picture: Image.Image,
    plot: Plot,
    colors: list[tuple[str, RGB]],
    values: list[int],
) -> list[tuple[Extent, int]]:
    """The extent of each bar with its value."""
    pen = ImageDraw.Draw(picture)
    width, height = picture.size
    pitch = (plot.right - plot.left) / len(values)
    wide = max(3, round(pitch * (0.5 + 0.3 * rng.random())))
    edge = (0, 0, 0) if rng.random() < 0.15 else None
    extents = []
    for i, ((_, rgb), value) in enumerate(zip(colors, values, strict=True)):
        left = round(plot.left + pitch * (i + 0.5) - wide / 2)
        top = plot.height_of(value)
        pen.rectangle((left, top, left + wide - 1, plot.bottom - 1), rgb, edge)
        extent = (left / width, top / height, (left + wide) / width, plot.bottom / height)
        extents.append((extent, value))
    return extents


def _write_letters(
    rng: np.random.Generator,
    picture: Image.Image,
    plot: Plot,
    letters: str,
    look: tuple[float, RGB],
) -> list[Extent]:
    """The extents of the letters, each under the middle of its bar; `look` is height and color."""
    cap, rgb = look
    size = round_size(cap / measure_cap_height())
    face = Face(size, stroke=int(size > 18 and rng.random() < 0.5), spacing=0.0)
    pitch = (plot.right - plot.left) / len(letters)
    bottom = picture.height - 0.2 * cap  # room for the tail of a Q
    extents = []
    for i, letter in enumerate(letters):
        left = plot.left + pitch * (i + 0.5) - measure_width(letter, face) / 2
        extents += draw_text(picture, letter, (left, bottom), face, rgb)
    return extents
