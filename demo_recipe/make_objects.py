"""The sheet of everyday objects, drawn once from an openly licensed emoji font.

Training reads the sheet alone. `python -m demo_recipe.make_objects FONT SHEET` makes
it again from NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji 2.042).
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw, ImageFont

from demo_recipe.object_sheet import CELL, COLUMNS, EMOJI

_STRIKE = 109  # the one size in which this font holds its pictures


def make_sheet(font_path: str) -> Image.Image:
    """The objects in reading order, RGBA, each in the middle of its cell and as large as fits."""
    font = ImageFont.truetype(font_path, _STRIKE)
    rows = -(-len(EMOJI) // COLUMNS)
    picture = Image.new("RGBA", (CELL * COLUMNS, CELL * rows))
    for i, character in enumerate(EMOJI.values()):
        sprite = _make_sprite(font, character)
        left = i % COLUMNS * CELL + (CELL - sprite.width) // 2
        top = i // COLUMNS * CELL + (CELL - sprite.height) // 2
        picture.paste(sprite, (left, top))
    return picture


def _make_sprite(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One object without the empty space around it, its long side two pixels less than a cell."""
    canvas = Image.new("RGBA", (2 * _STRIKE, 2 * _STRIKE), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    sprite = canvas.crop(canvas.getchannel("A").getbbox())
    scale = (CELL - 2) / max(sprite.size)
    width, height = (round(side * scale) for side in sprite.size)
    return sprite.resize((width, height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    make_sheet(sys.argv[1]).quantize(256, dither=Image.Dither.NONE).save(sys.argv[2], optimize=True)
