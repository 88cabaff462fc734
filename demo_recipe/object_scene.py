"""Which objects a picture shows, and where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo_recipe.draw import RGB, sample_rgb
from demo_recipe.items import Box, Extent
from demo_recipe.object_sheet import KINDS, load_sprites

_COUNT_WEIGHTS = (0.02, 0.24, 0.28, 0.26, 0.2)  # of 0, 1, ... 4 objects
_CENTRES = ((0.13, 0.27), (0.41, 0.59), (0.73, 0.87))  # of a cell's middle, as a share of the side
_LARGEST = (0, 130, 80, 74, 68)  # by the number of objects, where the long side is 192
_SMALLEST = 36
_TINTS = ("pink", "yellow", "green", "blue", "gray")


@dataclass(frozen=True)
class Thing:
    """One object. `box` is left, top, right, bottom in pixels; `cell` is 0..8 in reading order."""

    kind: str
    box: tuple[int, int, int, int]
    cell: int
    flipped: bool


@dataclass(frozen=True)
class ObjectScene:
    """A picture of `size` pixels; `things` are in reading order of their cells."""

    size: tuple[int, int]
    background: str
    background_rgb: RGB
    things: tuple[Thing, ...]

    def extent(self, thing: Thing) -> Extent:
        """Where `thing` is, as shares of the width and the height."""
        (width, height), (left, top, right, bottom) = self.size, thing.box
        return left / width, top / height, right / width, bottom / height

    def boxes(self, kind: str | None = None) -> tuple[Box, ...]:
        """The places of the objects of `kind`, of all where it is None."""
        return tuple(Box(self.extent(t)) for t in self.things if kind in (None, t.kind))

    def count(self, kind: str) -> int:
        """How many objects are of `kind`."""
        return sum(thing.kind == kind for thing in self.things)


def sample_scene(rng: np.random.Generator, size: tuple[int, int]) -> ObjectScene:
    """Objects on a white or lightly tinted ground; it follows from `rng` alone."""
    count = int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    background, rgb = _sample_ground(rng)
    while True:
        things: list[Thing] = []
        for cell in rng.permutation(9)[:count]:
            kind = str(rng.choice(KINDS))
            if things and rng.random() < 0.22:  # repeats make counts and "two cats"
                kind = things[-1].kind
            thing = _place_thing(rng, size, kind, int(cell), count)
            if any(_is_touching(thing, other, size) for other in things):
                break
            things.append(thing)
        else:
            ordered = tuple(sorted(things, key=lambda thing: thing.cell))
            return ObjectScene(size, background, rgb, ordered)


def _sample_ground(rng: np.random.Generator) -> tuple[str, RGB]:
    """A background's name and color: white, or a color mixed with much white."""
    if rng.random() < 0.6:
        return "white", sample_rgb(rng, "white")
    name = str(rng.choice(_TINTS))
    share = 0.3 + 0.2 * rng.random()
    red, green, blue = (round(255 + share * (v - 255)) for v in sample_rgb(rng, name))
    return name, (red, green, blue)


def _place_thing(
    rng: np.random.Generator, size: tuple[int, int], kind: str, cell: int, count: int
) -> Thing:
    """An object with its centre in `cell`; one that is too large for a corner is in the center."""
    width, height = size
    unit = max(size) / 192
    side = unit * (_SMALLEST + (_LARGEST[count] - _SMALLEST) * rng.random())
    side = min(side, 0.9 * min(size))
    if side > 0.5 * min(size):
        if count == 1:
            cell = 4
        else:
            side = 0.5 * min(size)
    sprite = load_sprites()[kind]
    scale, stretch = side / max(sprite.size), np.exp(rng.uniform(-0.07, 0.07))
    w = max(8, min(round(sprite.width * scale * stretch), width - 2))
    h = max(8, min(round(sprite.height * scale / stretch), height - 2))
    left = _sample_start(rng, _CENTRES[cell % 3], width, w)
    top = _sample_start(rng, _CENTRES[cell // 3], height, h)
    return Thing(kind, (left, top, left + w, top + h), cell, bool(rng.random() < 0.5))


def _sample_start(
    rng: np.random.Generator, centre: tuple[float, float], room: int, extent: int
) -> int:
    """Where an object begins whose middle lies within `centre`, inside the picture."""
    middle = room * rng.uniform(*centre)
    return int(min(max(round(middle - extent / 2), 1), room - extent - 1))


def _is_touching(one: Thing, other: Thing, size: tuple[int, int]) -> bool:
    """Whether two objects come nearer to each other than a small gap."""
    gap = max(size) / 48
    (a, b, c, d), (e, f, g, h) = one.box, other.box
    return a - gap < g and e - gap < c and b - gap < h and f - gap < d
