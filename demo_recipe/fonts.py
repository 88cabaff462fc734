"""The fonts that come with matplotlib, and text drawn with them and with Pillow's own font.

They are read from matplotlib's folder of fonts; matplotlib itself is not imported.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo_recipe.draw import RGB
from demo_recipe.items import Extent

OWN = ""  # the font that comes with Pillow
FONTS = (
    OWN, "DejaVuSans", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10",
)  # fmt: skip


@lru_cache(maxsize=1)
def find_fonts() -> Path:
    """Return the folder of matplotlib's fonts."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the recipe needs matplotlib's fonts: pip install matplotlib")
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return one of `FONTS` at `size` pixels."""
    if name != OWN:
        return ImageFont.truetype(str(find_fonts() / f"{name}.ttf"), size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def sample_font(rng: np.random.Generator) -> str:
    """Draw one of `FONTS`."""
    return FONTS[int(rng.integers(len(FONTS)))]


@lru_cache(maxsize=64)
def compute_cap_share(name: str) -> float:
    """Return the height of a capital letter as a share of the font's size."""
    return -load_font(name, 200).getbbox("H", anchor="ls")[1] / 200


def find_size(name: str, cap: float) -> int:
    """Return the size at which capital letters are `cap` pixels high; at least 5."""
    return max(5, round(cap / compute_cap_share(name)))


def measure_text(text: str, name: str, size: int, spacing: float = 0.0) -> float:
    """Return the width of `text` in pixels; `spacing` is a share of `size` between letters."""
    return load_font(name, size).getlength(text) + spacing * size * (len(text) - 1)


def write_text(
    picture: Image.Image,
    text: str,
    at: tuple[float, float],
    face: tuple[str, int, float],
    rgb: RGB,
) -> tuple[Extent, ...]:
    """Draw `text` from `at` on the baseline, and return the extent of the ink of each letter.

    Args:
        face: The font's name and size, and the spacing of letters as a share of the size.
    """
    name, size, spacing = face
    font, pen = load_font(name, size), ImageDraw.Draw(picture)
    width, height = picture.size
    extents = []
    for i, letter in enumerate(text):
        x = at[0] + font.getlength(text[: i + 1]) - font.getlength(letter) + spacing * size * i
        pen.text((x, at[1]), letter, rgb, font, anchor="ls")
        left, top, right, bottom = font.getbbox(letter, anchor="ls")
        extents.append(
            (
                max(0.0, (x + left) / width),
                max(0.0, (at[1] + top) / height),
                min(1.0, (x + right) / width),
                min(1.0, (at[1] + bottom) / height),
            )
        )
    return tuple(extents)
