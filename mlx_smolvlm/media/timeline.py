"""When the frames of a video are shown, and which of them to sample.

Frames are sampled at even distances, or where scenes begin (docs/decisions/video.md).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlx_smolvlm.config import VideoConfig

if TYPE_CHECKING:
    from PIL import Image

_EPSILON = 1e-6  # tolerance for rounding, in frames or in seconds
_MIN_SEEN_S = 0.5  # how long an earlier frame must stay in a range to be part of it
_MAX_DRIFT_S = 0.1  # of frames from an even rate
_MAX_DURATION_S = 1e9  # that `format_duration` shows


class FrameTimes(Protocol):
    """The times that a prompt states: of the frames of a clip, and of the whole video."""

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """When each frame is shown, in seconds."""
        ...

    @property
    def duration_s(self) -> float:
        """Duration of the whole video in seconds."""
        ...


def format_timestamp(seconds: float) -> str:
    """Format `seconds`, rounded down, as MM:SS; minutes may exceed 59."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def format_duration(seconds: float) -> str:
    """Format `seconds`, rounded down, as H:MM:SS."""
    return str(timedelta(seconds=int(min(seconds, _MAX_DURATION_S))))


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video begins, relative to the first one.

    Attributes:
        num_frames: At least 1.
        fps: Frames per second; the mean if they are not evenly spaced.
        duration_s: Seconds to the end of the last frame.
        times_s: Seconds, float64 (num_frames,), ascending; None if frame i begins at i / fps.
    """

    num_frames: int
    fps: float
    duration_s: float
    times_s: np.ndarray | None = None

    def get_time(self, index: int) -> float:
        """Return when the frame at `index` begins, in seconds."""
        return index / self.fps if self.times_s is None else float(self.times_s[index])

    def find_range(self, start_s: float, end_s: float) -> tuple[int, int]:
        """Return the numbers of the first and last frame shown from `start_s` to `end_s`.

        These are the frames that begin in the range. The frame already shown at `start_s`
        is included if it stays for at least half a second, or if no other begins in the range.
        """
        first, last = self._find_first(start_s), self._find_first(end_s) - 1
        if first > 0 and (first > last or self.get_time(first) - start_s >= _MIN_SEEN_S):
            first -= 1
        return first, max(first, last)

    def _find_first(self, time_s: float) -> int:
        """Return the number of the first frame that begins at `time_s` or later."""
        if self.times_s is None:
            return min(math.ceil(time_s * self.fps - _EPSILON), self.num_frames)
        return int(np.searchsorted(self.times_s, time_s - _EPSILON))

    def sample(self, start_s: float, end_s: float, config: VideoConfig) -> tuple[int, ...]:
        """Return the numbers of the frames to sample from `start_s` to `end_s`, ascending.

        If frames are evenly spaced, evenly spaced numbers are taken, as in training.
        Otherwise the frames shown at evenly spaced times are taken.
        """
        first, last = self.find_range(start_s, end_s)
        if self.times_s is None:
            total = last - first + 1
            duration_s = self.duration_s if total == self.num_frames else total / self.fps
            return tuple(first + i for i in sample_indices(total, self.fps, duration_s, config))
        low, high = max(start_s, self.get_time(first)), self.get_time(last)
        skip, duration_s = config.skip_secs, end_s - start_s
        if skip > 0 and duration_s - 2 * skip > config.max_frames * config.fps:
            low, high = low + skip, min(end_s - skip, high)
        points = np.linspace(low, max(low, high), _count_frames(duration_s, config))
        numbers = np.searchsorted(self.times_s, points + _EPSILON, "right") - 1
        return tuple(np.unique(numbers.clip(first, last)).tolist())


def build_even_timeline(num_frames: int, rate: Fraction | float) -> Timeline:
    """Build the timeline of evenly spaced frames, `rate` per second."""
    return Timeline(num_frames, float(rate), float(num_frames / rate))


def build_delay_timeline(delays_s: Sequence[float]) -> Timeline:
    """Build the timeline of frames that are shown for `delays_s` seconds each."""
    ends_s = np.cumsum(delays_s)
    duration_s = math.fsum(delays_s)
    is_even = min(delays_s) == max(delays_s)
    times_s = None if is_even else np.concatenate([[0.0], ends_s[:-1]])
    return Timeline(len(delays_s), len(delays_s) / duration_s, duration_s, times_s)


def build_measured_timeline(times_s: np.ndarray, last_s: float, rate: Fraction | float) -> Timeline:
    """Build the timeline of frames that begin at `times_s`, in a file that states `rate`.

    Containers often guess their rate. It is used if every frame is within one frame, and
    within a tenth of a second, of its even position; otherwise the times are used.

    Args:
        times_s: Seconds, float64 (frames,), ascending from 0.
        last_s: How long the last frame is shown; 0 if unknown. Ignored if it is longer than
            all other frames together.
        rate: Frames per second, above 0.
    """
    number, length_s = len(times_s), float(times_s[-1])
    drift_s = np.abs(times_s - np.arange(number) / float(rate)).max()
    if drift_s <= min(1 / rate, _MAX_DRIFT_S) or length_s <= 0:
        return build_even_timeline(number, rate)
    duration_s = length_s + (last_s if 0 < last_s <= length_s else length_s / (number - 1))
    return Timeline(number, number / duration_s, duration_s, times_s)


def sample_indices(
    total: int, fps: float, duration_s: float, config: VideoConfig
) -> tuple[int, ...]:
    """Return the numbers of the frames to sample from `total` frames at `fps`, ascending.

    Source: transformers 5.23, SmolVLMVideoProcessor.sample_frames.
    """
    count = _count_frames(duration_s, config)
    start, end, skip = 0, total - 1, config.skip_secs
    if skip > 0 and duration_s - 2 * skip > config.max_frames * config.fps:
        start, end = int(skip * fps), min(int(total - skip * fps), total - 1)
        if start >= end:
            start, end = 0, total - 1
    indices: list[int] = np.unique(np.linspace(start, end, count, dtype=int)).tolist()
    return tuple(indices)


def _count_frames(duration_s: float, config: VideoConfig) -> int:
    """Return how many frames to sample from `duration_s` seconds."""
    return max(1, round(min(config.fps * duration_s, config.max_frames)))


class HasTimeline:
    """Mixin for readers: number, rate and duration of the frames in `timeline`."""

    timeline: Timeline

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return self.timeline.num_frames

    @property
    def fps(self) -> float:
        """Frames per second, or their mean."""
        return self.timeline.fps

    @property
    def duration_s(self) -> float:
        """Duration of all frames in seconds."""
        return self.timeline.duration_s


SCENE_THRESHOLD = 10.0  # score from which a scene is new, 0 to 100; the default of FFmpeg's scdet
SCENE_SIZE = (160, 90)  # (width, height) at which frames are compared


def find_scene_starts(
    numbers: range, pictures: Iterable[Image.Image], max_frames: int
) -> tuple[int, ...]:
    """Return the first and the last of `numbers` and those at which a scene begins, ascending.

    The last one shows how a video ends that is a single scene.

    Args:
        numbers: Frame numbers.
        pictures: The frames with these numbers.
        max_frames: How many to return at most; the largest changes win. 1 returns the first.
    """
    ends = {numbers[0], numbers[-1]} if max_frames > 1 else {numbers[0]}
    scores = zip(score_scenes(pictures), numbers, strict=True)
    changes = [(score, n) for score, n in scores if score >= SCENE_THRESHOLD and n not in ends]
    largest = heapq.nlargest(max_frames - len(ends), changes)
    return tuple(sorted(ends.union(number for _, number in largest)))


def score_scenes(pictures: Iterable[Image.Image]) -> Iterator[float]:
    """Yield how much each picture differs from the previous one, 0 to 100.

    The score is the mean absolute difference of the pixels, or the change of that difference
    since the previous picture if that is smaller, so steady motion is not a new scene.
    PyAV 14 does not give access to FFmpeg's filter, so it is computed here.

    Source: FFmpeg 8, libavfilter/vf_scdet.c.
    """
    from PIL import Image

    before: np.ndarray | None = None
    last = 0.0
    for picture in pictures:
        small = picture.resize(SCENE_SIZE, Image.Resampling.BILINEAR, reducing_gap=2.0)
        pixels = np.asarray(small, np.int16)
        if before is None:
            score = 0.0
        else:
            mean = float(np.abs(pixels - before).mean()) * 100 / 256
            score, last = min(mean, abs(mean - last)), mean
        before = pixels
        yield score
