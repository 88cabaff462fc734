"""Pictures that the demo cannot tell: textures, drawn scenes, and shapes and charts of other kinds.

All questions about them have the same answer, so that a photograph is not taken for a shape.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from demo_recipe import chart_questions, word_questions
from demo_recipe.draw import (
    COLOR_NAMES,
    PLACES,
    SHAPES,
    Points,
    Shape,
    compute_outline,
    sample_rgb,
)
from demo_recipe.items import LabeledPicture, Turn
from demo_recipe.object_sheet import KINDS as OBJECTS
from demo_recipe.questions import (
    AT,
    COLOR,
    COUNT,
    DESCRIBE,
    EXISTS,
    SHAPE_NOUNS,
    THE_SHAPE,
    WHAT,
    WHERE,
    add_article,
    make_plural,
    pick,
)
from demo_recipe.textures import (
    TEXTURES,
    Size,
    add_grain,
    color_map,
    make_noise,
    sample_palette,
    to_rgb,
)

CANNOT_TELL = "I cannot tell from this picture."


def sample(rng: np.random.Generator, size: Size) -> LabeledPicture:
    """A picture of `size` (width, height) pixels of what the demo does not know."""
    kinds = (TEXTURES, SCENES, FIGURES, CHARTS)
    group = kinds[int(rng.choice(4, p=(0.26, 0.34, 0.32, 0.08)))]
    picture = group[int(rng.integers(len(group)))](rng, size)
    return LabeledPicture(picture, (), ((ask, 1.0),))


def ask(rng: np.random.Generator) -> Turn:
    """Make a turn about what is in the picture, as it is asked about pictures that are known."""
    return Turn("unknown", sample_question(rng), CANNOT_TELL)


def sample_question(rng: np.random.Generator) -> str:
    """Draw a question that other pictures answer."""
    draw = rng.random()
    noun = pick(rng, SHAPE_NOUNS) if rng.random() < 0.4 else pick(rng, OBJECTS)
    if rng.random() < 0.2:
        noun = f"{pick(rng, COLOR_NAMES)} {pick(rng, SHAPES)}"
    if draw < 0.3:
        return pick(rng, WHAT)
    if draw < 0.5:
        return pick(rng, DESCRIBE)
    if draw < 0.58:
        return pick(rng, COLOR).format(noun)
    if draw < 0.66:
        return pick(rng, COUNT).format(make_plural(noun))
    if draw < 0.73:
        return pick(rng, WHERE).format(noun)
    if draw < 0.78:
        return pick(rng, EXISTS).format(add_article(noun))
    if draw < 0.83:
        return pick(rng, THE_SHAPE)
    if draw < 0.87:
        return pick(rng, AT).format(pick(rng, PLACES))
    if draw < 0.94:
        return pick(rng, word_questions.READ_IT)
    asked = pick(rng, (*chart_questions.WHICH, *chart_questions.WHICH_VALUE))
    return asked.format(pick(rng, (*chart_questions.HIGHEST, *chart_questions.LOWEST)))


def _fill_gradient(rng: np.random.Generator, size: Size, palette: np.ndarray) -> Image.Image:
    """A sky, or a wall: from the first color at the top to the second at the bottom."""
    width, height = size
    values = np.linspace(0, 1, height)[:, None] + np.zeros((1, width))
    if rng.random() < 0.5:
        values = np.clip(values + 0.3 * (make_noise(rng, size, 1.6) - 0.5), 0, 1)
    return color_map(values, palette)


def draw_hills(rng: np.random.Generator, size: Size) -> Image.Image:
    """A landscape: sky, sometimes a sun, and hills one behind the other."""
    width, height = size
    sky = np.array([[90, 150, 230], [225, 235, 245]], float)
    if rng.random() < 0.5:
        sky = sample_palette(rng, 2)
    picture = _fill_gradient(rng, size, sky)
    pen = ImageDraw.Draw(picture)
    if rng.random() < 0.5:
        x, y, r = (
            width * rng.random(),
            height * 0.3 * rng.random(),
            max(size) * (0.03 + 0.06 * rng.random()),
        )
        pen.ellipse((x - r, y - r, x + r, y + r), (255, 240, 150))
    color = sample_palette(rng, 1)[0]
    if rng.random() < 0.5:
        color = np.array([60, 110, 50], float) + rng.normal(size=3) * 25
    for layer in range(1 + int(rng.integers(4))):
        level = height * (0.4 + 0.16 * layer + 0.1 * rng.random())
        waves = rng.random((3, 3)) * (0.08 * height, 4, 7)
        points: Points = [
            (x, level + sum(a * math.sin(f * 2 * math.pi * x / width + p) for a, f, p in waves))
            for x in np.linspace(0, width, 40)
        ]
        pen.polygon([*points, (width, height), (0, height)], to_rgb(color * (1 - 0.15 * layer)))
    return add_grain(rng, picture)


def draw_house(rng: np.random.Generator, size: Size) -> Image.Image:
    """A house with a roof, windows and a door, trees beside it, a sun."""
    width, height = size
    picture = _fill_gradient(rng, size, np.array([[120, 180, 240], [210, 230, 250]], float))
    pen = ImageDraw.Draw(picture)
    ground = height * (0.7 + 0.15 * rng.random())
    pen.rectangle(
        (0, ground, width, height), to_rgb(np.array([80, 150, 60]) + rng.normal(size=3) * 20)
    )
    wall, roof, door = (to_rgb(color) for color in sample_palette(rng, 3))
    wide, high = width * (0.2 + 0.25 * rng.random()), height * (0.2 + 0.2 * rng.random())
    x, y = (width - wide) * rng.random(), ground - high
    pen.rectangle((x, y, x + wide, ground), wall)
    pen.polygon([(x - wide * 0.1, y), (x + wide * 1.1, y), (x + wide / 2, y - high * 0.6)], roof)
    pen.rectangle((x + wide * 0.4, ground - high * 0.5, x + wide * 0.6, ground), door)
    for left in (0.1, 0.7):
        pen.rectangle(
            (x + wide * left, y + high * 0.15, x + wide * (left + 0.2), y + high * 0.4),
            (190, 220, 250),
        )
    for _ in range(int(rng.integers(4))):
        tx, r = width * rng.random(), height * (0.06 + 0.08 * rng.random())
        pen.rectangle((tx - r * 0.2, ground - r, tx + r * 0.2, ground), (110, 70, 40))
        leaf = to_rgb(np.array([50, 120, 50]) + rng.normal(size=3) * 20)
        if rng.random() < 0.5:
            pen.ellipse((tx - r, ground - 3 * r, tx + r, ground - r), leaf)
        else:
            pen.polygon([(tx - r, ground - r), (tx + r, ground - r), (tx, ground - 3.5 * r)], leaf)
    if rng.random() < 0.6:
        r = height * 0.07
        pen.ellipse((width - 3 * r, r, width - r, 3 * r), (255, 220, 80))
    return add_grain(rng, picture) if rng.random() < 0.6 else picture


def draw_face(rng: np.random.Generator, size: Size) -> Image.Image:
    """A drawn face: a head with eyes, a mouth and hair, on a plain or shaded ground."""
    width, height = size
    picture = _fill_gradient(rng, size, sample_palette(rng, 2))
    if rng.random() < 0.3:
        picture.paste(to_rgb(sample_palette(rng, 1)[0]), (0, 0, width, height))
    pen = ImageDraw.Draw(picture)
    skin = to_rgb(np.array([230, 190, 150]) - 130 * rng.random() + rng.normal(size=3) * 8)
    hair, shirt = (to_rgb(color * 0.7) for color in sample_palette(rng, 2))
    r = min(size) * (0.18 + 0.15 * rng.random())
    x, y = width / 2 + (rng.random() - 0.5) * 0.4 * width, height * (0.4 + 0.1 * rng.random())
    pen.ellipse((x - 1.8 * r, y + 0.9 * r, x + 1.8 * r, y + 4 * r), shirt)
    pen.ellipse((x - 1.1 * r, y - 1.3 * r, x + 1.1 * r, y + 0.6 * r), hair)
    pen.ellipse((x - 0.9 * r, y - r, x + 0.9 * r, y + 1.15 * r), skin)
    for side in (-1, 1):
        ex = x + side * 0.38 * r
        pen.ellipse((ex - 0.17 * r, y - 0.3 * r, ex + 0.17 * r, y - 0.1 * r), (255, 255, 255))
        pen.ellipse((ex - 0.08 * r, y - 0.3 * r, ex + 0.08 * r, y - 0.1 * r), (30, 30, 30))
    pen.arc(
        (x - 0.4 * r, y + 0.1 * r, x + 0.4 * r, y + 0.7 * r),
        20,
        160,
        (150, 40, 40),
        max(1, round(r / 12)),
    )
    return add_grain(rng, picture) if rng.random() < 0.6 else picture


def draw_vehicle(rng: np.random.Generator, size: Size) -> Image.Image:
    """A car or a lorry on a road."""
    width, height = size
    picture = _fill_gradient(rng, size, sample_palette(rng, 2))
    pen = ImageDraw.Draw(picture)
    road = height * (0.65 + 0.15 * rng.random())
    pen.rectangle((0, road, width, height), (90, 90, 95))
    body, cabin = (to_rgb(color) for color in sample_palette(rng, 2))
    wide = width * (0.35 + 0.3 * rng.random())
    high, x = wide * (0.2 + 0.15 * rng.random()), (width - wide) * rng.random()
    pen.rectangle((x, road - high, x + wide, road), body)
    inset = wide * (0.1 + 0.25 * rng.random())
    pen.polygon(
        [(x + inset, road - high), (x + wide - inset, road - high),
         (x + wide - 1.4 * inset, road - 1.9 * high), (x + 1.3 * inset, road - 1.9 * high)], cabin,
    )  # fmt: skip
    r = high * 0.4
    for at in (0.2, 0.8):
        pen.ellipse((x + at * wide - r, road - r, x + at * wide + r, road + r), (25, 25, 25))
        pen.ellipse(
            (x + at * wide - r / 2, road - r / 2, x + at * wide + r / 2, road + r / 2),
            (170, 170, 170),
        )
    return add_grain(rng, picture) if rng.random() < 0.6 else picture


def draw_room(rng: np.random.Generator, size: Size) -> Image.Image:
    """The inside of a room: a far wall, floor, ceiling, and things as boxes in them."""
    width, height = size
    walls = [to_rgb(color) for color in sample_palette(rng, 5)]
    picture = Image.new("RGB", size, walls[0])
    pen = ImageDraw.Draw(picture)
    left, right = width * (0.15 + 0.2 * rng.random()), width * (0.65 + 0.2 * rng.random())
    upper, lower = height * (0.1 + 0.2 * rng.random()), height * (0.6 + 0.2 * rng.random())
    pen.polygon([(0, height), (left, lower), (right, lower), (width, height)], walls[1])
    pen.polygon([(0, 0), (left, upper), (right, upper), (width, 0)], walls[2])
    pen.rectangle((left, upper, right, lower), walls[3])
    for _ in range(1 + int(rng.integers(5))):
        x, y = width * rng.random(), height * (0.3 + 0.5 * rng.random())
        wide, high = width * (0.08 + 0.2 * rng.random()), height * (0.08 + 0.25 * rng.random())
        front = sample_palette(rng, 1)[0]
        pen.rectangle((x, y, x + wide, y + high), to_rgb(front))
        deep = 0.3 * wide
        pen.polygon(
            [(x, y), (x + deep, y - deep), (x + wide + deep, y - deep), (x + wide, y)],
            to_rgb(front * 1.25),
        )
        pen.polygon(
            [
                (x + wide, y),
                (x + wide + deep, y - deep),
                (x + wide + deep, y + high - deep),
                (x + wide, y + high),
            ],
            to_rgb(front * 0.7),
        )
    return add_grain(rng, picture)


def _sample_ground(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """A plain picture and the name of its color."""
    name = "white" if rng.random() < 0.5 else pick(rng, COLOR_NAMES)
    return Image.new("RGB", size, sample_rgb(rng, name)), name


def _sample_ink(rng: np.random.Generator, ground: str) -> tuple[int, int, int]:
    names = tuple(name for name in COLOR_NAMES if name != ground)
    return sample_rgb(rng, pick(rng, names))


def _place_shapes(rng: np.random.Generator, size: Size, count: int, radius: float) -> list[Shape]:
    """`count` shapes at random places; they overlap where there is no room."""
    width, height = size
    found: list[Shape] = []
    for tries in range(60 * count):
        x, y = (
            radius + (width - 2 * radius) * rng.random(),
            radius + (height - 2 * radius) * rng.random(),
        )
        if tries < 50 * count and any(math.dist((x, y), (s.x, s.y)) < 2.1 * radius for s in found):
            continue
        kind = pick(rng, SHAPES)
        found.append(Shape(kind, "", (0, 0, 0), x, y, radius, 0.0, False, 0))
        if len(found) == count:
            break
    return found


def draw_outlines(rng: np.random.Generator, size: Size) -> Image.Image:
    """One to four shapes that are outlined and not filled."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    count = 1 + int(rng.integers(4))
    radius = math.sqrt(size[0] * size[1]) * (0.3 / math.sqrt(count)) * (0.6 + 0.4 * rng.random())
    for shape in _place_shapes(rng, size, count, radius):
        points = compute_outline(shape)
        edge = max(1, round(radius * (0.05 + 0.1 * rng.random())))
        pen.line([*points, points[0], points[1]], _sample_ink(rng, ground), edge, joint="curve")
    return picture


