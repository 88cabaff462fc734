"""Limits for what a picture or video may cost to read, and the streams that enforce them.

A few kilobytes can describe gigabytes of pixels or millions of frames. Every reader of
media compares with these numbers before it decodes. They lie well above what cameras,
phones and screen recorders write.
"""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO

from mlx_smolvlm.errors import MediaError

MAX_PIXELS = 100_000_000  # of a picture or a frame, from its header
MAX_PICTURE_BYTES = 1024**3  # of a picture's file; some decoders read all of it into memory
MAX_READS = 1_000_000  # read calls that decoding one picture takes; each is a step in Python
MAX_ANIMATION_READS = 10_000_000  # the same of all frames; a GIF's blocks have 255 bytes
MAX_HEADER_RATIO = 4  # bytes that are read before a picture's pixels, relative to its file
MAX_EXIF_BYTES = 256 * 1024  # Pillow's work grows with the square; the standard allows 64 KiB
MAX_ANIMATION_PIXELS = 2**30  # frames x width x height; each frame is composed on the last one
MAX_ANIMATION_FRAMES = 50_000  # half an hour at 25 a second
MAX_FRAMES = 2_160_000  # of a video: 10 hours at 60 a second
MAX_PARTS = 10_000  # that a video is cut into: a week of minutes

_READ_SLACK = 1 << 24  # bytes that reading may exceed the ratio by, for small files
_EXIF = b"Exif\0\0"


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse an empty picture and one with more than `MAX_PIXELS`."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width} x {height} pixels; it has nothing to look at")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} is {width} x {height} pixels, above the limit of "
            f"{MAX_PIXELS // 1_000_000} megapixels; make it smaller first"
        )


def check_animation(frames: int, size: tuple[int, int], name: str) -> None:
    """Refuse an animated picture with too many frames, or too many pixels in all of them."""
    check_size(size, name)
    width, height = size
    if frames * width * height > MAX_ANIMATION_PIXELS or frames > MAX_ANIMATION_FRAMES:
        raise MediaError(
            f"{name} has {frames} frames or more of {width} x {height} pixels, above the limit "
            f"of {MAX_ANIMATION_FRAMES:,} frames or {MAX_ANIMATION_PIXELS // 1_000_000} megapixels "
            "in all; make it a video (MP4), smaller or shorter"
        )


def check_frames(frames: int, name: str) -> None:
    """Refuse a video with more than `MAX_FRAMES`."""
    if frames > MAX_FRAMES:
        raise MediaError(
            f"{name} has more than {MAX_FRAMES:,} frames, the most that are read; "
            "cut it into several files"
        )


def check_parts(parts: float, seconds: float, name: str) -> None:
    """Refuse to cut a video into more than `MAX_PARTS`."""
    if parts > MAX_PARTS:
        raise MediaError(
            f"{name} makes {parts:.0f} parts of {seconds:g} s each, more than {MAX_PARTS:,}; "
            "take longer parts, or a shorter range of it"
        )


class PictureStream:
    """A picture's file as a decoder may read it.

    A header can be made so that parsing it takes minutes or gigabytes, with millions of tiny
    chunks, or with tags that name the same bytes over and over. Reading stops once the calls,
    the bytes before `end_header`, or the Exif data of a JPEG exceed their limits.
    """

    def __init__(self, stream: BinaryIO, name: str, max_reads: int | None = None) -> None:
        self._stream, self._name = stream, name
        self._max_reads = MAX_READS if max_reads is None else max_reads
        self._reads = self._bytes = self._exif_bytes = 0
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if size > MAX_PICTURE_BYTES:
            raise MediaError(
                f"{name} has {size:,} bytes, above the limit of {MAX_PICTURE_BYTES:,} for a "
                "picture; make it smaller first"
            )
        self._max_bytes: float = MAX_HEADER_RATIO * size + _READ_SLACK

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes, or all that are left."""
        data = self._stream.read(size)
        self._reads += 1
        self._bytes += len(data)
        if data.startswith(_EXIF):
            self._exif_bytes += len(data)
        if self._exif_bytes > MAX_EXIF_BYTES:
            self._refuse("has too much Exif data")
        if self._reads > self._max_reads or self._bytes > self._max_bytes:
            self._refuse("is built in a way that takes too long to read")
        return data

    def end_header(self) -> None:
        """Pixels follow: decoders read some bytes several times, such as those around strips."""
        self._max_bytes = math.inf

    def _refuse(self, reason: str) -> None:
        raise MediaError(f"{self._name} {reason}; save it anew as PNG or JPEG, without metadata")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # seek, tell, and what only real files have
