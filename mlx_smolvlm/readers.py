"""Frames of a video by their numbers: a file through PyAV, an animated picture, a list.

A reader states `num_frames`, `fps`, `duration_s` and `size` (width, height), and `read` yields the
frames that are asked for, upright and in RGB. None holds more than a few at once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.fetch import one_line
from mlx_smolvlm.picture import check_size, open_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Size = tuple[int, int]  # width, height

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
_BLOCK = 1 << 20  # bytes that are digested at a time
_LEAST_DELAY_S, _USUAL_DELAY_S = 0.02, 0.1  # of an animated picture, as browsers have it


class Reader(Protocol):
    """What every kind of video can do; `notes` tell what was wrong with it."""

    num_frames: int
    fps: float
    duration_s: float
    size: Size
    notes: list[str]

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`, which ascend."""
        ...

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the file, or of the frames at `indices` where there is none."""
        ...


class FramesReader:
    """Frames that are at hand: pictures of any source, or an array (T, H, W, 3)."""

    def __init__(self, frames: Sequence[Any] | np.ndarray, fps: float) -> None:
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise MediaError(
                f"an array of shape {frames.shape} is not a video; give (T, H, W, 3), or one "
                "(H, W, 3) with images"
            )
        if not len(frames):
            raise MediaError("the video has no frames; give at least one")
        self._frames, self.num_frames, self.fps = frames, len(frames), fps
        self.duration_s = self.num_frames / fps
        self.size = open_image(frames[0]).size
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


class AnimationReader:
    """A GIF, WebP or PNG that moves, through Pillow, which composes it as browsers do.

    `fps` is the mean, as PyAV's is. A delay below 0.02 s is one of 0.1 s.
    """

    def __init__(self, open_stream: Callable[[], BinaryIO], name: str) -> None:
        self._open, self._name, self.notes = open_stream, name, list[str]()
        delays: list[float] = []
        with self._image() as image:
            self.size = image.size
            check_size(self.size, name)
            if getattr(image, "n_frames", 1) == 1:
                raise MediaError(f"{name} is a single picture; give it as an image")
            for number in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(number)
                delay = float(image.info.get("duration") or 0) / 1000
                delays.append(delay if delay >= _LEAST_DELAY_S else _USUAL_DELAY_S)
        self.num_frames, self.duration_s = len(delays), sum(delays)
        self.fps = self.num_frames / self.duration_s

    @contextlib.contextmanager
    def _image(self) -> Iterator[Image.Image]:
        """The opened file, with any failure as a MediaError."""
        try:
            with self._open() as stream, Image.open(stream) as image:
                yield image
        except MediaError:
            raise
        except Exception as error:  # a format plugin raises anything on damaged data
            raise MediaError(
                f"{self._name} cannot be decoded; it may be truncated or damaged "
                f"({one_line(error)})"
            ) from None

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`."""
        with self._image() as image:
            for index in indices:
                image.seek(index)
                yield open_image(image.copy())

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the file."""
        return _file_digest(self._open)


class FileReader:
    """A video file through PyAV.

    Its packets are gone through once, without decoding, so that number and times of the
    frames are known, whatever the header claims. A frame is then decoded from the
    keyframe before it, and frames that nothing refers to are skipped on the way.
    """

    def __init__(self, open_stream: Callable[[], BinaryIO], name: str) -> None:
        from mlx_smolvlm.decode import read_index

        self._open, self._name, self.notes = open_stream, name, list[str]()
        with self.opened() as (container, stream):
            self.size: Size = (stream.width, stream.height)
            self._index = read_index(container, stream)
            rate, claimed = stream.average_rate or stream.guessed_rate, stream.frames
        self.num_frames = len(self._index.times)
        if not self.num_frames:
            raise MediaError(f"{name} has no frames; it may be truncated or damaged")
        rate = rate or Fraction(self._index.fps)
        self.fps, self.duration_s = float(rate), float(self.num_frames / rate)
        if claimed > self._index.packets:
            self.notes.append(
                f"{name} is cut off: {self._index.packets} of {claimed} frames are there"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file and its video stream, with PyAV's errors as MediaErrors."""
        import av

        with self._open() as file:
            if not file.read(1):
                raise MediaError(f"{self._name} is empty")
            file.seek(0)
            try:
                with av.open(
                    file,
                    "r",
                    options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
                    metadata_errors="ignore",
                    buffer_size=_BUFFER,
                ) as container:
                    yield container, _video_stream(container, self._name)
            except av.FFmpegError as error:
                raise MediaError(
                    f"{self._name} is not a video that can be read; it may be truncated, "
                    f"damaged or of another kind ({error.strerror or one_line(error)})"
                ) from None

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices`; for one that is damaged, the nearest that can be decoded.

        A frame that jumping to its keyframe does not bring, as with streams that are
        refreshed bit by bit, is looked for once more by decoding from the start.
        """
        from mlx_smolvlm.decode import Decoder

        done, replaced = 0, 0
        for jump in (True, False):
            with self.opened() as (container, stream):
                decoder = Decoder(container, stream, self._index, indices[done:], jump)
                for frame, exact in decoder.frames():
                    if not exact and jump:
                        break
                    yield _upright(frame, self._name)
                    done, replaced = done + 1, replaced + (not exact)
            if done == len(indices):
                break
        if done < len(indices):
            raise MediaError(f"{self._name} cannot be decoded; it may be damaged")
        if replaced:
            self.notes.append(
                f"{self._name} is damaged: {replaced} of {len(indices)} frames are replaced by "
                "the nearest that can be decoded"
            )

    def digest(self, indices: Sequence[int]) -> bytes:
        """Digest of the file."""
        return _file_digest(self._open)


def _file_digest(open_stream: Callable[[], BinaryIO]) -> bytes:
    """Digest of all that `open_stream` gives."""
    total = hashlib.blake2b(digest_size=16)
    with open_stream() as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return total.digest()


def open_reader(open_stream: Callable[[], BinaryIO], name: str) -> Reader:
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


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream to look at; the picture on a record's sleeve is none."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if Disposition.attached_pic not in Disposition(stream.disposition):
            check_size((stream.width, stream.height), name)
            return stream
    if container.streams.audio:
        raise MediaError(f"{name} has sound only; give a file with a picture track")
    raise MediaError(f"{name} has no picture track")


def _upright(frame: VideoFrame, name: str) -> Image.Image:
    """RGB of a frame, turned and mirrored as the file says."""
    check_size((frame.width, frame.height), name)
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _turn(frame)
    return picture if turn is None else picture.transpose(turn)


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """How to turn a frame, from its display matrix; other angles than right ones are left."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(data, np.int32, count=5)).tolist()
    return _TURNS.get((a, b, c, d))
