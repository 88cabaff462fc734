"""Video to frames: which ones, and when they are shown.

`timeline` chooses the frames, and docs/decisions/video.md says how.
"""

from __future__ import annotations

import io
import math
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from mlx_smolvlm.config import Config, VideoConfig
from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.budget import check_parts
from mlx_smolvlm.media.fetch import DescriptorReader, describe_source, open_bytes
from mlx_smolvlm.media.readers import FramesReader, VideoReader, open_reader
from mlx_smolvlm.media.timeline import format_timestamp

# For checkpoints that state none: SmolVLM2's.
DEFAULT_FPS, DEFAULT_MAX_FRAMES, DEFAULT_SKIP_SECS = 1.0, 64, 1.0


@dataclass(frozen=True)
class Video:
    """A video, and which of its frames to look at.

    Attributes:
        source: A path, an http(s) URL, a data URI, "-" for standard input, the bytes of a
            file; or its frames: an array (T, H, W, 3), or a list of pictures of any source.
        fps: Frames to take a second; None is what the checkpoint was trained with.
        max_frames: At most so many; None likewise.
        start_s: Where to begin, in seconds of the file; None is the beginning.
        end_s: Where to end; None is the end.
        sample: "even" takes frames at equal distances, "scene" the first frame and those
            with which a new scene begins (docs/decisions/video.md says how they are found).
        source_fps: Frames a second of `source`, needed if it is frames.

    Raises:
        ValueError: A value outside its range.
    """

    source: Any
    fps: float | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    sample: Literal["even", "scene"] = "even"
    source_fps: float | None = None

    def __post_init__(self) -> None:
        start, end = self.start_s or 0.0, math.inf if self.end_s is None else self.end_s
        checks = (
            (self.fps is None or 0 < self.fps < math.inf, "fps", "above 0"),
            (self.max_frames is None or self.max_frames >= 1, "max_frames", "1 or above"),
            (0 <= start < math.inf, "start_s", "0 or above"),
            (end > start, "end_s", "after start_s"),
            (self.sample in ("even", "scene"), "sample", "'even' or 'scene'"),
            (
                self.source_fps is None or 1e-6 <= self.source_fps <= 1e6,
                "source_fps",
                "1e-6 to 1e6",
            ),
        )
        for holds, name, range_ in checks:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")

    def open(self) -> Video:
        """The same, with its source opened and its frames counted, so that errors come now.

        Raises:
            MediaError: It cannot be read.
        """
        return replace(self, source=_open_source(self))

    @property
    def is_part(self) -> bool:
        """Whether start or end are given."""
        return self.start_s is not None or self.end_s is not None


@dataclass(frozen=True)
class Frame:
    """A frame: its number in the file, when it is shown, and the upright RGB picture."""

    index: int
    timestamp_s: float
    picture: Image.Image

    @property
    def stamp(self) -> str:
        """The time as the prompt writes it, MM:SS."""
        return format_timestamp(self.timestamp_s)


@dataclass
class Clip:
    """An opened video with the frames chosen from it.

    Attributes:
        name: What to call it.
        fps: Frames a second of the file, or their mean.
        num_frames: All of the file's.
        indices: Numbers of the frames to look at, ascending.
        rate: Of these a second, if there were no limit to their number.
    """

    name: str
    fps: float
    num_frames: int
    indices: tuple[int, ...]
    rate: float
    _reader: VideoReader = field(repr=False)

    @property
    def duration_s(self) -> float:
        """Length of the whole file."""
        return self._reader.timeline.duration_s

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """When each of the chosen frames is shown."""
        return tuple(map(self._reader.timeline.get_time, self.indices))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong with the file, as far as it has been read."""
        return tuple(self._reader.notes)

    def digest(self) -> bytes:
        """Digest of the source and of the choice from it."""
        return self._reader.digest(self.indices) + repr(self.indices).encode()

    def read_frames(self) -> Iterator[Frame]:
        """The chosen frames, decoded as they are asked for.

        Raises:
            MediaError: The file cannot be decoded.
        """
        pictures = self._reader.read(self.indices)
        for index, time, picture in zip(self.indices, self.timestamps_s, pictures, strict=True):
            yield Frame(index, time, picture)


def open_video(video: Any, config: Config) -> Clip:
    """The clip that `video` asks for: a `Video` or a source of one, sampled for `config`.

    A clip is met with itself.

    Raises:
        MediaError: It cannot be read, or has nothing between start and end.
    """
    if isinstance(video, Clip):
        return video
    if not isinstance(video, Video):
        video = Video(video)
    return _sample_clip(video, _open_source(video), choose_settings(video, config))


ClipPart = tuple[float, float, Clip]  # start and end in seconds, and the clip


def open_parts(video: Any, config: Config, seconds: float) -> Iterator[ClipPart]:
    """`video` in parts of `seconds`, the last one shorter. The file is opened once, here.

    Raises:
        ValueError: `seconds` is not above 0.
        MediaError: As `open_video`, or there would be too many parts.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}; it must be above 0")
    if not isinstance(video, Video):
        video = Video(video)
    opened = _open_source(video)
    start, end = _find_span(video, opened)
    check_parts((end - start) / seconds, seconds, opened.name)
    return _cut_parts(replace(video, source=opened), choose_settings(video, config), seconds)