def draw_many(rng: np.random.Generator, size: Size) -> Image.Image:
    """More shapes than the demo ever counts."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    count = 6 + int(rng.integers(8))
    radius = math.sqrt(size[0] * size[1] / count) * (0.2 + 0.2 * rng.random())
    one, kind, rgb = rng.random() < 0.5, pick(rng, SHAPES), _sample_ink(rng, ground)
    for shape in _place_shapes(rng, size, count, radius):
        made = replace(shape, kind=kind) if one else shape
        pen.polygon(compute_outline(made), rgb if one else _sample_ink(rng, ground))
    return picture


def draw_overlaps(rng: np.random.Generator, size: Size) -> Image.Image:
    """Large shapes that cover each other."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    radius = math.sqrt(size[0] * size[1]) * (0.2 + 0.15 * rng.random())
    x, y = size[0] / 2, size[1] / 2
    for _ in range(3 + int(rng.integers(3))):
        at = x + radius * rng.normal() * 0.6, y + radius * rng.normal() * 0.6
        shape = Shape(pick(rng, SHAPES), "", (0, 0, 0), *at, radius, 0.0, False, 0)
        pen.polygon(compute_outline(shape), _sample_ink(rng, ground))
    return picture


def _make_figure(rng: np.random.Generator, kind: str) -> Points:
    """The corners of a figure that the demo does not know, within a circle of radius 1."""
    turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    if kind.isdigit():
        sides = int(kind)
        start = rng.random() * math.pi
        return [
            (math.cos(start + 2 * math.pi * i / sides), math.sin(start + 2 * math.pi * i / sides))
            for i in range(sides)
        ]
    if kind == "ellipse":
        squash = 0.3 + 0.3 * rng.random()
        return [(math.cos(t), squash * math.sin(t)) for t in turn]
    if kind == "half":
        return [(math.cos(t / 2), math.sin(t / 2) - 0.4) for t in turn]
    if kind == "moon":
        outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.7, 2 * math.pi - 0.7, 50)]
        inner = [
            (0.45 + 0.65 * math.cos(t), 0.72 * math.sin(t))
            for t in np.linspace(2 * math.pi - 0.9, 0.9, 50)
        ]
        return [*outer, *inner]
    if kind == "bolt":
        return [
            (-0.1, -1),
            (0.5, -1),
            (0.15, -0.2),
            (0.6, -0.2),
            (-0.4, 1),
            (-0.05, 0.15),
            (-0.5, 0.15),
        ]
    if kind == "ell":
        return [(-0.8, -0.9), (-0.2, -0.9), (-0.2, 0.4), (0.8, 0.4), (0.8, 0.9), (-0.8, 0.9)]
    if kind == "bar":
        return [(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]
    radii = 0.6 + 0.4 * rng.random(12)  # a blot
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turn[::5], strict=True)]


