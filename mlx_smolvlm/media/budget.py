"""Limits on the size of pictures and videos, and the checks that enforce them.

A few kilobytes can describe gigabytes of pixels or millions of frames, so every reader
checks these limits before it decodes. Cameras, phones and screen recorders stay far below
them.
"""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO

from mlx_smolvlm.errors import MediaError

MAX_PIXELS = 100_000_000  # in a picture or a frame, according to its header
MAX_PICTURE_BYTES = 1024**3  # in a picture file; some decoders read all of it into memory
MAX_READS = 1_000_000  # read calls while decoding one picture; each is a call into Python
MAX_ANIMATION_READS = 10_000_000  # the same for an animation; GIF blocks have at most 255 bytes
MAX_HEADER_RATIO = 4  # bytes read before the pixels, as a multiple of the file size
MAX_EXIF_BYTES = 256 * 1024  # Pillow's time is quadratic in it; the standard allows 64 KiB
MAX_ANIMATION_PIXELS = 2**30  # frames x width x height, since each frame is composed in full
MAX_ANIMATION_FRAMES = 50_000  # half an hour at 25 fps
MAX_FRAMES = 2_160_000  # in a video: 10 hours at 60 fps
MAX_PARTS = 10_000  # that a video may be cut into: a week in minutes

_READ_SLACK = 1 << 24  # bytes allowed beyond the ratio, for small files
_EXIF = b"Exif\0\0"


def check_size(size: tuple[int, int], name: str) -> None:
    """Raise MediaError if a picture of `size` (width, height) is empty or above `MAX_PIXELS`."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width} x {height} pixels, so it is empty")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} is {width} x {height} pixels, above the limit of "
            f"{MAX_PIXELS // 1_000_000} megapixels; make it smaller first"
        )


def check_animation(frames: int, size: tuple[int, int], name: str) -> None:
    """Raise MediaError if an animation has too many frames, or too many pixels in total."""
    check_size(size, name)
    width, height = size
    if frames * width * height > MAX_ANIMATION_PIXELS or frames > MAX_ANIMATION_FRAMES:
        raise MediaError(
            f"{name} has {frames} frames or more of {width} x {height} pixels, above the limit "
            f"of {MAX_ANIMATION_FRAMES:,} frames or {MAX_ANIMATION_PIXELS // 1_000_000} megapixels "
            "in all; make it a video (MP4), smaller or shorter"
        )


def check_frames(frames: int, name: str) -> None:
    """Raise MediaError if a video has more than `MAX_FRAMES`."""
    if frames > MAX_FRAMES:
        raise MediaError(
            f"{name} has more than {MAX_FRAMES:,} frames, which is the limit; "
            "cut it into several files"
        )


def check_parts(parts: float, seconds: float, name: str) -> None:
    """Raise MediaError if a video would be cut into more than `MAX_PARTS`."""
    if parts > MAX_PARTS:
        raise MediaError(
            f"{name} makes {parts:.0f} parts of {seconds:g} s each, more than {MAX_PARTS:,}; "
            "choose longer parts or a shorter range"
        )


class PictureStream:
    """A picture file that raises MediaError when decoding reads too much of it.

    A crafted header can take minutes or gigabytes to parse: millions of tiny chunks, or tags
    that all refer to the same bytes. The limits apply to the number of reads, to the bytes
    read before `end_header`, and to the Exif data of a JPEG.
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
        """Return the next `size` bytes, or all remaining ones."""
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
        """Lift the limit on bytes: decoders may read the bytes of pixels several times."""
        self._max_bytes = math.inf

    def _refuse(self, reason: str) -> None:
        raise MediaError(f"{self._name} {reason}; save it again as PNG or JPEG, without metadata")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # seek, tell, and methods that only real files have
