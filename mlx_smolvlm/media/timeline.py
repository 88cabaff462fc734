"""Frames with which a new scene begins, by the score of FFmpeg's `scdet` filter.

PyAV gives access to the filter's score from version 18 on; this code works with 14 too. A test
compares the two.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Protocol

import numpy as np
from PIL import Image

from mlx_smolvlm.config import VideoConfig

_EPSILON = 1e-6  # that a time may be off by rounding: of a frame, or of a second
_MIN_SEEN_S = 0.5  # that a frame which began before a range must stay on the screen in it
_MAX_DRIFT_S = 0.1  # of times from an even rate
_MAX_DURATION_S = 1e9  # that `clock` shows


class FrameTimes(Protocol):
    """What the prompt says of a clip: when its frames are shown, and how long the video is."""

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """Of the frames, in seconds."""
        ...

    @property
    def duration_s(self) -> float:
        """Of the whole video, in seconds."""
        ...


def format_timestamp(seconds: float) -> str:
    """`seconds` as MM:SS, cut down to whole ones; minutes go on beyond 59."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def format_duration(seconds: float) -> str:
    """`seconds` as H:MM:SS, cut down to whole ones."""
    return str(timedelta(seconds=int(min(seconds, _MAX_DURATION_S))))


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video begins, counted from the beginning of the first.

    Attributes:
        num_frames: At least 1.
        fps: Frames a second; their mean where they are not evenly spaced.
        duration_s: To the end of the last frame.
        times_s: Seconds, float64 (num_frames,), ascending; None if frame i begins at i / fps.
    """

    num_frames: int
    fps: float
    duration_s: float
    times_s: np.ndarray | None = None

    def get_time(self, index: int) -> float:
        """When the frame at `index` begins, in seconds."""
        return index / self.fps if self.times_s is None else float(self.times_s[index])

    def find_range(self, start_s: float, end_s: float) -> tuple[int, int]:
        """Numbers of the first and the last frame on the screen from `start_s` to `end_s`.

        They begin in that range. The one that is on the screen already at `start_s` is
        taken too if it stays for long enough, or if no other one begins in the range.
        """
        first, last = self._find_first(start_s), self._find_first(end_s) - 1
        if first > 0 and (first > last or self.get_time(first) - start_s >= _MIN_SEEN_S):
            first -= 1
        return first, max(first, last)

    def _find_first(self, time_s: float) -> int:
        """Number of the first frame that begins at `time_s` or later."""
        if self.times_s is None:
            return min(math.ceil(time_s * self.fps - _EPSILON), self.num_frames)
        return int(np.searchsorted(self.times_s, time_s - _EPSILON))

    def sample(self, start_s: float, end_s: float, chosen: VideoConfig) -> tuple[int, ...]:
        """Numbers of the frames to look at from `start_s` to `end_s`, ascending.

        Where frames are evenly spaced, they are evenly spread over the numbers, as in
        training. Elsewhere they are those on the screen at evenly spread times.
        """
        first, last = self.find_range(start_s, end_s)
        if self.times_s is None:
            total = last - first + 1
            duration_s = self.duration_s if total == self.num_frames else total / self.fps
            return tuple(first + i for i in sample_indices(total, self.fps, duration_s, chosen))
        low, high = max(start_s, self.get_time(first)), self.get_time(last)
        skip, duration_s = chosen.skip_secs, end_s - start_s
        if skip > 0 and duration_s - 2 * skip > chosen.max_frames * chosen.fps:
            low, high = low + skip, min(end_s - skip, high)
        points = np.linspace(low, max(low, high), _count_frames(duration_s, chosen))
        numbers = np.searchsorted(self.times_s, points + _EPSILON, "right") - 1
        return tuple(np.unique(numbers.clip(first, last)).tolist())


def build_even_timeline(num_frames: int, rate: Fraction | float) -> Timeline:
    """Of frames that are evenly spaced, `rate` a second."""
    return Timeline(num_frames, float(rate), float(num_frames / rate))


def build_delay_timeline(delays_s: Sequence[float]) -> Timeline:
    """Of frames that stay on the screen for `delays_s`."""
    ends_s = np.cumsum(delays_s)
    duration_s = math.fsum(delays_s)
    is_even = min(delays_s) == max(delays_s)
    times_s = None if is_even else np.concatenate([[0.0], ends_s[:-1]])
    return Timeline(len(delays_s), len(delays_s) / duration_s, duration_s, times_s)


def build_measured_timeline(times_s: np.ndarray, last_s: float, rate: Fraction | float) -> Timeline:
    """Of frames that begin at `times_s`, in a file that states `rate` frames a second.

    The rate is believed as long as no frame is further than a frame, or a tenth of a
    second, from where it should be. Containers often guess their rate.

    Args:
        times_s: Ascending, from 0 on.
        last_s: How long the last frame stays; 0 if it is not known. Not believed if it is
            longer than all others together.
        rate: Above 0.
    """
    number, length_s = len(times_s), float(times_s[-1])
    drift_s = np.abs(times_s - np.arange(number) / float(rate)).max()
    if drift_s <= min(1 / rate, _MAX_DRIFT_S) or length_s <= 0:
        return build_even_timeline(number, rate)
    duration_s = length_s + (last_s if 0 < last_s <= length_s else length_s / (number - 1))
    return Timeline(number, number / duration_s, duration_s, times_s)


def sample_indices(
    total: int, fps: float, duration_s: float, chosen: VideoConfig
) -> tuple[int, ...]:
    """Numbers of the frames to take of `total` at `fps`, ascending.

    Source: transformers 5.23, SmolVLMVideoProcessor.sample_frames.
    """
    wanted = _count_frames(duration_s, chosen)
    start, end, skip = 0, total - 1, chosen.skip_secs
    if skip > 0 and duration_s - 2 * skip > chosen.max_frames * chosen.fps:
        start, end = int(skip * fps), min(int(total - skip * fps), total - 1)
        if start >= end:
            start, end = 0, total - 1
    indices: list[int] = np.unique(np.linspace(start, end, wanted, dtype=int)).tolist()
    return tuple(indices)


def _count_frames(duration_s: float, chosen: VideoConfig) -> int:
    """How many frames to take of `duration_s` seconds."""
    return max(1, round(min(chosen.fps * duration_s, chosen.max_frames)))


class HasTimeline:
    """The number, rate and duration of a reader's frames."""

    timeline: Timeline

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return self.timeline.num_frames

    @property
    def fps(self) -> float:
        """Frames a second, or their mean."""
        return self.timeline.fps

    @property
    def duration_s(self) -> float:
        """Of all frames, in seconds."""
        return self.timeline.duration_s


SCENE_THRESHOLD = 10.0  # of the score, 0 to 100; scdet's own default
SCENE_SIZE = (160, 90)  # pixels that frames are compared at


def find_scene_starts(
    numbers: range, pictures: Iterable[Image.Image], most: int
) -> tuple[int, ...]:
    """The first of `numbers`, and those whose pictures differ from what was before.

    If there are more than `most`, those that differ most are kept.
    """
    scored = zip(score_scenes(pictures), numbers, strict=True)
    found = [(score, number) for score, number in scored if score >= SCENE_THRESHOLD]
    kept = heapq.nlargest(most - 1, (one for one in found if one[1] != numbers[0]))
    return (numbers[0], *sorted(number for _, number in kept))


def score_scenes(pictures: Iterable[Image.Image]) -> Iterator[float]:
    """How much each picture differs from the one before, 0 to 100.

    It is the mean difference of the pixels, or by how much that differs from the last
    one's, whichever is less: so what moves all the time is no change.

    Source: FFmpeg 8, libavfilter/vf_scdet.c.
    """
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