_FIGURES = ("5", "6", "8", "ellipse", "half", "moon", "bolt", "ell", "bar", "blot", "6", "5")


def draw_figures(rng: np.random.Generator, size: Size) -> Image.Image:
    """One to three filled figures of kinds that the demo does not know."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    count = 1 + int(rng.integers(3))
    radius = math.sqrt(size[0] * size[1]) * (0.3 / math.sqrt(count)) * (0.5 + 0.5 * rng.random())
    for shape in _place_shapes(rng, size, count, radius):
        points = _make_figure(rng, pick(rng, _FIGURES))
        angle = (rng.random() - 0.5) * (2 * math.pi if rng.random() < 0.4 else 0.2)
        sin, cos = math.sin(angle), math.cos(angle)
        moved = [
            (shape.x + radius * (x * cos - y * sin), shape.y + radius * (x * sin + y * cos))
            for x, y in points
        ]
        pen.polygon(moved, _sample_ink(rng, ground))
    return picture


def draw_rings(rng: np.random.Generator, size: Size) -> Image.Image:
    """Rings, or arrows, or lines without any figure."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    width, height = size
    if rng.random() < 0.5:
        radius = min(size) * (0.15 + 0.25 * rng.random())
        x, y = (
            radius + (width - 2 * radius) * rng.random(),
            radius + (height - 2 * radius) * rng.random(),
        )
        pen.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            None,
            _sample_ink(rng, ground),
            max(2, round(radius * 0.3)),
        )
        return picture
    for _ in range(1 + int(rng.integers(12))):
        ends = [
            (float(width * rng.random()), float(height * rng.random()))
            for _ in range(2 + int(rng.integers(3)))
        ]
        pen.line(
            ends, _sample_ink(rng, ground), max(1, round(max(size) * (0.004 + 0.02 * rng.random())))
        )
    return picture


