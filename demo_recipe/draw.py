"""Pictures of colored shapes, drawn in code from a seed, with their labels.

A scene holds at most one shape in each of the nine cells of a 3 x 3 division of
the picture, and each shape's centre keeps clear of the cells' borders: so "where"
has one true answer, and so has the reading order of a description.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

# Two to four anchors a color; a shape's own color lies between two of them.
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (190, 20, 20), (235, 50, 40)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 120, 20)),
    "yellow": ((255, 255, 0), (250, 220, 20), (240, 230, 60)),
    "green": ((0, 128, 0), (0, 255, 0), (40, 160, 60), (50, 205, 50)),
    "blue": ((0, 0, 255), (30, 80, 220), (20, 40, 160), (30, 130, 240)),
    "purple": ((128, 0, 128), (140, 60, 190), (90, 20, 140), (148, 0, 211)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 200)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "gray": ((128, 128, 128), (160, 160, 160), (110, 110, 110)),
}
COLOR_NAMES = tuple(COLORS)

PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

_CENTRES = ((0.13, 0.27), (0.41, 0.59), (0.73, 0.87))  # of a cell's middle, as a share of the side
_LARGEST_RADIUS = {1: 0.38, 2: 0.26, 3: 0.22, 4: 0.19}
_SMALLEST_RADIUS = 0.1
_COUNT_WEIGHTS = (0.03, 0.25, 0.25, 0.25, 0.22)  # of 0, 1, ... 4 shapes
_PLAIN_BACKGROUNDS = ("white", "black", "gray")
ROTATIONS = {"square": 0.12, "triangle": 0.25, "star": 0.6, "diamond": 0.08, "cross": 0.15}


@dataclass(frozen=True)
class Shape:
    """One shape. `x`, `y` and `radius` are in pixels; `cell` is 0..8 in reading order."""

    kind: str
    color: str
    rgb: RGB
    x: float
    y: float
    radius: float
    rotation: float
    outlined: bool
    cell: int

    @property
    def place(self) -> str:
        """Where it is, as an answer says it."""
        return PLACES[self.cell]

    def extent(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a square around it, as shares of the picture's sides."""
        r = self.radius
        return (
            (self.x - r) / width,
            (self.y - r) / height,
            (self.x + r) / width,
            (self.y + r) / height,
        )


@dataclass(frozen=True)
class Scene:
    """A picture of `width` x `height` pixels; `shapes` are in reading order of their cells."""

    width: int
    height: int
    background: str
    background_rgb: RGB
    shapes: tuple[Shape, ...]
    smooth: bool


def sample_scene(
    rng: np.random.Generator, count: int | None = None, size: tuple[int, int] | None = None
) -> Scene:
    """A scene of `count` shapes, of 0 to 4 where `count` is None; it follows from its arguments.

    Args:
        size: Width and height in pixels; None draws them too.
    """
    if count is None:
        count = int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    width, height = sample_size(rng) if size is None else size
    background = str(rng.choice(_PLAIN_BACKGROUNDS if rng.random() < 0.3 else COLOR_NAMES))
    if rng.random() < 0.5:
        background = "white"
    shapes = _sample_shapes(rng, (width, height), background, count)
    return Scene(
        width=width,
        height=height,
        background=background,
        background_rgb=sample_rgb(rng, background),
        shapes=tuple(sorted(shapes, key=lambda shape: shape.cell)),
        smooth=bool(rng.random() < 0.5),
    )


