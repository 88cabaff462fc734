"""Draws a comparison: errors of matrices and layers, and the histogram of KL divergences."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_smolvlm.convert.compare.report import (
    KL_EDGES_NATS,
    Comparison,
    LayerLoss,
    MatrixLoss,
    make_summary_rows,
)
from mlx_smolvlm.files import write_output

WIDTH, MARGIN = 1200, 40
INK, PALE = (30, 30, 40), (150, 150, 160)
BLUE, ORANGE = (40, 100, 200), (220, 120, 30)
LOW, HIGH = (238, 243, 250), (170, 20, 40)  # colors of the least and the most error
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def draw_plot(comparison: Comparison, path: Path) -> None:
    """Write the plot of `comparison` as a PNG file; raises what `write_output` raises."""
    write_output(path, render_plot(comparison))


def render_plot(comparison: Comparison) -> bytes:
    """Draw the plot of `comparison`, and return the bytes of a PNG file."""
    from PIL import Image, ImageDraw

    rows = [f"{name}: {text}" for name, text in make_summary_rows(comparison)]
    grid = group_by_kind(comparison.matrices)
    top = MARGIN + 26 * len(rows) + 20
    middle = top + 50 + 26 * len(grid) + (60 if grid else -50)
    image = Image.new("RGB", (WIDTH, middle + 420), "white")
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        _draw_text(draw, (MARGIN, MARGIN + 26 * number), _truncate(row, 135), 17)
    if grid:
        _draw_heat_map(draw, grid, (MARGIN, top, WIDTH - MARGIN, middle))
    half = WIDTH // 2
    _draw_layers(draw, comparison.layers, (MARGIN, middle + 20, half - 30, middle + 370))
    _draw_histogram(draw, comparison, (half + 30, middle + 20, WIDTH - MARGIN, middle + 370))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def group_by_kind(matrices: Sequence[MatrixLoss]) -> dict[str, list[tuple[int, float]]]:
    """Group matrices by kind: pairs of the layer and the relative error.

    A matrix outside of the layers has layer 0.
    """
    rows: dict[str, list[tuple[int, float]]] = {}
    for one in matrices:
        match = re.search(r"layers\.(\d+)\.", one.path)
        kind = one.path.replace(match.group(), "") if match else one.path
        kind = kind.replace("vision_model.encoder.", "vision ").replace("text_model.", "text ")
        layer = int(match.group(1)) if match else 0
        rows.setdefault(kind, []).append((layer, one.relative_error))
    return rows


def _draw_heat_map(draw: Any, rows: dict[str, list[tuple[int, float]]], box: Box) -> None:
    """Draw a row for each kind of matrix and a cell for each layer; red is the most error."""
    left, top, right, _ = box
    most = max((error for row in rows.values() for _, error in row), default=0) or 1e-9
    columns = max(layer for row in rows.values() for layer, _ in row) + 1
    _draw_text(draw, (left, top), f"Relative error of each matrix, by layer (red: {most:.4f})", 20)
    begin = left + 290
    cell = min(26, (right - begin - 80) / columns)
    for number, (kind, row) in enumerate(rows.items()):
        y = top + 40 + 26 * number
        _draw_text(draw, (left, y), kind, 16)
        for layer, error in row:
            x = begin + cell * layer
            color = tuple(
                round(low + (high - low) * error / most)
                for low, high in zip(LOW, HIGH, strict=True)
            )
            draw.rectangle([x, y, x + cell - 2, y + 22], fill=color)
        _draw_text(draw, (begin + cell * columns + 10, y), f"{max(e for _, e in row):.4f}", 16)
    y = top + 42 + 26 * len(rows)
    for layer in range(0, columns, 5):
        _draw_text(draw, (begin + cell * layer, y), str(layer), 14, PALE)


def _draw_layers(draw: Any, layers: Sequence[LayerLoss], box: Box) -> None:
    """Draw the error after each layer, as a line for the decoder and one for the encoder."""
    left, top, right, bottom = box
    _draw_text(draw, (left, top), "Relative error of the states after each layer", 20)
    series = (
        ("decoder", BLUE, [one for one in layers if one.path.startswith("text")]),
        ("encoder", ORANGE, [one for one in layers if one.path.startswith("vision")]),
    )
    most = max((one.relative_error for one in layers), default=0) or 1e-9
    columns = max(len(values) for _, _, values in series)
    base, head, begin = bottom - 30, top + 60, left + 60
    draw.line([(begin, head), (begin, base), (right, base)], fill=PALE)
    _draw_text(draw, (left, head - 10), f"{most:.3f}", 14, PALE)
    step = (right - begin) / max(columns - 1, 1)
    for number, (name, color, values) in enumerate(series):
        if not values:
            continue
        _draw_text(draw, (begin + 15 + 110 * number, head - 28), name, 16, color)
        points = [
            (begin + step * i, base - (base - head) * one.relative_error / most)
            for i, one in enumerate(values)
        ]
        draw.line(points, fill=color, width=3)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    for i in range(0, columns, 5):
        _draw_text(draw, (begin + step * i - 4, base + 6), str(i), 14, PALE)


def _draw_histogram(draw: Any, comparison: Comparison, box: Box) -> None:
    """Draw the histogram of KL divergences."""
    left, top, right, bottom = box
    _draw_text(draw, (left, top), "Tokens by KL divergence, nats (log scale)", 20)
    base, head = bottom - 30, top + 60
    draw.line([(left, base), (right, base)], fill=PALE)
    bars = len(KL_EDGES_NATS) + 1
    step = (right - left) / bars
    losses = (
        ("texts", BLUE, comparison.texts),
        ("answers", ORANGE, comparison.answers_forced),
    )
    for number, (name, color, loss) in enumerate(losses):
        if loss is None:
            continue
        _draw_text(draw, (left + 15 + 110 * number, head - 28), name, 16, color)
        most = max(loss.kl_counts) / loss.tokens
        for i, count in enumerate(loss.kl_counts):
            height = (base - head) * count / loss.tokens / most
            x = left + step * (i + 0.1 + 0.4 * number)
            if count:
                draw.rectangle([x, base - height, x + step * 0.38, base], fill=color)
    for i, edge in enumerate(KL_EDGES_NATS):
        power = round(math.log10(edge), 3)
        if power.is_integer() and int(power) % 2 == 0:
            _draw_text(draw, (left + step * (i + 1) - 12, base + 6), f"{edge:g}", 14, PALE)


def _draw_text(
    draw: Any, place: tuple[float, float], text: str, size: int, color: tuple[int, ...] = INK
) -> None:
    """Draw `text` at `place`."""
    from PIL import ImageFont

    draw.text(place, text, fill=color, font=ImageFont.load_default(size))


def _truncate(text: str, most: int) -> str:
    """Return `text`, truncated to `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
