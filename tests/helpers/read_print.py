"""A reader of single printed letters by comparison, that knows nothing of how they are drawn."""

from __future__ import annotations

import string
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 24
LETTERS = string.ascii_uppercase + string.digits


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Every letter and digit, cut out and stretched to a square: (36, SIDE, SIDE), 0 to 1."""
    rows = []
    for letter in LETTERS:
        page = Image.new("L", (300, 300))
        ImageDraw.Draw(page).text((60, 60), letter, 255, ImageFont.load_default(150))
        cut = page.crop(page.getbbox()).resize((SIDE, SIDE), Image.Resampling.BOX)
        rows.append(np.asarray(cut, float) / 255)
    return np.stack(rows)


def pixels(picture: Image.Image, extent: tuple[float, ...]) -> tuple[int, int, int, int]:
    """`extent` in whole pixels, which it has to be."""
    exact = np.array(extent) * np.tile(picture.size, 2)
    assert np.abs(exact - np.round(exact)).max() < 1e-6
    left, top, right, bottom = (int(value) for value in np.round(exact))
    assert 0 <= left < right <= picture.width
    assert 0 <= top < bottom <= picture.height
    return left, top, right, bottom


def ink(picture: Image.Image, ground: tuple[int, ...]) -> np.ndarray:
    """How far each pixel is from `ground`, (height, width)."""
    return np.abs(np.asarray(picture, float) - ground).max(axis=2)


def read(marks: np.ndarray, among: str = LETTERS) -> str:
    """The letter of `among` that a tight cut of ink looks most like."""
    image = Image.fromarray((255 * marks / marks.max()).astype(np.uint8))
    seen = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), float) / 255
    errors = np.abs(_templates() - seen).mean(axis=(1, 2))
    return min(among, key=lambda letter: errors[LETTERS.index(letter)])
