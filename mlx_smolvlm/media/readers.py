"""Readers give the frames of a video by number: from a file, an animated picture or a list.

A reader has the `timeline` of its frames, and its method `read` yields chosen frames,
upright and in RGB. At most a few frames are in memory at once.
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
from mlx_smolvlm.media.formats import describe_picture_in_video
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

# Formats that PyAV may detect. Playlists and scripts, which refer to other files and hosts,
# and formats that render text as a picture are left out.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,asf,ogg,mxf,nut,rm,"
    "dv,vc1,mjpeg,yuv4mpegpipe,mp3,wav,aac,flac"
)
_BUFFER = 1 << 18  # bytes per read of PyAV
_MIN_LOSS_S = 0.5  # gap between the last frame and the stated end, above which a file is cut off
_DEFAULT_FPS = Fraction(25)  # for streams without times, as in FFmpeg


class VideoReader(Protocol):
    """Interface of all readers; `notes` lists problems found in the video so far."""

    timeline: Timeline
    notes: list[str]

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames at `indices`, which ascend, upright and in RGB."""
        ...

    def digest(self, indices: Sequence[int]) -> bytes:
        """Return a digest of the file, or of the frames at `indices` if there is no file."""
        ...


class FramesReader(HasTimeline):
    """Reads frames from a list of pictures of any source, or from an array (T, H, W, 3)."""

    def __init__(self, frames: Sequence[Any] | np.ndarray, fps: float) -> None:
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise MediaError(
                f"an array of shape {frames.shape} is not a video; give (T, H, W, 3), or one "
                "(H, W, 3) with images"
            )
        if not len(frames):
            raise MediaError("the video has no frames; give at least one")
        self._frames, self.timeline = frames, build_even_timeline(len(frames), fps)
        open_image(frames[0])  # raises now if it is not a picture
        self.notes: list[str] = []

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames at `indices`, upright and in RGB."""
        return (open_image(self._frames[index]) for index in indices)

    def digest(self, indices: Sequence[int]) -> bytes:
        """Return a digest of the frames at `indices`."""
        total = hashlib.blake2b(digest_size=16)
        for picture in self.read(indices):
            total.update(repr(picture.size).encode() + picture.tobytes())
        return total.digest()


class _QuietFile:
    """An open file for PyAV whose methods never raise.

    PyAV stores an exception that a method raises, prints it if another one follows, and raises
    it from some later call. So `seek` returns -1 for an invalid offset, after which the demuxer
    goes on, and `raise_error` raises a read error once PyAV is done.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.tell = stream, stream.tell
        self._error: OSError | None = None
        self._size = -1  # unknown, as for files in /proc
        self._size = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end or after a read error."""
        try:
            return self._stream.read(size)
        except OSError as error:
            self._error = self._error or error
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek and return the new position; -1 if it is before the beginning.

        File systems differ in how far beyond the end one may seek, so the stream then stays at
        its end. Files, bytes in memory and copies of pipes thus behave alike.
        """
        try:
            if whence == io.SEEK_SET and offset > self._size >= 0:
                self._stream.seek(self._size)
                return offset
            return self._stream.seek(offset, whence)
        except (OSError, ValueError):
            return -1

    def raise_error(self, name: str) -> None:
        """Raise the first error of `read` as a MediaError."""
        if self._error is not None:
            reason = self._error.strerror or format_error(self._error)
            raise MediaError(f"{name} cannot be read: {reason}") from None