def draw_lines(rng: np.random.Generator, size: Size) -> Image.Image:
    """A chart of lines or of points between two axes."""
    width, height = size
    picture = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    left, bottom = width * 0.12, height * 0.88
    thick = max(1, round(max(size) / 190))
    pen.line([(left, height * 0.05), (left, bottom), (width * 0.97, bottom)], (0, 0, 0), thick)
    if rng.random() < 0.5:
        pen.line(
            [(left, height * 0.05), (width * 0.97, height * 0.05), (width * 0.97, bottom)],
            (0, 0, 0),
            thick,
        )
    points = rng.random() < 0.45
    for _ in range(1 + int(rng.integers(3))):
        rgb, count = _sample_ink(rng, "white"), 8 + int(rng.integers(30))
        walk = np.cumsum(rng.normal(size=count))
        values = (
            rng.random(count) if points else (walk - walk.min()) / max(float(np.ptp(walk)), 1e-9)
        )
        xs = np.linspace(left + 4, width * 0.95, count)
        ys = bottom - values * (bottom - height * 0.1)
        if points:
            for x, y in zip(xs, ys, strict=True):
                pen.ellipse((x - 2 * thick, y - 2 * thick, x + 2 * thick, y + 2 * thick), rgb)
        else:
            pen.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), rgb, 2 * thick)
    return picture


def draw_pie(rng: np.random.Generator, size: Size) -> Image.Image:
    """A pie chart."""
    picture, ground = _sample_ground(rng, size)
    pen = ImageDraw.Draw(picture)
    radius = min(size) * (0.25 + 0.2 * rng.random())
    x, y = size[0] / 2, size[1] / 2
    cuts = np.sort(rng.random(3 + int(rng.integers(4)))) * 360
    for start, stop in zip(cuts, [*cuts[1:], cuts[0] + 360], strict=True):
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.pieslice(box, start, stop, _sample_ink(rng, ground), (255, 255, 255))
    return picture


SCENES = (draw_hills, draw_hills, draw_house, draw_face, draw_vehicle, draw_room)
FIGURES = (
    draw_outlines, draw_outlines, draw_many, draw_many, draw_overlaps, draw_figures, draw_figures,
    draw_figures, draw_rings,
)  # fmt: skip
CHARTS = (draw_lines, draw_lines, draw_pie)
