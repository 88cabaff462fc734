"""Show pictures inline on a terminal, by the iTerm2, Kitty or Sixel protocol."""

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

from mlx_smolvlm.cli.terminal.device import Graphics, can_edit, cell_size, detect_graphics

if TYPE_CHECKING:
    from PIL import Image

    from mlx_smolvlm.media.video import Clip

COLUMNS, ROWS = 48, 10  # the largest thumbnail, in characters
_KITTY_CHUNK = 4096  # characters of base64 in one escape sequence
_COLORS = 255  # of a Sixel picture


class Thumbnails:
    """Shows pictures on stderr, if it is a terminal that can show them."""

    def __init__(self, is_enabled: bool) -> None:
        self._graphics: Graphics | None = None if is_enabled else "none"

    def show(self, picture: Image.Image) -> None:
        """Show `picture`, made small."""
        self._show([picture])

    def show_clip(self, clip: Clip) -> None:
        """Show the first, the middle and the last frame of `clip` side by side.

        Raises:
            MediaError: It cannot be decoded.
        """
        if self._find_protocol() != "none":
            places = sorted({0, len(clip.indices) // 2, len(clip.indices) - 1})
            shown = replace(clip, indices=tuple(clip.indices[place] for place in places))
            self._show([frame.picture for frame in shown.read_frames()])

    def _show(self, pictures: Sequence[Image.Image]) -> None:
        """Show `pictures` side by side."""
        protocol = self._find_protocol()
        if protocol != "none":
            text = encode_picture(make_thumbnail(pictures), protocol)
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _find_protocol(self) -> Graphics:
        """Return how the terminal shows pictures; it is asked when the first one is shown."""
        if self._graphics is None:
            is_able = can_edit() and sys.stderr.isatty()
            self._graphics = detect_graphics(os.environ) if is_able else "none"
        return self._graphics


def make_thumbnail(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return `pictures` side by side, reduced to fit a few lines of the terminal."""
    from PIL import Image

    width, height = cell_size()
    small = [_shrink(one, COLUMNS * width // len(pictures), ROWS * height) for one in pictures]
    sheet = Image.new("RGB", (sum(one.width for one in small), max(one.height for one in small)))
    edges = itertools.accumulate((one.width for one in small), initial=0)
    for edge, one in zip(edges, small, strict=False):
        sheet.paste(one, (edge, 0))
    return sheet


def _shrink(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return the RGB image `picture`, reduced to `width` by `height` pixels if it is larger."""
    scale = min(1.0, width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, reducing_gap=2.0)


def encode_picture(picture: Image.Image, protocol: Graphics) -> str:
    """Return the escape sequences that show the RGB image `picture`."""
    if protocol == "sixel":
        return "".join(_encode_sixel(picture))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if protocol == "kitty":
        return "".join(_encode_kitty(data))
    size = f"width={picture.width}px;height={picture.height}px"
    return f"\x1b]1337;File=inline=1;size={len(file.getvalue())};{size}:{data}\x07"


def _encode_kitty(data: str) -> Iterator[str]:
    """Yield the escape sequences that carry a PNG file in base64.

    Source: https://sw.kovidgoyal.net/kitty/graphics-protocol (a: transmit and show, f: PNG,
    q: no answer, m: more follows).
    """
    starts = range(0, len(data), _KITTY_CHUNK)
    for start in starts:
        keys = "a=T,f=100,q=2," if start == 0 else ""
        more = int(start + _KITTY_CHUNK < len(data))
        yield f"\x1b_G{keys}m={more};{data[start : start + _KITTY_CHUNK]}\x1b\\"


def _encode_sixel(picture: Image.Image) -> Iterator[str]:
    """Yield the Sixel form: bands of six rows, each with a pass for every color in it.

    Source: VT330/VT340 Programmer Reference Manual, chapter 14.
    """
    image = picture.quantize(_COLORS)
    palette, pixels = image.getpalette() or [], np.asarray(image)
    height, width = pixels.shape
    yield f'\x1bP0;1q"1;1;{width};{height}'
    for color in np.unique(pixels).tolist():
        red, green, blue = (round(v / 2.55) for v in palette[3 * color : 3 * color + 3])
        yield f"#{color};2;{red};{green};{blue}"
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        for color in np.unique(band).tolist():
            bits = ((band == color) * weights).sum(axis=0)
            yield f"#{color}{_encode_runs(bits.tolist())}$"
        yield "-"
    yield "\x1b\\"


def _encode_runs(bits: list[int]) -> str:
    """Encode a pass over a band, six bits a column; runs of four and more are counted."""
    parts = []
    for value, group in itertools.groupby(bits):
        character, count = chr(63 + value), sum(1 for _ in group)
        parts.append(character * count if count < 4 else f"!{count}{character}")
    return "".join(parts)
