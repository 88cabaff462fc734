"""Read animated GIF, WebP and PNG files as videos, through Pillow.

Pillow composes each frame on the previous one, as browsers do, which takes time. The sizes
and delays of all frames are therefore read here, from their headers, without decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from PIL import Image

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.files import digest_stream
from mlx_smolvlm.media.budget import (
    MAX_ANIMATION_READS,
    PictureStream,
    check_animation,
)
from mlx_smolvlm.media.picture import convert_errors, ignore_warnings, open_image, open_lazily
from mlx_smolvlm.media.timeline import HasTimeline, build_delay_timeline

Size = tuple[int, int]  # width, height
FrameHeader = tuple[Size, int | float]  # (right, lower) edge on the canvas, delay in ms

_MIN_DELAY_MS, _DEFAULT_DELAY_MS = 20, 100  # browsers show shorter delays as 100 ms


class AnimationReader(HasTimeline):
    """Reads the frames of an animated GIF, WebP or PNG. Delays below 20 ms count as 100 ms.

    Raises:
        MediaError: The file is damaged, has a single frame, or exceeds a limit of `budget`.
    """

    def __init__(self, open_stream: Callable[[], BinaryIO], name: str) -> None:
        self._open_stream, self._name, self.notes = open_stream, name, list[str]()
        width = height = 0
        delays_s: list[float] = []
        with open_stream() as file, convert_errors(name):
            stream: Any = PictureStream(file, name, MAX_ANIMATION_READS)
            for (right, lower), delay_ms in _read_frame_headers(stream):
                width, height = max(width, right), max(height, lower)
                delays_s.append(
                    (delay_ms if delay_ms >= _MIN_DELAY_MS else _DEFAULT_DELAY_MS) / 1e3
                )
                check_animation(len(delays_s), (width, height), name)
        if not delays_s:
            raise MediaError(f"{name} has no frames; it may be truncated or damaged")
        if len(delays_s) == 1:
            raise MediaError(f"{name} is a single picture; give it as an image (-i, /image)")
        self.timeline = build_delay_timeline(delays_s)

    @contextlib.contextmanager
    def _open_animation(self) -> Iterator[Image.Image]:
        """Yield the open file; errors of the decoder become a MediaError."""
        with self._open_stream() as stream, convert_errors(self._name):
            with ignore_warnings():
                image = open_lazily(stream, self._name)
            with image:
                yield image

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames at `indices`, upright and in RGB."""
        with self._open_animation() as image:
            for index in indices:
                with ignore_warnings():
                    image.seek(index)
                    picture = open_image(image.copy())
                yield picture

    def digest(self, indices: Sequence[int]) -> bytes:
        """Return a digest of the whole file."""
        with self._open_stream() as stream:
            return digest_stream(stream)


def _read_frame_headers(stream: BinaryIO) -> Iterator[FrameHeader]:
    """Yield a header for each frame of an animated picture; stop where the file is truncated."""
    head = stream.read(16)
    stream.seek(0)
    if head[:4] == b"GIF8":
        return _read_gif_headers(stream)
    return _read_png_headers(stream) if head[:4] == b"\x89PNG" else _read_webp_headers(stream)


def _read_gif_headers(stream: BinaryIO) -> Iterator[FrameHeader]:
    """Yield the frame headers of a GIF.

    Source: GIF89a specification, sections 18 to 23.
    """
    head = stream.read(13)
    width, height = _parse_little_endian(head[6:8]), _parse_little_endian(head[8:10])
    _skip_palette(stream, head[10])
    delay_ms = 0
    while (kind := stream.read(1)) in (b"!", b",", b"\0"):
        if kind == b"!":
            label, block = stream.read(1), _read_sub_block(stream)
            if label == b"\xf9":
                delay_ms = _parse_little_endian(block[1:3]) * 10
            while block:
                block = _read_sub_block(stream)
        elif kind == b",":
            head = stream.read(9)
            if len(head) < 9:
                return
            left, upper, wide, high = (_parse_little_endian(head[i : i + 2]) for i in (0, 2, 4, 6))
            _skip_palette(stream, head[8])
            stream.read(1)  # LZW minimum code size
            while _read_sub_block(stream):
                pass
            yield (max(width, left + wide), max(height, upper + high)), delay_ms
            delay_ms = 0


def _skip_palette(stream: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        stream.seek(3 << (flags & 7) + 1, 1)


def _read_sub_block(stream: BinaryIO) -> bytes:
    """Return the next sub-block of a GIF's block; empty at the end of the block."""
    size = stream.read(1)
    return stream.read(size[0]) if size else b""


def _read_png_headers(stream: BinaryIO) -> Iterator[FrameHeader]:
    """Yield the frame headers of a PNG.

    A default image that is not part of the animation counts as a frame, as in Pillow, although
    browsers do not show it.

    Source: PNG specification, third edition, section 11.3.6.
    """
    stream.seek(8)
    size, frames_left, has_begun = (0, 0), 0, False
    while len(head := stream.read(8)) == 8 and not (has_begun and frames_left < 1):
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = stream.read(min(length, 26)) if kind in (b"IHDR", b"acTL", b"fcTL") else b""
        stream.seek(length - len(body) + 4, 1)
        if kind == b"IHDR":
            size = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
        elif kind == b"acTL":
            frames_left = int.from_bytes(body[:4], "big")
        elif kind == b"fcTL" and frames_left:
            number, base = (int.from_bytes(body[i : i + 2], "big") for i in (20, 22))
            yield size, number * 1000 / (base or 100)
            frames_left, has_begun = frames_left - 1, True
        elif kind == b"IDAT" and not has_begun:
            yield size, 0
            has_begun = True


def _read_webp_headers(stream: BinaryIO) -> Iterator[FrameHeader]:
    """Yield the frame headers of a WebP.

    Source: WebP container specification, sections Extended File Format and Animation.
    """
    stream.seek(12)
    size = 1, 1
    while len(head := stream.read(8)) == 8:
        kind, length = head[:4], _parse_little_endian(head[4:])
        body = stream.read(min(length, 16)) if kind in (b"VP8X", b"ANMF") else b""
        stream.seek(length + length % 2 - len(body), 1)
        if kind == b"VP8X":
            size = _parse_little_endian(body[4:7]) + 1, _parse_little_endian(body[7:10]) + 1
        elif kind in (b"VP8 ", b"VP8L"):
            yield size, 0
        elif kind == b"ANMF":
            yield size, _parse_little_endian(body[12:15])


def _parse_little_endian(data: bytes) -> int:
    return int.from_bytes(data, "little")
