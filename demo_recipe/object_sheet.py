"""The sheet of everyday objects: their names, and each cut out of the picture that holds all.

The sheet is `objects.png`; its licence is in OBJECTS_LICENSE.txt.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image

# In the order of the sheet, with the character that the sheet is made from.
EMOJI: dict[str, str] = {
    "apple": "\U0001f34e", "banana": "\U0001f34c", "cup": "\u2615", "book": "\U0001f4d5",
    "car": "\U0001f697", "bus": "\U0001f68c", "bicycle": "\U0001f6b2", "airplane": "\u2708",
    "boat": "\u26f5", "cat": "\U0001f408", "dog": "\U0001f436", "fish": "\U0001f41f",
    "butterfly": "\U0001f98b", "tree": "\U0001f333", "flower": "\U0001f33b", "sun": "\u2600",
    "moon": "\U0001f319", "house": "\U0001f3e0", "key": "\U0001f511", "clock": "\u23f0",
    "umbrella": "\u2602", "ball": "\u26bd", "hat": "\U0001f3a9", "shoe": "\U0001f45f",
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(EMOJI)
CELL = 96  # of the sheet, in pixels
COLUMNS = 6

_SHEET = Path(__file__).parent / "objects.png"


@lru_cache(maxsize=1)
def load_sprites() -> dict[str, Image.Image]:
    """The objects by name, RGBA, without the empty space around them."""
    with Image.open(_SHEET, formats=["PNG"]) as sheet:
        picture = sheet.convert("RGBA")
    cut = {}
    for i, kind in enumerate(KINDS):
        left, top = i % COLUMNS * CELL, i // COLUMNS * CELL
        sprite = picture.crop((left, top, left + CELL, top + CELL))
        solid = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 40))
        cut[kind] = sprite.crop(solid.getbbox())
    return cut