class FileReader(HasTimeline):
    """Reads the frames of a video file through PyAV.

    All packets are read once, without decoding, to learn the number and times of the frames,
    since headers may be wrong. A frame is then decoded from the keyframe before it, skipping
    frames that no other frame refers to.

    Raises:
        MediaError: The file cannot be read, or exceeds a limit of `budget`.
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
        # The header of an AVI also counts repeated frames, which have no packet.
        if stated_frames > max(self._index.num_packets, self.duration_s * (rate or 0)):
            self.notes.append(
                f"{name} is cut off: {self._index.num_packets} of {stated_frames} frames are there"
            )
        elif stated_s - end_s > _MIN_LOSS_S:
            self.notes.append(f"{name} is cut off: {end_s:.2f} of {stated_s:.2f} s are there")

    @contextlib.contextmanager
    def _open_container(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Yield the open file and its video stream; PyAV's errors become a MediaError."""
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
                    f"damaged or in another format ({reason})"
                ) from None
            finally:
                file.raise_error(self._name)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames at `indices`, upright and in RGB.

        A damaged frame is replaced by the nearest one that can be decoded. If a frame cannot
        be decoded from its keyframe, as in streams with gradual refresh, the file is decoded
        once more from the start.

        Raises:
            MediaError: No frame can be decoded.
        """
        from mlx_smolvlm.media.decode import Decoder

        done, replaced = 0, 0
        for jump in (True, False):
            with self._open_container() as (container, stream):
                decoder = Decoder(container, stream, self._index, indices[done:], jump)
                for frame, is_exact in decoder.decode_frames():
                    if not is_exact and jump:
                        break
                    yield _to_upright_picture(frame, self._name)
                    done, replaced = done + 1, replaced + (not is_exact)
            if done == len(indices):
                break
        if done < len(indices):
            raise MediaError(f"{self._name} cannot be decoded; it may be damaged")
        if replaced:
            self.notes.append(
                f"{self._name} is damaged: {replaced} of {len(indices)} frames are damaged, "
                "or replaced by the nearest that can be decoded"
            )

    def digest(self, indices: Sequence[int]) -> bytes:
        """Return a digest of the whole file."""
        with self._open_stream() as stream:
            return digest_stream(stream)


def open_reader(open_stream: Callable[[], BinaryIO], name: str) -> VideoReader:
    """Return a reader for the file that `open_stream` opens, chosen by its first bytes.

    Raises:
        MediaError: The file is not a video that can be read.
    """
    with open_stream() as stream:
        head = stream.read(64)
    if not head:
        raise MediaError(f"{name} is empty")
    reason = describe_picture_in_video(head)
    is_jpeg = head.startswith(b"\xff\xd8\xff")  # which also begins a stream of Motion JPEG
    if reason and not is_jpeg:
        raise MediaError(f"{name} {reason}")
    if head[:4] == b"GIF8" or head[8:12] == b"WEBP" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return AnimationReader(open_stream, name)
    try:
        return FileReader(open_stream, name)
    except MediaError:
        if is_jpeg:
            raise MediaError(f"{name} {reason}") from None
        raise


def _get_metadata_options(pyav_version: str) -> dict[str, Any]:
    """Return options of `av.open` for files whose metadata is not UTF-8.

    PyAV 19, which needs Python 3.12, opens such files and has no such option.
    """
    return {} if int(pyav_version.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def _find_video_stream(container: InputContainer, name: str) -> VideoStream:
    """Return the first video stream that is not cover art."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if Disposition.attached_pic not in Disposition(stream.disposition):
            if stream.codec_context is None:
                raise MediaError(
                    f"{name} has a video track in an unknown format; convert it to H.264 first"
                )
            check_size((stream.width, stream.height), name)
            return stream
    if container.streams.audio:
        raise MediaError(f"{name} has only sound; give a file with a video track")
    raise MediaError(f"{name} has no video track")


def _build_timeline(index: FrameIndex, unit: Fraction, rate: Fraction | None) -> Timeline:
    """Build the timeline of a file that states `rate`; its times count `unit`s of a second."""
    if index.display_times is None:
        return build_even_timeline(len(index.times), rate or _DEFAULT_FPS)
    first, last = int(index.display_times[0]), int(index.display_times[-1])
    if not rate:
        rate = (
            (len(index.display_times) - 1) / ((last - first) * unit)
            if last > first
            else _DEFAULT_FPS
        )
    times_s = (index.display_times - first) * float(unit)
    return build_measured_timeline(times_s, index.last_duration * float(unit), rate)


def _read_ends(stream: VideoStream, index: FrameIndex) -> tuple[float, float]:
    """Return when the last frame begins and when Matroska or WebM says that the stream ends.

    Both are in seconds, and 0 if unknown.
    """
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if (
        tag is None
        or index.display_times is None
        or stream.time_base is None
        or not len(index.display_times)
    ):
        return 0.0, 0.0
    hours, minutes, seconds = map(float, tag.groups())
    return float(
        int(index.display_times[-1]) * stream.time_base
    ), 3600 * hours + 60 * minutes + seconds


def _to_upright_picture(frame: VideoFrame, name: str) -> Image.Image:
    """Convert a frame to RGB, rotated and mirrored as the file says."""
    check_size((frame.width, frame.height), name)
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _find_turn(frame)
    return picture if turn is None else picture.transpose(turn)


def _find_turn(frame: VideoFrame) -> Image.Transpose | None:
    """Return how to turn a frame, from its display matrix; None unless by a right angle."""
    from av.sidedata.sidedata import SideDataContainer

    # `frame.side_data` would create a reference cycle with the frame and keep it in memory
    # until the garbage collector runs, which may be hundreds of frames later.
    side_data: Any = SideDataContainer
    data: Any = side_data(frame).get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(data, np.int32, count=5)).tolist()
    return _TURNS.get((a, b, c, d))
