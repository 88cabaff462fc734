"""Frames of a video by their numbers: a file through PyAV, an animated picture, a list.

A reader states the `timeline` of its frames, and `read` yields the frames that are
asked for, upright and in RGB. None holds more than a few at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from mlx_smolvlm.errors import MediaError, format_error
from mlx_smolvlm.files import digest_stream
from mlx_smolvlm.media.animation import AnimationReader
from mlx_smolvlm.media.budget import check_size
from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.timeline import (
    HasTimeline,
    Timeline,
    build_even_timeline,
    build_measured_timeline,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mlx_smolvlm.media.decode import FrameIndex

# Signs of the display matrix's a, b, c and d: a point (x, y) goes to (ax + cy, bx + dy).
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}

# What PyAV may take a file for. Playlists and scripts, which name other files and hosts,
# and text shown as a picture are left out.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,asf,ogg,mxf,nut,rm,"
    "dv,vc1,mjpeg,yuv4mpegpipe,mp3,wav,aac,flac"
)
_BUFFER = 1 << 18  # bytes that PyAV reads at a time
_MIN_LOSS_S = 0.5  # between the last frame and the end that a file claims
_DEFAULT_FPS = Fraction(25)  # of a stream that says nothing of times, as FFmpeg takes it


class VideoReader(Protocol):
    """What every kind of video can do; `notes` tell what was wrong with it."""

    timeline: Timeline
    notes: list[str]

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`, which ascend."""
        ...

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the file, or of the frames at `indices` where there is none."""
        ...


class FramesReader(HasTimeline):
    """Frames that are at hand: pictures of any source, or an array (T, H, W, 3)."""

    def __init__(self, frames: Sequence[Any] | np.ndarray, fps: float) -> None:
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise MediaError(
                f"an array of shape {frames.shape} is not a video; give (T, H, W, 3), or one "
                "(H, W, 3) with images"
            )
        if not len(frames):
            raise MediaError("the video has no frames; give at least one")
        self._frames, self.timeline = frames, build_even_timeline(len(frames), fps)
        open_image(frames[0])  # so that what is no picture is refused now
        self.notes: list[str] = []

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`."""
        return (open_image(self._frames[index]) for index in indices)

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the frames at `indices`."""
        total = hashlib.blake2b(digest_size=16)
        for picture in self.read(indices):
            total.update(repr(picture.size).encode() + picture.tobytes())
        return total.digest()


class _QuietFile:
    """An open file for PyAV, whose methods raise nothing.

    PyAV keeps an exception that a method raises, prints it if another one follows, and raises
    it from some later call. A demuxer that follows a damaged offset to before the beginning
    is told that this failed, and goes on; an error of the disk is kept until it is asked for.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.tell = stream, stream.tell
        self._error: OSError | None = None
        self._size = -1  # not known, as of files in /proc
        self._size = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end, or if the disk fails."""
        try:
            return self._stream.read(size)
        except OSError as error:
            self._error = self._error or error
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position; -1 if it lies before the beginning.

        File systems differ in how far behind the end they let one seek, so the stream stays at
        its end then: a path, the same bytes in memory and a copy of a pipe read alike.
        """
        try:
            if whence == io.SEEK_SET and offset > self._size >= 0:
                self._stream.seek(self._size)
                return offset
            return self._stream.seek(offset, whence)
        except (OSError, ValueError):
            return -1

    def raise_error(self, name: str) -> None:
        """Raise what went wrong in `read`."""
        if self._error is not None:
            reason = self._error.strerror or format_error(self._error)
            raise MediaError(f"{name} cannot be read: {reason}") from None