def _cut_parts(video: Video, chosen: VideoConfig, seconds: float) -> Iterator[ClipPart]:
    """The parts of an opened `video`."""
    opened: _Source = video.source
    start, end = _find_span(video, opened)
    number = max(1, math.ceil((end - start) / seconds - 1e-6))
    for part in range(number):
        low, high = start + part * seconds, min(start + (part + 1) * seconds, end)
        yield low, high, _sample_clip(replace(video, start_s=low, end_s=high), opened, chosen)


def choose_settings(video: Video, config: Config) -> VideoConfig:
    """How `video` is sampled: by its own wishes, else as the checkpoint was trained."""
    trained = config.video or VideoConfig(
        DEFAULT_FPS, DEFAULT_MAX_FRAMES, config.tile_size, DEFAULT_SKIP_SECS
    )
    return replace(
        trained,
        fps=trained.fps if video.fps is None else video.fps,
        max_frames=trained.max_frames if video.max_frames is None else video.max_frames,
    )


@dataclass(frozen=True)
class _Source:
    """A source that can be read, and what to call it."""

    reader: VideoReader
    name: str


def _open_source(video: Video) -> _Source:
    """The source of `video`, opened."""
    source = video.source
    if isinstance(source, _Source):
        return source
    if isinstance(source, np.ndarray | list | tuple):
        if video.source_fps is None:
            raise MediaError(
                "how many frames a second the frames were taken is not known; "
                "give Video(frames, source_fps=...)"
            )
        return _Source(FramesReader(source, video.source_fps), "the frames")
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _Source(open_reader(lambda: io.BytesIO(data), "the data"), "the data")
    if not isinstance(source, str | Path):
        raise MediaError(
            f"a video cannot be of type {type(source).__name__}; "
            "give a path, URL, data URI, bytes, an array (T, H, W, 3) or a list of pictures"
        )
    name = describe_source(source)
    return _Source(open_reader(_make_opener(source), name), name)


def _make_opener(source: str | Path) -> Callable[[], BinaryIO]:
    """Opens `source` anew; what had to be copied is copied once."""
    stream = open_bytes(source, video=True)
    if isinstance(stream, io.BytesIO):
        data = stream.getvalue()
        return lambda: io.BytesIO(data)
    if isinstance(stream.name, str):  # the file itself; a temporary copy has a number
        stream.close()
        return lambda: open_bytes(source, video=True)

    descriptor = os.dup(stream.fileno())
    stream.close()

    def reopen() -> BinaryIO:
        return io.BufferedReader(DescriptorReader(descriptor))

    weakref.finalize(reopen, os.close, descriptor)
    return reopen


def _sample_clip(video: Video, opened: _Source, chosen: VideoConfig) -> Clip:
    """The clip of an opened `video`."""
    reader, timeline = opened.reader, opened.reader.timeline
    start, end = _find_span(video, opened)
    if video.sample == "scene":
        from mlx_smolvlm.media.timeline import find_scene_starts

        first, last = timeline.find_range(start, end)
        numbers = range(first, last + 1)
        indices = find_scene_starts(numbers, reader.read(numbers), chosen.max_frames)
        rate = len(indices) * timeline.fps / len(numbers)
    else:
        if video.is_part:
            chosen = replace(chosen, skip_secs=0.0)
        indices = timeline.sample(start, end, chosen)
        rate = min(chosen.fps, timeline.fps)
    return Clip(opened.name, timeline.fps, timeline.num_frames, indices, rate, reader)


def _find_span(video: Video, opened: _Source) -> tuple[float, float]:
    """Start and end of the part of a video that is asked for, in seconds."""
    start, duration_s = video.start_s or 0.0, opened.reader.timeline.duration_s
    if start >= duration_s:
        raise MediaError(
            f"{opened.name} lasts {duration_s:.2f} s, and start is {start:g} s; "
            "start before its end"
        )
    return start, duration_s if video.end_s is None else min(video.end_s, duration_s)
