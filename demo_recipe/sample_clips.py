"""Clips drawn from a seed, with what happens in them.

What a clip shows is true of its sampled frames too: each color is seen in one of them at
least, and a shape travels a quarter of the picture or more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from demo_recipe.clips import (
    EVENTS,
    MOTIONS,
    Clip,
    Event,
    Motion,
    Paint,
    find_cell,
    sampled_indices,
)
from demo_recipe.draw import (
    COLOR_NAMES,
    ROTATIONS,
    SHAPES,
    Shape,
    sample_rgb,
    sample_size,
)

SAMPLED = (2, 3, 4, 5, 6, 7, 8)  # how many frames are sampled from a clip

_EVENT_WEIGHTS = (0.32, 0.1, 0.36, 0.22)
_FILE_FPS = (8.0, 10.0, 12.0, 15.0, 20.0, 24.0, 25.0, 30.0)
_LEAST_TRAVEL = 0.25  # of the picture's side
_LARGEST_SIDE = 480
_SMALLEST_RADIUS, _LARGEST_RADIUS = 0.09, 0.27  # of the picture's scale


def sample_clip(
    rng: np.random.Generator, sampled: int | None = None, event: Event | None = None
) -> Clip:
    """A clip of which `sampled` frames are shown, of 2 to 8 where None; it follows from `rng`."""
    sampled = int(rng.choice(SAMPLED)) if sampled is None else sampled
    event = EVENTS[int(rng.choice(len(EVENTS), p=_EVENT_WEIGHTS))] if event is None else event
    fps, frames = _sample_length(rng, sampled)
    count = 1 if rng.random() < (0.5 if event in ("moves", "stays") else 0.75) else 2
    if event == "background turns":
        count = int(rng.random() < 0.5)
    motion = MOTIONS[1 + int(rng.integers(4))] if event == "moves" else MOTIONS[0]
    while True:  # what is drawn so far stays, so that what fits rarely is not rare
        clip = _sample_event(rng, event, (fps, frames), count, motion)
        if clip is not None:
            return clip


def _sample_length(rng: np.random.Generator, sampled: int) -> tuple[float, int]:
    """Frames a second and frames of a file of which `sampled` frames are shown."""
    fps = float(rng.choice(_FILE_FPS))
    while True:
        frames = round(fps * (sampled - 0.5 + rng.random()))
        if len(sampled_indices(frames, fps)) == sampled:
            return fps, frames


def _sample_event(
    rng: np.random.Generator, event: Event, length: tuple[float, int], count: int, motion: Motion
) -> Clip | None:
    """A clip of `count` shapes in which `event` happens; None if what was drawn does not fit.

    Args:
        length: Frames a second, and frames.
    """
    width, height = _sample_even_size(rng)
    background = _sample_paint(rng, "white" if rng.random() < 0.4 else _pick_color(rng, ()))
    shapes: list[Shape] = []
    travel = (0.0, 0.0)
    for number in range(count):
        taken = (background[0],)
        shape = _sample_shape(rng, (width, height), taken, 0.19 if count == 2 else _LARGEST_RADIUS)
        if number == 0 and event == "moves":
            moved = _sample_path(rng, shape, motion, (width, height))
            if moved is None:
                return None
            shape, travel = moved
        if number and not _keeps_clear(shape, shapes[0], travel):
            return None
        alike = (shape.kind, shape.color) == (shapes[0].kind, shapes[0].color) if number else False
        if alike or (number and event == "shape turns" and shape.kind == shapes[0].kind):
            return None
        shapes.append(shape)
    paints: tuple[Paint, ...] = ()
    turns: tuple[int, ...] = ()
    if event in ("shape turns", "background turns"):
        paints, turns = _sample_turns(
            rng, event, background[0], shapes, sampled_indices(length[1], length[0])
        )
    if event == "shape turns":
        shapes[0] = replace(shapes[0], color=paints[0][0], rgb=paints[0][1])
    if event == "background turns":
        background = paints[0]
    pace = 1.0 if rng.random() < 0.5 else float(rng.uniform(0.7, 1.5))
    return Clip(
        event=event,
        width=width,
        height=height,
        fps=length[0],
        frames=length[1],
        background=background,
        shapes=tuple(shapes),
        travel=travel,
        pace=pace,
        motion=motion,
        paints=paints,
        turns=turns,
        smooth=bool(rng.random() < 0.5),
    )


def _sample_path(
    rng: np.random.Generator, shape: Shape, motion: Motion, size: tuple[int, int]
) -> tuple[Shape, tuple[float, float]] | None:
    """`shape` where it starts and its travel; None if there is no room to travel."""
    axis = 0 if motion in ("left", "right") else 1
    side, other = size[axis], size[1 - axis]
    edge = shape.radius + 2
    room = side - 2 * edge
    if room < _LEAST_TRAVEL * side:
        return None
    way = rng.uniform(_LEAST_TRAVEL * side, room)
    low = edge + rng.random() * (room - way)
    at = low if motion in ("right", "down") else low + way
    way = way if motion in ("right", "down") else -way
    across = (shape.x, shape.y)[1 - axis]
    drift = rng.uniform(-0.03, 0.03) * other if rng.random() < 0.4 else 0.0
    drift = float(np.clip(across + drift, edge, max(edge, other - edge)) - across)
    if axis == 0:
        return replace(shape, x=at), (float(way), drift)
    return replace(shape, y=at), (drift, float(way))


def _sample_turns(
    rng: np.random.Generator,
    event: Event,
    background: str,
    shapes: list[Shape],
    seen: tuple[int, ...],
) -> tuple[tuple[Paint, ...], tuple[int, ...]]:
    """Two or three different colors, and the frames at which they appear; each is in `seen`."""
    count = 3 if len(seen) > 3 and rng.random() < 0.4 else 2
    others = shapes[1:] if event == "shape turns" else shapes
    taken = [*([background] if event == "shape turns" else []), *(s.color for s in others)]
    colors: list[str] = []
    for _ in range(count):
        colors.append(_pick_color(rng, (*taken, *colors)))
    starts = sorted(int(i) for i in rng.choice(np.arange(1, len(seen)), count - 1, replace=False))
    turns = tuple(int(rng.integers(seen[i - 1] + 1, seen[i] + 1)) for i in starts)
    return tuple(_sample_paint(rng, color) for color in colors), turns


def _sample_shape(
    rng: np.random.Generator, size: tuple[int, int], taken: tuple[str, ...], largest: float
) -> Shape:
    """A shape anywhere within the picture, in none of the colors `taken`."""
    width, height = size
    kind, color = str(rng.choice(SHAPES)), _pick_color(rng, taken)
    radius = (width * height) ** 0.5 * rng.uniform(_SMALLEST_RADIUS, largest)
    radius = float(min(radius, 0.42 * min(size)))
    x = float(rng.uniform(radius + 2, width - radius - 2))
    y = float(rng.uniform(radius + 2, height - radius - 2))
    rotation = ROTATIONS.get(kind, 0.0) * (2 * rng.random() - 1)
    outlined = bool(rng.random() < 0.1) and radius > 20
    rgb = sample_rgb(rng, color)
    return Shape(kind, color, rgb, x, y, radius, rotation, outlined, find_cell(x, y, width, height))


def _keeps_clear(still: Shape, other: Shape, travel: tuple[float, float]) -> bool:
    """Whether `still` lies clear of `other` along the whole of its travel."""
    gap = 1.1 * (still.radius + other.radius) + 2
    left, right = sorted((other.x, other.x + travel[0]))
    top, bottom = sorted((other.y, other.y + travel[1]))
    dx = max(left - still.x, still.x - right, 0)
    dy = max(top - still.y, still.y - bottom, 0)
    return max(dx, dy) > gap


def _sample_even_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels, both even as H.264 wants them."""
    width, height = sample_size(rng)
    shrink = min(1.0, _LARGEST_SIDE / max(width, height))
    return 2 * round(width * shrink / 2), 2 * round(height * shrink / 2)


def _sample_paint(rng: np.random.Generator, color: str) -> Paint:
    return color, sample_rgb(rng, color)


def _pick_color(rng: np.random.Generator, taken: tuple[str, ...]) -> str:
    """A color that is not `taken`."""
    return str(rng.choice([color for color in COLOR_NAMES if color not in taken]))