class FileReader(HasTimeline):
    """A video file through PyAV.

    Its packets are gone through once, without decoding, so that number and times of the
    frames are known, whatever the header claims. A frame is then decoded from the
    keyframe before it, and frames that nothing refers to are skipped on the way.
    """

    def __init__(self, open_stream: Callable[[], BinaryIO], name: str) -> None:
        from mlx_smolvlm.media.decode import read_index

        self._open_stream, self._name, self.notes = open_stream, name, list[str]()
        with self._open_container() as (container, stream):
            self._index = read_index(container, stream, name)
            rate, stated_frames = stream.average_rate or stream.guessed_rate, stream.frames
            unit = stream.time_base or Fraction(1)
            end_s, stated_s = _read_ends(stream, self._index)
        if not len(self._index.times):
            raise MediaError(f"{name} has no frames; it may be truncated or damaged")
        self.timeline = _build_timeline(self._index, unit, rate)
        # Of an AVI, frames that repeat the one before are stated_frames too, but take no packet.
        if stated_frames > max(self._index.packets, self.duration_s * (rate or 0)):
            self.notes.append(
                f"{name} is cut off: {self._index.packets} of {stated_frames} frames are there"
            )
        elif stated_s - end_s > _MIN_LOSS_S:
            self.notes.append(f"{name} is cut off: {end_s:.2f} of {stated_s:.2f} s are there")

    @contextlib.contextmanager
    def _open_container(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file and its video stream, with PyAV's errors as MediaErrors."""
        import av

        with self._open_stream() as stream:
            file: Any = _QuietFile(stream)
            try:
                if not file.read(1):
                    raise MediaError(f"{self._name} is empty")
                file.seek(0)
                with av.open(
                    file,
                    "r",
                    options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
                    buffer_size=_BUFFER,
                    **_get_metadata_options(av.__version__),
                ) as container:
                    yield container, _find_video_stream(container, self._name)
            except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
                reason = getattr(error, "strerror", None) or format_error(error)
                raise MediaError(
                    f"{self._name} is not a video that can be read; it may be truncated, "
                    f"damaged or of another kind ({reason})"
                ) from None
            finally:
                file.raise_error(self._name)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`; for one that is damaged, the nearest that can be decoded.

        A frame that jumping to its keyframe does not bring, as with streams that are
        refreshed bit by bit, is looked for once more by decoding from the start.
        """
        from mlx_smolvlm.media.decode import Decoder

        done, replaced = 0, 0
        for jump in (True, False):
            with self._open_container() as (container, stream):
                decoder = Decoder(container, stream, self._index, indices[done:], jump)
                for frame, exact in decoder.decode_frames():
                    if not exact and jump:
                        break
                    yield _to_upright_picture(frame, self._name)
                    done, replaced = done + 1, replaced + (not exact)
            if done == len(indices):
                break
        if done < len(indices):
            raise MediaError(f"{self._name} cannot be decoded; it may be damaged")
        if replaced:
            self.notes.append(
                f"{self._name} is damaged: {replaced} of {len(indices)} frames are damaged "
                "themselves, or replaced by the nearest that can be decoded"
            )

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the file."""
        with self._open_stream() as stream:
            return digest_stream(stream)


def open_reader(open_stream: Callable[[], BinaryIO], name: str) -> VideoReader:
    """The reader for what `open_stream` gives, by its first bytes.

    Raises:
        MediaError: It is no video that can be read.
    """
    with open_stream() as stream:
        head = stream.read(16)
    if not head:
        raise MediaError(f"{name} is empty")
    animated = head[:4] == b"GIF8" or head[8:12] == b"WEBP" or head[:8] == b"\x89PNG\r\n\x1a\n"
    return (AnimationReader if animated else FileReader)(open_stream, name)


def _get_metadata_options(pyav_version: str) -> dict[str, Any]:
    """Options of `av.open` that let it open files whose metadata is not UTF-8.

    PyAV 19, which needs Python 3.12, opens them by itself and knows no such option.
    """
    return {} if int(pyav_version.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def _find_video_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream to look at; the picture on a record's sleeve is none."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if Disposition.attached_pic not in Disposition(stream.disposition):
            if stream.codec_context is None:
                raise MediaError(
                    f"{name} has pictures in a format that is not known; convert it to H.264 first"
                )
            check_size((stream.width, stream.height), name)
            return stream
    if container.streams.audio:
        raise MediaError(f"{name} has sound only; give a file with a picture track")
    raise MediaError(f"{name} has no picture track")


def _build_timeline(index: FrameIndex, unit: Fraction, rate: Fraction | None) -> Timeline:
    """The timeline of a file that states `rate`, with times in `unit`s of a second."""
    if index.clock is None:
        return build_even_timeline(len(index.times), rate or _DEFAULT_FPS)
    first, last = int(index.clock[0]), int(index.clock[-1])
    if not rate:
        rate = (len(index.clock) - 1) / ((last - first) * unit) if last > first else _DEFAULT_FPS
    times_s = (index.clock - first) * float(unit)
    return build_measured_timeline(times_s, index.last * float(unit), rate)


def _read_ends(stream: VideoStream, index: FrameIndex) -> tuple[float, float]:
    """When the last frame begins, and when the stream ends as Matroska and WebM have it.

    Both in seconds; 0 where it is not known.
    """
    claim = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if claim is None or index.clock is None or stream.time_base is None or not len(index.clock):
        return 0.0, 0.0
    hours, minutes, seconds = map(float, claim.groups())
    return float(int(index.clock[-1]) * stream.time_base), 3600 * hours + 60 * minutes + seconds


def _to_upright_picture(frame: VideoFrame, name: str) -> Image.Image:
    """RGB of a frame, turned and mirrored as the file says."""
    check_size((frame.width, frame.height), name)
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _find_turn(frame)
    return picture if turn is None else picture.transpose(turn)


def _find_turn(frame: VideoFrame) -> Image.Transpose | None:
    """How to turn a frame, from its display matrix; other angles than right ones are left."""
    from av.sidedata.sidedata import SideDataContainer

    # Once `frame.side_data` is asked for, it and the frame hold each other, and the frame
    # stays until Python looks for such circles, which may be hundreds of frames later.
    side_data: Any = SideDataContainer
    data: Any = side_data(frame).get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(data, np.int32, count=5)).tolist()
    return _TURNS.get((a, b, c, d))
