"""Pictures of printed words and numbers, with the place of every letter.

Three words in ten are no words at all, so that the letters have to be read.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo_recipe import word_questions
from demo_recipe.draw import COLOR_NAMES, RGB, sample_rgb
from demo_recipe.items import Box, Glyph, LabeledPicture
from demo_recipe.lettering import (
    MEASURE,
    Face,
    compute_luminance,
    draw_text,
    measure_cap_height,
    measure_width,
    round_size,
)
from demo_recipe.lexicon import HELD_OUT, TRAINED, WORDS
from demo_recipe.questions import pick
from demo_recipe.word_questions import Line, WordsPage

KINDS = (*string.ascii_uppercase, *string.digits)

SMALLEST_CAP = 18  # pixels of a capital letter's height where the long side has MEASURE
_LARGEST_CAP = 96
_CONTRAST = 90  # least difference of luminance between text and ground
_PLANS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("word",), 0.5), (("number",), 0.16), (("letter",), 0.07), (("word", "word"), 0.14),
    (("word", "number"), 0.05), (("number", "word"), 0.05), (("number", "number"), 0.03),
)  # fmt: skip
_LENGTHS = {
    "word": (0, 0.06, 0.22, 0.27, 0.25, 0.2),  # of 1, 2, ... 6 letters
    "number": (0.14, 0.3, 0.3, 0.26, 0, 0),
    "letter": (1, 0, 0, 0, 0, 0),
}
_REAL = frozenset(WORDS)


@dataclass(frozen=True)
class PlacedLine:
    """A line before it is drawn: text, look, and the left end of its baseline in pixels."""

    kind: str
    text: str
    face: Face
    at: tuple[float, float]


def sample(
    rng: np.random.Generator, size: tuple[int, int], heldout: bool = False
) -> LabeledPicture:
    """A picture of `size` (width, height) pixels with a line or two of print, and its turns.

    Args:
        heldout: Print only those words of the lexicon that training never sees.
    """
    plans, weights = zip(*_PLANS, strict=True)
    plan = plans[int(rng.choice(len(plans), p=weights))]
    laid = [_place_line(rng, size, i, plan, heldout) for i in range(len(plan))]
    signed = len(laid) == 1 and rng.random() < 0.25
    background, ground = _sample_grounds(rng, signed)
    picture = Image.new("RGB", size, background[1])
    if signed:
        _draw_sign(rng, picture, laid[0], ground[1])
    color, rgb = _sample_ink(rng, ground)
    lines: list[Line] = []
    glyphs: list[Glyph] = []
    for line in laid:
        if lines and rng.random() < 0.4:
            color, rgb = _sample_ink(rng, ground)
        extents = draw_text(picture, line.text, line.at, line.face, rgb)
        lines.append(Line(line.kind, line.text, color, tuple(Box(one) for one in extents)))
        glyphs += [
            Glyph(letter, extent, color, rank=i)
            for i, (letter, extent) in enumerate(zip(line.text, extents, strict=True))
        ]
    page = WordsPage(tuple(lines), ground[0], "sign" if signed else "background")
    makers = word_questions.makers(page)
    return LabeledPicture(picture, tuple(glyphs), makers, None if signed else background[0])


def _place_line(
    rng: np.random.Generator,
    size: tuple[int, int],
    index: int,
    plan: tuple[str, ...],
    heldout: bool,
) -> PlacedLine:
    """Line `index` of `plan`, with a text that fits into its share of the picture's height."""
    width, height = size
    slot = height / len(plan)
    unit = max(size) / MEASURE
    spacing, narrowest = 0.07 + 0.13 * rng.random(), 0.35 + 0.2 * rng.random()
    for tries in range(100):
        text = _sample_text(rng, plan[index], 6 - tries // 10, heldout)
        wide = measure_width(text, Face(1000, 0, spacing, narrowest)) / 1000
        room = min(
            0.88 * width / wide,
            0.68 * slot / measure_cap_height(),
            unit * _LARGEST_CAP / measure_cap_height(),
        )
        least = unit * SMALLEST_CAP / measure_cap_height()
        if room >= least:
            break
    chosen = round_size(room - max(room - least, 0.0) * rng.random() ** 1.4)
    stroke = round(chosen * 0.035 * rng.random()) if chosen > 20 else 0
    face = Face(chosen, stroke, spacing, narrowest)
    slack = width - measure_width(text, face)
    tall = measure_cap_height() * chosen
    free = slot - tall
    left = slack / 2 + (0.5 - rng.random()) * max(0.0, slack - 0.07 * width)
    middle = 0.5 if rng.random() < 0.3 else 0.2 + 0.45 * rng.random()  # a Q hangs down
    return PlacedLine(plan[index], text, face, (left, index * slot + free * middle + tall))


def _sample_text(rng: np.random.Generator, kind: str, longest: int, heldout: bool) -> str:
    """A word, number or letter of at most `longest` letters."""
    weights = np.array(_LENGTHS[kind][: max(1, longest)], float)
    if not weights.any():
        weights = np.array(_LENGTHS[kind][:2], float)
    length = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
    if kind == "letter":
        return _sample_letters(rng, 1)
    if kind == "number":
        first = rng.integers(0 if length == 1 else 1, 10)
        return "".join(map(str, (first, *rng.integers(10, size=length - 1))))
    if rng.random() < 0.7:
        pool = [word for word in (HELD_OUT if heldout else TRAINED) if len(word) == length]
        return pool[int(rng.integers(len(pool)))]
    while True:
        text = (
            _sample_syllables(rng, length) if rng.random() < 0.5 else _sample_letters(rng, length)
        )
        if text not in _REAL:
            return text


def _sample_letters(rng: np.random.Generator, length: int) -> str:
    return "".join(string.ascii_uppercase[i] for i in rng.integers(26, size=length))


def _sample_syllables(rng: np.random.Generator, length: int) -> str:
    """Consonants and vowels in turn."""
    sounds = ("BCDFGHJKLMNPQRSTVWXZ", "AEIOUY")
    start = int(rng.integers(2))
    picked = [sounds[(start + i) % 2] for i in range(length)]
    return "".join(sound[int(rng.integers(len(sound)))] for sound in picked)


def _sample_grounds(
    rng: np.random.Generator, signed: bool
) -> tuple[tuple[str, RGB], tuple[str, RGB]]:
    """Name and color of the background, and of what is right behind the text."""
    draw = rng.random()
    name = "white" if draw < 0.4 else "black" if draw < 0.5 else pick(rng, COLOR_NAMES)
    background = (name, sample_rgb(rng, name))
    if not signed:
        return background, background
    while True:
        name = pick(rng, COLOR_NAMES)
        rgb = sample_rgb(rng, name)
        if name != background[0] and _compute_contrast(rgb, background[1]) > 40:
            return background, (name, rgb)


def _sample_ink(rng: np.random.Generator, ground: tuple[str, RGB]) -> tuple[str, RGB]:
    """Name and color of a text that is well seen on `ground`."""
    while True:
        name = pick(rng, COLOR_NAMES)
        rgb = sample_rgb(rng, name)
        if name != ground[0] and _compute_contrast(rgb, ground[1]) > _CONTRAST:
            return name, rgb


def _compute_contrast(one: RGB, other: RGB) -> float:
    return abs(compute_luminance(one) - compute_luminance(other))


def _draw_sign(rng: np.random.Generator, picture: Image.Image, line: PlacedLine, rgb: RGB) -> None:
    """A plate behind `line`, a margin wider than the text on every side."""
    left, baseline = line.at
    cap = measure_cap_height() * line.face.size
    right = left + measure_width(line.text, line.face)
    across, along = (cap * (0.25 + 0.35 * rng.random()) for _ in range(2))
    box = (left - across, baseline - cap - along, right + across, baseline + along)
    pen = ImageDraw.Draw(picture)
    if rng.random() < 0.5:
        pen.rectangle(box, fill=rgb)
    else:
        pen.rounded_rectangle(box, radius=0.3 * cap, fill=rgb)
