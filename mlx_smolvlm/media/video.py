"""Open videos and sample frames from them.

`timeline` chooses the frames; docs/decisions/video.md explains how.
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
from mlx_smolvlm.media.timeline import find_scene_starts, format_timestamp

# SmolVLM2's values, for checkpoints that state none.
DEFAULT_FPS, DEFAULT_MAX_FRAMES, DEFAULT_SKIP_SECS = 1.0, 64, 1.0


@dataclass(frozen=True)
class Video:
    """A video and how to sample frames from it.

    Attributes:
        source: A path, an http(s) URL, a data URI, "-" for standard input, or the bytes of a
            file; or the frames: an array (T, H, W, 3) or a list of pictures of any source.
        fps: Frames to sample per second; None uses the checkpoint's value.
        max_frames: How many frames to sample at most; None uses the checkpoint's value.
        start_s: Start in seconds; None is the beginning of the video.
        end_s: End in seconds; None is the end of the video.
        sample: "even" takes frames at equal distances, "scene" the first and the last
            frame and each at which a new scene begins (see docs/decisions/video.md).
        source_fps: Frames per second of `source`; required if it is frames.

    Raises:
        ValueError: A value is outside its range.
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
        for is_valid, name, range_ in checks:
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")

    def open(self) -> Video:
        """Return the same video with its source open and indexed, so errors are raised now.

        Raises:
            MediaError: The source cannot be read.
        """
        return replace(self, source=_open_source(self))

    @property
    def is_part(self) -> bool:
        """Whether a start or an end is given."""
        return self.start_s is not None or self.end_s is not None


@dataclass(frozen=True)
class Frame:
    """A frame: its number in the file, when it is shown, and the picture, upright RGB."""

    index: int
    timestamp_s: float
    picture: Image.Image

    @property
    def stamp(self) -> str:
        """The time as written in the prompt, MM:SS."""
        return format_timestamp(self.timestamp_s)


@dataclass
class Clip:
    """An open video and the frames sampled from it.

    Attributes:
        name: Name of the video in messages.
        fps: Frames per second of the file, or their mean.
        num_frames: Number of frames in the file.
        indices: Numbers of the sampled frames, ascending.
        rate: Sampled frames per second, before `max_frames` is applied.
    """

    name: str
    fps: float
    num_frames: int
    indices: tuple[int, ...]
    rate: float
    _reader: VideoReader = field(repr=False)

    @property
    def duration_s(self) -> float:
        """Duration of the whole file in seconds."""
        return self._reader.timeline.duration_s

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """When each sampled frame is shown, in seconds."""
        return tuple(map(self._reader.timeline.get_time, self.indices))

    @property
    def notes(self) -> tuple[str, ...]:
        """Problems found in the file so far."""
        return tuple(self._reader.notes)

    def digest(self) -> bytes:
        """Return a digest of the source and of `indices`."""
        return self._reader.digest(self.indices) + repr(self.indices).encode()

    def read_frames(self) -> Iterator[Frame]:
        """Yield the sampled frames, decoded one by one.

        Raises:
            MediaError: The file cannot be decoded.
        """
        pictures = self._reader.read(self.indices)
        for index, time, picture in zip(self.indices, self.timestamps_s, pictures, strict=True):
            yield Frame(index, time, picture)


def open_video(video: Any, config: Config) -> Clip:
    """Open `video` and sample its frames as it says, or else as `config` says.

    Args:
        video: A `Video` or the source of one. A `Clip` is returned unchanged.
        config: Configuration of the checkpoint.

    Raises:
        MediaError: The video cannot be read, or starts after its end.
    """
    if isinstance(video, Clip):
        return video
    if not isinstance(video, Video):
        video = Video(video)
    return _sample_clip(video, _open_source(video), choose_settings(video, config))


ClipPart = tuple[float, float, Clip]  # start in seconds, end in seconds, clip


def open_parts(video: Any, config: Config, seconds: float) -> Iterator[ClipPart]:
    """Open `video` once and yield it in parts of `seconds` each; the last may be shorter.

    Raises:
        ValueError: `seconds` is not above 0.
        MediaError: As in `open_video`, or there would be too many parts.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}; it must be above 0")
    if not isinstance(video, Video):
        video = Video(video)
    source = _open_source(video)
    start, end = _find_span(video, source)
    check_parts((end - start) / seconds, seconds, source.name)
    return _cut_parts(replace(video, source=source), choose_settings(video, config), seconds)


def _cut_parts(video: Video, settings: VideoConfig, seconds: float) -> Iterator[ClipPart]:
    """Yield the parts of a `video` whose source is open."""
    source: _Source = video.source
    start, end = _find_span(video, source)
    number = max(1, math.ceil((end - start) / seconds - 1e-6))
    for part in range(number):
        low, high = start + part * seconds, min(start + (part + 1) * seconds, end)
        yield low, high, _sample_clip(replace(video, start_s=low, end_s=high), source, settings)


def choose_settings(video: Video, config: Config) -> VideoConfig:
    """Return the sampling settings of `video`, with defaults from the checkpoint."""
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
    """An open source and its name in messages."""

    reader: VideoReader
    name: str


def _open_source(video: Video) -> _Source:
    """Open the source of `video`; return it unchanged if it is open."""
    source = video.source
    if isinstance(source, _Source):
        return source
    if isinstance(source, np.ndarray | list | tuple):
        if video.source_fps is None:
            raise MediaError(
                "the frame rate of the frames is not known; give Video(frames, source_fps=...)"
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
    """Return a function that opens `source` again each time; pipes and URLs are read once."""
    stream = open_bytes(source, video=True)
    if isinstance(stream, io.BytesIO):
        data = stream.getvalue()
        return lambda: io.BytesIO(data)
    if isinstance(stream.name, str):  # a file; the name of a temporary copy is a number
        stream.close()
        return lambda: open_bytes(source, video=True)

    descriptor = os.dup(stream.fileno())
    stream.close()

    def reopen() -> BinaryIO:
        return io.BufferedReader(DescriptorReader(descriptor))

    weakref.finalize(reopen, os.close, descriptor)
    return reopen


def _sample_clip(video: Video, source: _Source, settings: VideoConfig) -> Clip:
    """Return the clip of `video`, whose open source is `source`."""
    reader, timeline = source.reader, source.reader.timeline
    start, end = _find_span(video, source)
    if video.sample == "scene":
        first, last = timeline.find_range(start, end)
        numbers = range(first, last + 1)
        indices = find_scene_starts(numbers, reader.read(numbers), settings.max_frames)
        rate = len(indices) * timeline.fps / len(numbers)
    else:
        if video.is_part:
            settings = replace(settings, skip_secs=0.0)
        indices = timeline.sample(start, end, settings)
        rate = min(settings.fps, timeline.fps)
    return Clip(source.name, timeline.fps, timeline.num_frames, indices, rate, reader)


def _find_span(video: Video, source: _Source) -> tuple[float, float]:
    """Return start and end of the requested part of a video, in seconds."""
    start, duration_s = video.start_s or 0.0, source.reader.timeline.duration_s
    if start >= duration_s:
        raise MediaError(
            f"{source.name} lasts {duration_s:.2f} s, and start is {start:g} s; "
            "give a start before its end"
        )
    return start, duration_s if video.end_s is None else min(video.end_s, duration_s)
