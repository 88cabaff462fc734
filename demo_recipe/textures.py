"""Textures and noise that look more like photographs than like what the demo knows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Size = tuple[int, int]  # width, height


def sample_palette(rng: np.random.Generator, count: int = 3) -> np.ndarray:
    """Draw `count` colors, float (count, 3), mostly muted ones as photographs have."""
    base = rng.random((count, 3)) * 255
    gray = base.mean(1, keepdims=True)
    mixed: np.ndarray = gray + (base - gray) * (0.3 + 0.7 * rng.random())
    return mixed


def make_noise(rng: np.random.Generator, size: Size, power: float) -> np.ndarray:
    """Noise (height, width) from 0 to 1 whose spectrum falls with `power` of the frequency."""
    width, height = size
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    scale = np.maximum(np.hypot(x * width, y * height), 1.0) ** -power
    phases = rng.normal(size=(2, *scale.shape))
    noise = np.fft.irfft2(scale * (phases[0] + 1j * phases[1]), (height, width))
    low, high = noise.min(), noise.max()
    scaled: np.ndarray = (noise - low) / max(high - low, 1e-9)
    return scaled


def color_map(values: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The picture whose colors run through `palette` as `values` run from 0 to 1."""
    places = np.linspace(0, 1, len(palette))
    bands = [np.interp(values, places, palette[:, band]) for band in range(3)]
    return Image.fromarray(np.clip(np.stack(bands, -1), 0, 255).astype(np.uint8))


def add_grain(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """`picture` as a camera might give it: uneven light, noise, and blur in some."""
    width, height = picture.size
    pixels = np.asarray(picture, float)
    y, x = np.mgrid[0:height, 0:width]
    tilt = rng.normal(size=2) * 0.25
    pixels = pixels * (1 + tilt[0] * (x / width - 0.5) + tilt[1] * (y / height - 0.5))[..., None]
    pixels = pixels + rng.normal(size=(height, width, 1)) * 14 * rng.random()
    made = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return made.filter(ImageFilter.GaussianBlur(1.5 * rng.random())) if rng.random() < 0.4 else made


def draw_clouds_of_color(rng: np.random.Generator, size: Size) -> Image.Image:
    """Smooth noise in a few colors."""
    palette = sample_palette(rng, 2 + int(rng.integers(3)))
    return color_map(make_noise(rng, size, 0.9 + 1.4 * rng.random()), palette)


def draw_colored_noise(rng: np.random.Generator, size: Size) -> Image.Image:
    """Noise of its own in each band."""
    power = 0.6 + 1.4 * rng.random()
    shared = make_noise(rng, size, power)
    bands = [0.6 * shared + 0.4 * make_noise(rng, size, power) for _ in range(3)]
    pixels = np.stack(bands, -1) * 255 * (0.5 + 0.5 * rng.random(3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_bricks(rng: np.random.Generator, size: Size) -> Image.Image:
    """A wall of bricks or tiles, each a little different."""
    width, height = size
    wall, joint = sample_palette(rng, 2)
    picture = Image.new("RGB", size, to_rgb(joint))
    pen = ImageDraw.Draw(picture)
    high = max(5, round(max(size) * (0.05 + 0.13 * rng.random())))
    wide, gap = high * (1 + 2 * rng.random()), max(1, high // 8)
    shifted = rng.random() < 0.7
    for row in range(height // high + 1):
        x = -wide / 2 if shifted and row % 2 else 0.0
        while x < width:
            rgb = to_rgb(wall + rng.normal(size=3) * 14)
            pen.rectangle((x, row * high, x + wide - gap, (row + 1) * high - gap), rgb)
            x += wide
    return add_grain(rng, picture)


def draw_wood(rng: np.random.Generator, size: Size) -> Image.Image:
    """Grain of wood: bent stripes."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    if rng.random() < 0.5:
        x, y = y, x
    bend = make_noise(rng, size, 1.8) * (0.3 + rng.random())
    rings = np.sin(2 * math.pi * (5 + 20 * rng.random()) * (x + bend) + 2 * y)
    return add_grain(rng, color_map((rings + 1) / 2, sample_palette(rng, 2)))


def draw_mosaic(rng: np.random.Generator, size: Size) -> Image.Image:
    """Cells around random points, as gravel, leather or a giraffe has."""
    width, height = size
    small = max(24, width // 3), max(24, height // 3)
    count = 15 + int(rng.integers(80))
    points = rng.random((count, 2)) * small
    y, x = np.mgrid[0 : small[1], 0 : small[0]]
    far = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    nearest = np.sort(far, -1)
    palette = sample_palette(rng, 1) + rng.normal(size=(count, 3)) * (8 + 40 * rng.random())
    pixels = palette[far.argmin(-1)]
    edge = (nearest[..., 1] - nearest[..., 0]) < 1 + 1.5 * rng.random()
    pixels = np.where(edge[..., None], pixels * 0.4, pixels)
    made = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return add_grain(rng, made.resize(size, Image.Resampling.BICUBIC))


def draw_checks(rng: np.random.Generator, size: Size) -> Image.Image:
    """Stripes that cross, as cloth and floors have."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    one, two = 4 + 22 * rng.random(2)
    angle = rng.random() * math.pi
    across, along = (
        x * math.cos(angle) + y * math.sin(angle),
        y * math.cos(angle) - x * math.sin(angle),
    )
    waves = np.sin(2 * math.pi * one * across), np.sin(2 * math.pi * two * along)
    values = (waves[0] > 0).astype(float) + (waves[1] > 0) if rng.random() < 0.5 else sum(waves)
    values = (values - np.min(values)) / max(float(np.ptp(values)), 1e-9)
    return add_grain(rng, color_map(values, sample_palette(rng, 3)))


def draw_blobs(rng: np.random.Generator, size: Size) -> Image.Image:
    """Soft overlapping patches of light, as out of focus."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    pixels = np.zeros((height, width, 3)) + sample_palette(rng, 1)[0]
    for color in sample_palette(rng, 4 + int(rng.integers(14))):
        centre, radius = rng.random(2), 0.04 + 0.25 * rng.random() ** 2
        far = np.hypot(x - centre[0], y - centre[1]) / radius
        share = 1 / (1 + np.exp(np.clip((far - 1) * (3 + 20 * rng.random()), -30, 30)))
        pixels += (color - pixels) * (share * (0.4 + 0.6 * rng.random()))[..., None]
    return add_grain(rng, Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def to_rgb(color: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.clip(color, 0, 255))
    return red, green, blue


TEXTURES = (
    draw_clouds_of_color, draw_colored_noise, draw_bricks, draw_wood, draw_mosaic, draw_checks,
    draw_blobs,
)  # fmt: skip
