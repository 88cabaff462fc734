"""Frames with which a new scene begins, by the score of FFmpeg's `scdet` filter.

PyAV gives access to the filter's score from version 18 on; this code works with 14 too. A test
compares the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

THRESHOLD = 10.0  # of the score, 0 to 100; scdet's own default
SIZE = (160, 90)  # pixels that frames are compared at


def scene_starts(numbers: range, pictures: Iterable[Image.Image], most: int) -> tuple[int, ...]:
    """The first of `numbers`, and those whose pictures differ from what was before.

    If there are more than `most`, those that differ most are kept.
    """
    scored = zip(scene_scores(pictures), numbers, strict=True)
    found = [(score, number) for score, number in scored if score >= THRESHOLD]
    kept = heapq.nlargest(most - 1, (one for one in found if one[1] != numbers[0]))
    return (numbers[0], *sorted(number for _, number in kept))


def scene_scores(pictures: Iterable[Image.Image]) -> Iterator[float]:
    """How much each picture differs from the one before, 0 to 100.

    It is the mean difference of the pixels, or by how much that differs from the last
    one's, whichever is less: so what moves all the time is no change.

    Source: FFmpeg 8, libavfilter/vf_scdet.c.
    """
    before: np.ndarray | None = None
    last = 0.0
    for picture in pictures:
        small = picture.resize(SIZE, Image.Resampling.BILINEAR, reducing_gap=2.0)
        pixels = np.asarray(small, np.int16)
        if before is None:
            score = 0.0
        else:
            mean = float(np.abs(pixels - before).mean()) * 100 / 256
            score, last = min(mean, abs(mean - last)), mean
        before = pixels
        yield score
