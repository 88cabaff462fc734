"""Scenes, textures and shapes that training never draws, which the demo should not name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Size = tuple[int, int]  # width, height
Painter = Callable[[np.random.Generator, Size], Image.Image]
RGB = tuple[int, int, int]


def _shade(rng: np.random.Generator, color: RGB, spread: float = 20) -> RGB:
    red, green, blue = (
        int(v) for v in np.clip(np.array(color) + rng.normal(size=3) * spread, 0, 255)
    )
    return red, green, blue


def _any_color(rng: np.random.Generator) -> RGB:
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


def _spread_light(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """`picture` as through a lens: darker corners, a little blur and noise."""
    width, height = picture.size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.4 + rng.random())), float)
    pixels = pixels * (1 - 0.25 * (x * x + y * y))[..., None] + rng.normal(size=pixels.shape) * 6
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _value_noise(rng: np.random.Generator, size: Size, cells: int) -> np.ndarray:
    """Random values on a coarse grid, drawn smoothly to `size`; several octaves of them."""
    total = np.zeros((size[1], size[0]))
    for octave in range(4):
        count = cells * 2**octave
        grid = Image.fromarray((rng.random((count, count)) * 255).astype(np.uint8))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC), float) / 255 / 2**octave
    scaled: np.ndarray = (total - total.min()) / max(float(np.ptp(total)), 1e-9)
    return scaled


def _blend(values: np.ndarray, low: RGB, high: RGB) -> Image.Image:
    pixels = np.array(low) + (np.array(high, float) - low) * values[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _sky(rng: np.random.Generator, size: Size, top: RGB, low: RGB) -> Image.Image:
    rows = np.linspace(0, 1, size[1])[:, None] + np.zeros((1, size[0]))
    return _blend(rows, _shade(rng, top), _shade(rng, low))


def paint_sea(rng: np.random.Generator, size: Size) -> Image.Image:
    """A boat with a sail on the sea."""
    w, h = size
    picture = _sky(rng, size, (90, 140, 220), (250, 220, 190))
    pen = ImageDraw.Draw(picture)
    level = h * rng.uniform(0.45, 0.65)
    pen.rectangle((0, level, w, h), _shade(rng, (20, 80, 140)))
    for _ in range(60):
        x, y = w * rng.random(), rng.uniform(level, h)
        pen.line((x, y, x + w * 0.06, y), _shade(rng, (80, 140, 190)), 1)
    x, s = w * rng.uniform(0.25, 0.75), min(w, h) * rng.uniform(0.12, 0.25)
    pen.polygon(
        [
            (x - s, level),
            (x + s, level),
            (x + 0.6 * s, level + 0.4 * s),
            (x - 0.6 * s, level + 0.4 * s),
        ],
        _shade(rng, (120, 60, 30)),
    )
    pen.polygon(
        [(x, level - 1.8 * s), (x, level - 0.1 * s), (x + 0.9 * s, level - 0.1 * s)],
        (245, 245, 240),
    )
    return _spread_light(rng, picture)


def paint_city(rng: np.random.Generator, size: Size) -> Image.Image:
    """A city at dusk, with lit windows."""
    w, h = size
    picture = _sky(rng, size, (30, 30, 80), (230, 140, 90))
    pen = ImageDraw.Draw(picture)
    x = -5.0
    while x < w:
        wide, high = w * rng.uniform(0.06, 0.16), h * rng.uniform(0.25, 0.75)
        pen.rectangle((x, h - high, x + wide, h), _shade(rng, (40, 42, 55), 10))
        step = max(4.0, wide / 5)
        for wx in np.arange(x + step / 2, x + wide - step / 2, step):
            for wy in np.arange(h - high + step / 2, h - step, step * 1.3):
                if rng.random() < 0.45:
                    pen.rectangle((wx, wy, wx + step * 0.45, wy + step * 0.6), (250, 220, 130))
        x += wide
    return _spread_light(rng, picture) if rng.random() < 0.7 else picture


def paint_snowman(rng: np.random.Generator, size: Size) -> Image.Image:
    """A snowman in falling snow."""
    w, h = size
    picture = _sky(rng, size, (150, 170, 200), (225, 230, 240))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, h * 0.8, w, h), (245, 248, 250))
    x, s = w * rng.uniform(0.3, 0.7), h * rng.uniform(0.12, 0.17)
    for up, r in ((0.8, 1.2), (2.3, 0.85), (3.5, 0.6)):
        y = h * 0.85 - up * s
        pen.ellipse((x - r * s, y - r * s, x + r * s, y + r * s), (250, 250, 252), (190, 200, 215))
    y = h * 0.85 - 3.5 * s
    pen.polygon([(x, y), (x + 0.8 * s, y + 0.12 * s), (x, y + 0.2 * s)], (240, 130, 30))
    pen.rectangle((x - 0.5 * s, y - 1.3 * s, x + 0.5 * s, y - 0.5 * s), (25, 25, 30))
    for _ in range(50):
        fx, fy = w * rng.random(), h * rng.random()
        pen.ellipse((fx, fy, fx + 3, fy + 3), (255, 255, 255))
    return _spread_light(rng, picture) if rng.random() < 0.5 else picture


def paint_fish(rng: np.random.Generator, size: Size) -> Image.Image:
    """Fish and weeds under water."""
    w, h = size
    picture = _sky(rng, size, (60, 170, 200), (10, 50, 110))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = w * rng.random(), float(h)
        for _ in range(8):
            nx, ny = x + rng.normal() * w * 0.02, y - h * 0.05
            pen.line((x, y, nx, ny), _shade(rng, (20, 120, 60)), 3)
            x, y = nx, ny
    for _ in range(1 + int(rng.integers(4))):
        x, y, s = w * rng.random(), h * rng.uniform(0.2, 0.7), min(w, h) * rng.uniform(0.08, 0.2)
        body = _any_color(rng)
        pen.polygon(
            [(x - 0.8 * s, y), (x - 1.7 * s, y - 0.6 * s), (x - 1.7 * s, y + 0.6 * s)], body
        )
        pen.ellipse((x - s, y - 0.55 * s, x + s, y + 0.55 * s), body)
        pen.ellipse((x + 0.5 * s, y - 0.2 * s, x + 0.7 * s, y), (255, 255, 255))
    return _spread_light(rng, picture)


def paint_flowers(rng: np.random.Generator, size: Size) -> Image.Image:
    """Flowers with petals on stems, in a meadow."""
    w, h = size
    picture = _sky(rng, size, (150, 200, 240), (90, 160, 70))
    pen = ImageDraw.Draw(picture)
    for _ in range(3 + int(rng.integers(10))):
        x, y, s = w * rng.random(), h * rng.uniform(0.25, 0.9), min(w, h) * rng.uniform(0.03, 0.1)
        pen.line((x, y, x + rng.normal() * 5, h), (40, 110, 40), max(1, round(s / 5)))
        color = _any_color(rng)
        for k in range(6):
            a = k * math.pi / 3
            px, py = x + s * math.cos(a), y + s * math.sin(a)
            pen.ellipse((px - 0.6 * s, py - 0.6 * s, px + 0.6 * s, py + 0.6 * s), color)
        pen.ellipse((x - 0.5 * s, y - 0.5 * s, x + 0.5 * s, y + 0.5 * s), (250, 210, 60))
    return _spread_light(rng, picture) if rng.random() < 0.6 else picture


def paint_cat(rng: np.random.Generator, size: Size) -> Image.Image:
    """The face of a cat."""
    w, h = size
    picture = _sky(rng, size, _any_color(rng), _any_color(rng))
    pen = ImageDraw.Draw(picture)
    x, y, r = w / 2, h * 0.55, min(w, h) * rng.uniform(0.25, 0.38)
    fur = _shade(rng, (150, 120, 90), 45)
    for side in (-1, 1):
        pen.polygon(
            [
                (x + side * 0.9 * r, y - 0.3 * r),
                (x + side * 0.85 * r, y - 1.4 * r),
                (x + side * 0.2 * r, y - 0.9 * r),
            ],
            fur,
        )
    pen.ellipse((x - r, y - r, x + r, y + r), fur)
    for side in (-1, 1):
        ex = x + side * 0.42 * r
        pen.ellipse((ex - 0.2 * r, y - 0.4 * r, ex + 0.2 * r, y - 0.05 * r), (140, 200, 90))
        pen.ellipse((ex - 0.06 * r, y - 0.4 * r, ex + 0.06 * r, y - 0.05 * r), (10, 10, 10))
        for k in (-1, 0, 1):
            pen.line(
                (x + side * 0.2 * r, y + 0.35 * r, x + side * 1.3 * r, y + (0.3 + 0.2 * k) * r),
                (240, 240, 240),
                1,
            )
    pen.polygon(
        [(x - 0.1 * r, y + 0.15 * r), (x + 0.1 * r, y + 0.15 * r), (x, y + 0.3 * r)],
        (220, 130, 140),
    )
    return _spread_light(rng, picture) if rng.random() < 0.7 else picture


def paint_table(rng: np.random.Generator, size: Size) -> Image.Image:
    """A cup and fruit on a table, with shadows."""
    w, h = size
    picture = _sky(rng, size, _any_color(rng), _any_color(rng))
    pen = ImageDraw.Draw(picture)
    edge = h * rng.uniform(0.5, 0.65)
    pen.rectangle((0, edge, w, h), _shade(rng, (150, 100, 60)))
    x, s = w * rng.uniform(0.2, 0.45), min(w, h) * rng.uniform(0.12, 0.2)
    y = h * 0.75
    pen.ellipse((x - s, y + 0.7 * s, x + 2 * s, y + 1.1 * s), (90, 60, 35))
    cup = _any_color(rng)
    pen.ellipse(
        (x + 0.6 * s, y - 0.5 * s, x + 1.4 * s, y + 0.5 * s), None, cup, max(2, round(s / 7))
    )
    pen.polygon(
        [
            (x - 0.8 * s, y - s),
            (x + 0.8 * s, y - s),
            (x + 0.6 * s, y + 0.9 * s),
            (x - 0.6 * s, y + 0.9 * s),
        ],
        cup,
    )
    pen.ellipse((x - 0.8 * s, y - 1.2 * s, x + 0.8 * s, y - 0.8 * s), (60, 30, 15))
    for k in range(int(rng.integers(1, 4))):
        fx, r = x + (2 + 1.3 * k) * s, s * rng.uniform(0.5, 0.7)
        base = np.array(_shade(rng, (200, 60, 50), 60))
        for ring in range(8):
            q = r * (1 - ring / 9)
            tone = tuple(int(v) for v in np.clip(base * (0.6 + 0.09 * ring), 0, 255))
            pen.ellipse(
                (fx - q - ring, y + 0.3 * s - q - ring, fx + q - ring, y + 0.3 * s + q - ring), tone
            )
    return _spread_light(rng, picture)


def paint_forest(rng: np.random.Generator, size: Size) -> Image.Image:
    """Trunks of trees in fog, and a path."""
    w, h = size
    picture = _sky(rng, size, (200, 210, 200), (90, 120, 80))
    pen = ImageDraw.Draw(picture)
    pen.polygon(
        [(w * 0.45, h * 0.5), (w * 0.55, h * 0.5), (w * 0.8, h), (w * 0.2, h)],
        _shade(rng, (160, 140, 110)),
    )
    for k in range(25):
        depth = (k + 1) / 25
        x = w * rng.random()
        wide = w * 0.012 + w * 0.04 * depth
        tone = int(170 - 120 * depth)
        pen.rectangle(
            (x, 0, x + wide, h * (0.5 + 0.45 * depth)),
            (tone, tone - 15 if tone > 15 else 0, max(0, tone - 40)),
        )
    return _spread_light(rng, picture)


def paint_marble(rng: np.random.Generator, size: Size) -> Image.Image:
    """Veins of marble."""
    w, h = size
    _, x = np.mgrid[0:h, 0:w] / max(size)
    veins = np.abs(np.sin(8 * x + 9 * _value_noise(rng, size, 3)))
    return _spread_light(rng, _blend(veins**0.5, _any_color(rng), (240, 238, 232)))


def paint_grass(rng: np.random.Generator, size: Size) -> Image.Image:
    """Thousands of blades of grass, or of hair."""
    w, h = size
    tone = (60, 130, 40) if rng.random() < 0.5 else _any_color(rng)
    picture = Image.new("RGB", size, _shade(rng, tone, 30))
    pen = ImageDraw.Draw(picture)
    for _ in range(2500):
        x, y = w * rng.random(), h * (1.1 * rng.random())
        pen.line(
            (x, y, x + rng.normal() * 4, y - h * rng.uniform(0.04, 0.12)), _shade(rng, tone, 30), 1
        )
    return picture


def paint_weave(rng: np.random.Generator, size: Size) -> Image.Image:
    """Threads that go over and under each other."""
    w, h = size
    y, x = np.mgrid[0:h, 0:w]
    step = rng.uniform(5, 16)
    over = (np.floor(x / step) + np.floor(y / step)) % 2
    round_x, round_y = np.abs(np.sin(math.pi * x / step)), np.abs(np.sin(math.pi * y / step))
    light = np.where(over > 0, round_x, round_y)
    return _spread_light(rng, _blend(light, (20, 20, 20), _any_color(rng)))


def paint_sky(rng: np.random.Generator, size: Size) -> Image.Image:
    """Clouds."""
    values = np.clip(1.6 * _value_noise(rng, size, 2 + int(rng.integers(3))) - 0.4, 0, 1)
    return _blend(values, _shade(rng, (70, 130, 210)), (250, 250, 250))


def paint_dunes(rng: np.random.Generator, size: Size) -> Image.Image:
    """Ripples in sand."""
    w, h = size
    y, x = np.mgrid[0:h, 0:w] / max(size)
    bend = _value_noise(rng, size, 3)
    waves = np.sin(2 * math.pi * rng.uniform(6, 18) * (y + 0.25 * bend + 0.1 * x))
    return _spread_light(
        rng, _blend((waves + 1) / 2, _shade(rng, (150, 110, 70)), _shade(rng, (225, 190, 140)))
    )


def paint_stars(rng: np.random.Generator, size: Size) -> Image.Image:
    """The sky at night, with a band of light."""
    w, h = size
    picture = _blend(_value_noise(rng, size, 2) ** 2, (5, 6, 20), _shade(rng, (70, 60, 110)))
    pen = ImageDraw.Draw(picture)
    for _ in range(300):
        x, y, r = w * rng.random(), h * rng.random(), 0.3 + 1.3 * rng.random() ** 4
        pen.ellipse((x - r, y - r, x + r, y + r), _shade(rng, (240, 240, 230), 12))
    return picture


def paint_tartan(rng: np.random.Generator, size: Size) -> Image.Image:
    """Bands of color that cross."""
    w, h = size
    along, across = np.zeros((h, w, 3)), np.zeros((h, w, 3))
    for target, length in ((along, w), (across, h)):
        at = 0
        period = [
            (int(length * rng.uniform(0.02, 0.09)), np.array(_any_color(rng))) for _ in range(5)
        ]
        k = 0
        while at < length:
            wide, color = period[k % 5]
            wide = max(2, wide)
            if target is along:
                target[:, at : at + wide] = color
            else:
                target[at : at + wide] = color
            at, k = at + wide, k + 1
    return _spread_light(rng, Image.fromarray(((along + across) / 2).astype(np.uint8)))


def paint_spots(rng: np.random.Generator, size: Size) -> Image.Image:
    """The fur of a leopard: rough rings on a warm ground."""
    w, h = size
    picture = Image.new("RGB", size, _shade(rng, (205, 160, 95)))
    pen = ImageDraw.Draw(picture)
    step = max(w, h) * rng.uniform(0.07, 0.14)
    for cx in np.arange(0, w + step, step):
        for cy in np.arange(0, h + step, step):
            x, y, r = (
                cx + rng.normal() * step * 0.25,
                cy + rng.normal() * step * 0.25,
                step * rng.uniform(0.2, 0.4),
            )
            for _ in range(5):
                a = rng.random() * 2 * math.pi
                px, py, q = x + r * math.cos(a), y + r * math.sin(a), r * 0.5
                pen.ellipse((px - q, py - q, px + q, py + q), _shade(rng, (50, 30, 15), 8))
            pen.ellipse(
                (x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), _shade(rng, (170, 115, 55), 8)
            )
    return _spread_light(rng, picture)


def _plain(rng: np.random.Generator, size: Size) -> tuple[Image.Image, RGB]:
    """A plain ground, and a color that is well seen on it."""
    if rng.random() < 0.6:
        return Image.new("RGB", size, (255, 255, 255)), _shade(
            rng,
            ((200, 30, 30), (30, 60, 200), (20, 20, 20), (30, 140, 50))[int(rng.integers(4))],
            10,
        )
    return Image.new("RGB", size, _shade(rng, (20, 30, 60), 10)), _shade(rng, (240, 220, 90), 10)


def paint_heart(rng: np.random.Generator, size: Size) -> Image.Image:
    """A heart."""
    picture, ink = _plain(rng, size)
    t = np.linspace(0, 2 * math.pi, 80)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    s = min(size) * rng.uniform(0.015, 0.025)
    ImageDraw.Draw(picture).polygon(
        list(zip((size[0] / 2 + s * x).tolist(), (size[1] / 2 - s * y).tolist(), strict=True)), ink
    )
    return picture


def paint_arrow(rng: np.random.Generator, size: Size) -> Image.Image:
    """An arrow."""
    picture, ink = _plain(rng, size)
    s, x, y = min(size) * rng.uniform(0.2, 0.38), size[0] / 2, size[1] / 2
    corners = [(-1, -0.2), (0.2, -0.2), (0.2, -0.55), (1, 0), (0.2, 0.55), (0.2, 0.2), (-1, 0.2)]
    a = int(rng.integers(4)) * math.pi / 2
    ImageDraw.Draw(picture).polygon(
        [
            (
                x + s * (u * math.cos(a) - v * math.sin(a)),
                y + s * (u * math.sin(a) + v * math.cos(a)),
            )
            for u, v in corners
        ],
        ink,
    )
    return picture


def paint_trapezoid(rng: np.random.Generator, size: Size) -> Image.Image:
    """A trapezoid, or a parallelogram."""
    picture, ink = _plain(rng, size)
    s, x, y = min(size) * rng.uniform(0.2, 0.36), size[0] / 2, size[1] / 2
    slant = rng.uniform(0.35, 0.6)
    corners = [(-1 + slant, -0.6), (1 - slant, -0.6), (1, 0.6), (-1, 0.6)]
    if rng.random() < 0.5:
        corners = [(-1 + slant, -0.6), (1, -0.6), (1 - slant, 0.6), (-1, 0.6)]
    ImageDraw.Draw(picture).polygon([(x + s * u, y + s * v) for u, v in corners], ink)
    return picture


def paint_seven_sides(rng: np.random.Generator, size: Size) -> Image.Image:
    """A heptagon."""
    picture, ink = _plain(rng, size)
    s = min(size) * rng.uniform(0.2, 0.4)
    ImageDraw.Draw(picture).regular_polygon(
        (size[0] / 2, size[1] / 2, s), 7, rotation=int(rng.integers(360)), fill=ink
    )
    return picture


def paint_eight(rng: np.random.Generator, size: Size) -> Image.Image:
    """Eight circles or squares in rows."""
    picture, ink = _plain(rng, size)
    pen, round_ones = ImageDraw.Draw(picture), rng.random() < 0.7
    r = min(size[0] / 4, size[1] / 2) * rng.uniform(0.25, 0.4)
    for k in range(8):
        x, y = size[0] * (0.5 + k % 4) / 4, size[1] * (0.5 + k // 4) / 2
        box = (x - r, y - r, x + r, y + r)
        (pen.ellipse if round_ones else pen.rectangle)(box, ink)
    return picture


def paint_outlined(rng: np.random.Generator, size: Size) -> Image.Image:
    """An outlined polygon of five or six sides, or a dashed circle."""
    picture, ink = _plain(rng, size)
    pen = ImageDraw.Draw(picture)
    s, x, y = min(size) * rng.uniform(0.25, 0.4), size[0] / 2, size[1] / 2
    wide = max(1, round(s * rng.uniform(0.03, 0.1)))
    draw = rng.random()
    if draw < 0.3:
        for k in range(0, 360, 24):
            pen.arc((x - s, y - s, x + s, y + s), k, k + 14, ink, wide)
    elif draw < 0.6:
        pen.rectangle((x - s, y - 0.6 * s, x + s, y + 0.6 * s), None, ink, wide)
    else:
        pen.regular_polygon((x, y, s), 5 + int(rng.integers(2)), outline=ink, width=wide)
    return picture


def paint_spiral(rng: np.random.Generator, size: Size) -> Image.Image:
    """A spiral."""
    picture, ink = _plain(rng, size)
    t = np.linspace(0, 2 * math.pi * rng.uniform(2, 5), 300)
    r = t / t[-1] * min(size) * 0.42
    points = list(
        zip(
            (size[0] / 2 + r * np.cos(t)).tolist(),
            (size[1] / 2 + r * np.sin(t)).tolist(),
            strict=True,
        )
    )
    ImageDraw.Draw(picture).line(points, ink, max(2, min(size) // 40))
    return picture


KINDS: dict[str, tuple[Painter, ...]] = {
    "scene": (
        paint_sea, paint_city, paint_snowman, paint_fish, paint_flowers, paint_cat, paint_table,
        paint_forest,
    ),
    "texture": (
        paint_marble, paint_grass, paint_weave, paint_sky, paint_dunes, paint_stars, paint_tartan,
        paint_spots,
    ),
    "shape": (
        paint_heart, paint_arrow, paint_trapezoid, paint_seven_sides, paint_eight, paint_outlined,
        paint_spiral,
    ),
}  # fmt: skip