def compute_cell_extent(cell: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of one of the nine cells, as shares of the picture's sides."""
    column, row = cell % 3, cell // 3
    return column / 3, row / 3, (column + 1) / 3, (row + 1) / 3


def sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels: 96 to 640, most of them small, sides at most 1 to 2."""
    long_side = 96 * math.exp(rng.random() ** 1.5 * math.log(640 / 96))
    aspect = 1.0 if rng.random() < 0.4 else math.exp(rng.random() * math.log(2))
    sides = (round(long_side), round(long_side / aspect))
    return sides if rng.random() < 0.6 else (sides[1], sides[0])


def sample_rgb(rng: np.random.Generator, color: str) -> RGB:
    """A color between two of the anchors of `color`, within a few steps of noise."""
    anchors = np.array(COLORS[color], float)
    first, second = anchors[rng.integers(len(anchors))], anchors[rng.integers(len(anchors))]
    mixed = first + (second - first) * rng.random()
    if rng.random() < 0.5:
        mixed = mixed + rng.normal(0, 4, 3)
    red, green, blue = (int(value) for value in np.clip(np.round(mixed), 0, 255))
    return red, green, blue


def _sample_shapes(
    rng: np.random.Generator, size: tuple[int, int], background: str, count: int
) -> list[Shape]:
    """`count` shapes in different cells that touch neither each other nor the border.

    In half of the pictures of several they are small or large, with nothing between.
    """
    apart = count > 1 and rng.random() < 0.5
    largest = _LARGEST_RADIUS[count] if count else 0.0
    while True:
        shapes: list[Shape] = []
        for cell in rng.permutation(9)[:count]:
            shape = _sample_shape(rng, size, int(cell), largest, apart)
            if shapes and rng.random() < 0.2:  # repeats make counts and "two red circles"
                twin = shapes[-1]
                shape = replace(shape, kind=twin.kind, color=twin.color, rgb=twin.rgb)
            shapes.append(shape)
            if shape.color == background or not _keeps_clear(shapes, size):
                break
        else:
            return shapes
        largest = max((0.995 if apart else 0.95) * largest, _SMALLEST_RADIUS)


def _keeps_clear(shapes: list[Shape], size: tuple[int, int]) -> bool:
    """Whether the last of `shapes` keeps clear of the others and of the border."""
    *others, last = shapes
    width, height = size
    gap = 0.03 * math.sqrt(width * height)
    if min(last.x, last.y, width - last.x, height - last.y) < last.radius + 1:
        return False
    return all(
        max(abs(last.x - other.x), abs(last.y - other.y)) > last.radius + other.radius + gap
        for other in others
    )


def _sample_shape(
    rng: np.random.Generator, size: tuple[int, int], cell: int, largest: float, apart: bool
) -> Shape:
    """A shape with its centre in `cell` and a radius of at most `largest`, a share of the scale.

    Args:
        apart: Whether the radius is of the smallest or the largest quarter.
    """
    width, height = size
    scale = math.sqrt(width * height)
    kind = str(rng.choice(SHAPES))
    color = str(rng.choice(COLOR_NAMES))
    smallest = _SMALLEST_RADIUS
    share = rng.random()
    if apart:
        share = share / 4 if rng.random() < 0.5 else 1 - share / 4
    radius = scale * (smallest + (largest - smallest) * share)
    (left, right), (top, bottom) = _CENTRES[cell % 3], _CENTRES[cell // 3]
    x = width * (left + (right - left) * rng.random())
    y = height * (top + (bottom - top) * rng.random())
    if apart:  # a large one moves inward, as far as its cell goes
        x = _move_inward(x, radius + 2, (width * left, width * right), width)
        y = _move_inward(y, radius + 2, (height * top, height * bottom), height)
    radius = min(radius, max(min(x, y, width - x, height - y) - 1.5, smallest * scale))
    rotation = ROTATIONS.get(kind, 0.0) * (2 * rng.random() - 1)
    outlined = bool(rng.random() < 0.1) and radius > 20
    return Shape(kind, color, sample_rgb(rng, color), x, y, radius, rotation, outlined, cell)


def _move_inward(at: float, margin: float, within: tuple[float, float], side: float) -> float:
    """`at`, brought as near to `margin` from both ends of `side` as `within` allows."""
    first, last = within
    return float(np.clip(at, min(margin, last), max(side - margin, first)))


def compute_outline(shape: Shape) -> Points:
    """The polygon of `shape`, in pixels."""
    angles = [-math.pi / 2 + 2 * math.pi * i / 48 for i in range(48)]
    corners: list[tuple[float, float]]
    if shape.kind == "circle":
        corners = [(math.cos(a), math.sin(a)) for a in angles]
    elif shape.kind == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape.kind == "triangle":
        corners = [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
    elif shape.kind == "diamond":
        corners = [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    elif shape.kind == "star":
        corners = [(r * math.cos(a), r * math.sin(a)) for a, r in _make_star()]
    else:
        arm, tip = 0.3, 0.95
        corners = [(-arm, -tip), (arm, -tip), (arm, -arm), (tip, -arm), (tip, arm), (arm, arm)]
        corners += [(-x, -y) for x, y in corners]
    sin, cos, r = math.sin(shape.rotation), math.cos(shape.rotation), shape.radius
    return [
        (shape.x + r * (x * cos - y * sin), shape.y + r * (x * sin + y * cos)) for x, y in corners
    ]


def compute_area(shape: Shape) -> float:
    """What `shape` covers, in square pixels."""
    points = compute_outline(shape)
    following = points[1:] + points[:1]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, following, strict=True))) / 2


def _make_star() -> list[tuple[float, float]]:
    """Angle and radius of a star's ten corners, a tip on top."""
    return [(-math.pi / 2 + math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]


def render(scene: Scene) -> Image.Image:
    """The picture of `scene`, RGB; smooth ones are drawn at twice the size and reduced."""
    zoom = 2 if scene.smooth and max(scene.width, scene.height) < 400 else 1
    size = (scene.width * zoom, scene.height * zoom)
    picture = Image.new("RGB", size, scene.background_rgb)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        points = [(x * zoom, y * zoom) for x, y in compute_outline(shape)]
        if shape.outlined:
            edge = max(1, round(shape.radius * zoom / 20))
            pen.polygon(points, fill=shape.rgb, outline=(0, 0, 0), width=edge)
        else:
            pen.polygon(points, fill=shape.rgb)
    return picture.reduce(zoom) if zoom > 1 else picture


def render_index_map(scene: Scene, side: int) -> np.ndarray:
    """Which shape each pixel shows, uint8 (side, side), the picture squashed to a square.

    0 is the background, i + 1 is `scene.shapes[i]`.
    """
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    for i, shape in enumerate(scene.shapes):
        points = [
            (x * side / scene.width, y * side / scene.height) for x, y in compute_outline(shape)
        ]
        pen.polygon(points, fill=i + 1)
    return np.asarray(picture)
