"""Frames with which a new scene begins, found by FFmpeg's `scdet` filter."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
from av.filter import Graph
from PIL import Image

THRESHOLD = 10.0  # of scdet's score, 0 to 100; its own default
SIZE = (160, 90)  # pixels that frames are compared at


def scene_starts(numbers: range, pictures: Iterable[Image.Image], most: int) -> tuple[int, ...]:
    """The first of `numbers`, and those whose pictures differ from what was before.

    If there are more than `most`, those that differ most are kept.
    """
    scored = zip(_scores(pictures), numbers, strict=True)
    found = [(score, number) for score, number in scored if score >= THRESHOLD]
    kept = heapq.nlargest(most - 1, (one for one in found if one[1] != numbers[0]))
    return (numbers[0], *sorted(number for _, number in kept))


def _scores(pictures: Iterable[Image.Image]) -> Iterator[float]:
    """How much each picture differs from those before, 0 to 100."""
    graph = Graph()
    source = graph.add_buffer(
        width=SIZE[0], height=SIZE[1], format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25)
    )
    graph.link_nodes(source, graph.add("scdet", "threshold=0"), graph.add("buffersink")).configure()
    for number, picture in enumerate(pictures):
        small = picture.resize(SIZE, Image.Resampling.BILINEAR, reducing_gap=2.0)
        frame = av.VideoFrame.from_image(small)
        frame.pts = number
        graph.push(frame)
        yield float(graph.pull().metadata["lavfi.scd.score"])
