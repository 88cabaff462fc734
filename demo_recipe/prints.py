"""Pictures of words in other fonts than `words` has, and in lower case, letter by letter.

They are asked about as the pictures of `words` are, in families of their own.
"""

from __future__ import annotations

import string
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from demo_recipe import word_questions
from demo_recipe.draw import COLOR_NAMES, sample_rgb
from demo_recipe.fonts import compute_cap_share, find_size, measure_text, sample_font, write_text
from demo_recipe.items import Box, Glyph, LabeledPicture, Turn, TurnMaker
from demo_recipe.lettering import MEASURE, compute_luminance
from demo_recipe.lexicon import HELD_OUT, TRAINED
from demo_recipe.questions import pick
from demo_recipe.word_questions import Line, WordsPage

KINDS = tuple(string.ascii_lowercase)

SMALLEST_CAP = 14  # pixels of a capital letter's height where the long side has MEASURE
_LARGEST_CAP = 60
_CONTRAST = 100  # least difference of luminance between text and ground


def sample(
    rng: np.random.Generator, size: tuple[int, int], heldout: bool = False
) -> LabeledPicture:
    """A picture of `size` (width, height) pixels with a line or two of print, and its turns."""
    zoom = 2 if max(size) < 200 else 1
    picture = Image.new("RGB", (size[0] * zoom, size[1] * zoom))
    width, height = picture.size
    unit = max(picture.size) / MEASURE
    count = 1 if rng.random() < 0.75 or height < 40 * unit else 2
    background, ground = _sample_ground(rng)
    picture.paste(ground, (0, 0, width, height))
    color, ink = _sample_ink(rng, background, ground)
    name = sample_font(rng)
    spacing = 0.12 * rng.random()
    lines: list[Line] = []
    glyphs: list[Glyph] = []
    slot = height / count
    for i in range(count):
        kind, text = _sample_text(rng, heldout)
        one = measure_text(text, name, 400, spacing) / 400
        largest = min(0.9 * width / one * compute_cap_share(name), 0.6 * slot, unit * _LARGEST_CAP)
        least = min(unit * SMALLEST_CAP, largest)
        cap = least + (largest - least) * rng.random() ** 1.7
        face = (name, find_size(name, 0.98 * cap), spacing)
        wide = measure_text(text, *face)
        left = (width - wide) * (0.1 + 0.8 * rng.random())
        baseline = i * slot + cap + (slot - 1.35 * cap) * (0.15 + 0.7 * rng.random())
        extents = write_text(picture, text, (left, baseline), face, ink)
        lines.append(Line(kind, text, color, tuple(Box(extent) for extent in extents)))
        glyphs += [
            Glyph(letter, extent, color, rank=rank)
            for rank, (letter, extent) in enumerate(zip(text, extents, strict=True))
        ]
    page = WordsPage(tuple(lines), background)
    if zoom > 1:
        picture = picture.reduce(zoom)
    return LabeledPicture(picture, tuple(glyphs), _make_makers(page), background)


def _make_makers(page: WordsPage) -> tuple[tuple[TurnMaker, float], ...]:
    """The makers of turns about `page`, in families of their own."""
    return tuple((partial(_ask, maker), share) for maker, share in word_questions.makers(page))


def _ask(maker: TurnMaker, rng: np.random.Generator) -> Turn:
    turn = maker(rng)
    return replace(turn, family=f"print: {turn.family}")


def _sample_text(rng: np.random.Generator, heldout: bool) -> tuple[str, str]:
    """The kind and text of a line."""
    if rng.random() < 0.12:
        digits = int(rng.integers(1, 5))
        text = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
        return "number", text
    pool = HELD_OUT if heldout else TRAINED
    word = pool[int(rng.integers(len(pool)))]
    if rng.random() < 0.3:
        letters = string.ascii_uppercase
        word = "".join(letters[int(i)] for i in rng.integers(26, size=2 + int(rng.integers(4))))
    share = rng.random()
    text = word if share < 0.25 else word.capitalize() if share < 0.5 else word.lower()
    return "word", text


def _sample_ground(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    draw = rng.random()
    name = "white" if draw < 0.6 else "black" if draw < 0.7 else pick(rng, COLOR_NAMES)
    return name, sample_rgb(rng, name)


def _sample_ink(
    rng: np.random.Generator, ground: str, behind: tuple[int, int, int]
) -> tuple[str, tuple[int, int, int]]:
    while True:
        name = "black" if rng.random() < 0.4 else pick(rng, COLOR_NAMES)
        rgb = sample_rgb(rng, name)
        if name != ground and abs(compute_luminance(rgb) - compute_luminance(behind)) > _CONTRAST:
            return name, rgb
