"""Pictures in terminals that show them: iTerm2's, Kitty's and the Sixel protocol."""

from __future__ import annotations

import base64
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_smolvlm.cli.terminal.device import Graphics, can_edit, cell_size, graphics

if TYPE_CHECKING:
    from PIL import Image

    from mlx_smolvlm.video import Clip

COLUMNS, ROWS = 48, 10  # what a thumbnail takes at most
_KITTY_CHUNK = 4096  # characters of base64 in one escape sequence
_COLOURS = 255  # of a Sixel picture


class Thumbnails:
    """Shows pictures on the terminal that stderr is; nothing where that is not possible."""

    def __init__(self, wanted: bool) -> None:
        self._graphics: Graphics | None = None if wanted else "none"

    def show(self, picture: Image.Image) -> None:
        """Put a small `picture` on the terminal."""
        self._show([picture])

    def show_clip(self, clip: Clip) -> None:
        """Put the first, the middle and the last frame of `clip` there, side by side.

        Raises:
            MediaError: It cannot be decoded.
        """
        if self._protocol() != "none":
            places = sorted({0, len(clip.indices) // 2, len(clip.indices) - 1})
            shown = replace(clip, indices=tuple(clip.indices[place] for place in places))
            self._show([frame.picture for frame in shown.frames()])

    def _show(self, pictures: Sequence[Image.Image]) -> None:
        protocol = self._protocol()
        if protocol != "none":
            text = encoded(thumbnail(pictures), protocol)
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _protocol(self) -> Graphics:
        """How the terminal shows pictures; found out when the first one is to be shown."""
        if self._graphics is None:
            able = can_edit() and sys.stderr.isatty()
            self._graphics = graphics(os.environ) if able else "none"
        return self._graphics


def thumbnail(pictures: Sequence[Image.Image]) -> Image.Image:
    """`pictures` side by side, small enough for a few lines of the terminal; never enlarged."""
    from PIL import Image

    width, height = cell_size()
    small = [_fitted(one, COLUMNS * width // len(pictures), ROWS * height) for one in pictures]
    sheet = Image.new("RGB", (sum(one.width for one in small), max(one.height for one in small)))
    edges = itertools.accumulate((one.width for one in small), initial=0)
    for edge, one in zip(edges, small, strict=False):
        sheet.paste(one, (edge, 0))
    return sheet


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`picture`, which is RGB, no larger than that."""
    scale = min(1.0, width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, reducing_gap=2.0)


def encoded(picture: Image.Image, protocol: Graphics) -> str:
    """What makes a terminal show `picture`, which is RGB."""
    if protocol == "sixel":
        return "".join(_sixel(picture))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if protocol == "kitty":
        return "".join(_kitty(data))
    size = f"width={picture.width}px;height={picture.height}px"
    return f"\x1b]1337;File=inline=1;size={len(file.getvalue())};{size}:{data}\x07"


def _kitty(data: str) -> Iterator[str]:
    """The escape sequences that carry a PNG in base64.

    Source: https://sw.kovidgoyal.net/kitty/graphics-protocol (a: transmit and show, f: PNG,
    q: no answer, m: more follows).
    """
    starts = range(0, len(data), _KITTY_CHUNK)
    for start in starts:
        keys = "a=T,f=100,q=2," if start == 0 else ""
        more = int(start + _KITTY_CHUNK < len(data))
        yield f"\x1b_G{keys}m={more};{data[start : start + _KITTY_CHUNK]}\x1b\\"


def _sixel(picture: Image.Image) -> Iterator[str]:
    """The Sixel form: bands of six rows, in each a pass for every colour in it.

    Source: VT330/VT340 Programmer Reference Manual, chapter 14.
    """
    image = picture.quantize(_COLOURS)
    palette, pixels = image.getpalette() or [], np.asarray(image)
    height, width = pixels.shape
    yield f'\x1bP0;1q"1;1;{width};{height}'
    for colour in np.unique(pixels).tolist():
        red, green, blue = (round(v / 2.55) for v in palette[3 * colour : 3 * colour + 3])
        yield f"#{colour};2;{red};{green};{blue}"
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        for colour in np.unique(band).tolist():
            bits = ((band == colour) * weights).sum(axis=0)
            yield f"#{colour}{_runs(bits.tolist())}$"
        yield "-"
    yield "\x1b\\"


def _runs(bits: list[int]) -> str:
    """A pass over a band, six bits a column; four of a kind and more are counted."""
    parts = []
    for value, group in itertools.groupby(bits):
        character, count = chr(63 + value), sum(1 for _ in group)
        parts.append(character * count if count < 4 else f"!{count}{character}")
    return "".join(parts)
