"""The report of `bench`: a table, a dictionary for JSON, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_smolvlm.bench.machine import format_machine
from mlx_smolvlm.bench.measure import (
    BenchOptions,
    Measure,
    Result,
    compare_outputs,
    compute_ratio,
)

WIDTH, MARGIN, ROW, BAR = 1100, 40, 24, 430
INK, PALE = (30, 30, 40), (120, 120, 130)
COLORS = ((40, 100, 200), (220, 120, 30), (60, 150, 90), (150, 80, 170), (90, 90, 100))


@dataclass(frozen=True)
class Report:
    """The results of all programs.

    Attributes:
        model: Name of the model.
        machine: From `describe_machine`.
        options: What was measured.
        results: The first is the one that the others are compared with.
    """

    model: str
    machine: dict[str, Any]
    options: BenchOptions
    results: Sequence[Result]

    @property
    def labels(self) -> list[str]:
        """The labels of all measures, in order."""
        return list(dict.fromkeys(label for one in self.results for label in one.measures))

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        first, others = self.results[0], self.results[1:]
        return {
            "model": self.model,
            "machine": self.machine,
            "options": asdict(self.options),
            "results": [result.to_dict() for result in self.results],
            "ratios": {
                other.name: {
                    label: compute_ratio(first.measures[label], measure)
                    for label, measure in other.measures.items()
                    if label in first.measures
                }
                for other in others
            },
            "outputs": {
                other.name: compare_outputs(first, other) for other in others if not other.is_ours
            },
        }


def format_report(report: Report) -> str:
    """Return the report as text: the machine, a table, and what was compared."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    first = report.results[0]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for result in report.results:
        name = f"{result.name} {result.version}" if result.version else result.name
        table.add_column(name, justify="right")
        if result is not first:
            table.add_column("ratio", justify="right")
    for label in report.labels:
        cells = [label]
        for result in report.results:
            measure, ours = result.measures.get(label), first.measures.get(label)
            cells.append("" if measure is None else format_measure(measure))
            if result is not first:
                both = measure is not None and ours is not None
                cells.append(f"{compute_ratio(ours, measure):.2f}" if both else "")  # type: ignore[arg-type]  # both
        table.add_row(*cells)
    text = io.StringIO()
    console = Console(file=text, width=60 + 45 * len(report.results), markup=False, no_color=True)
    console.print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    notes = [
        f"{report.model}: medians of {report.options.repeat}, in parentheses the fastest and the "
        f"slowest; {report.options.prompt_tokens} tokens of prompt, "
        f"{report.options.max_tokens} generated",
        format_machine(report.machine),
    ]
    if len(report.results) > 1:
        notes.append(f"ratio: how many times better {first.name} is")
    notes += [
        f"{other.name}: {compare_outputs(first, other)}"
        for other in report.results[1:]
        if not other.is_ours
    ]
    return "\n".join([*lines, *notes]) + "\n"


def format_measure(measure: Measure) -> str:
    """Format the median with its unit, and the smallest and largest value."""
    median, low, high = (
        _format_number(value)
        for value in (measure.median, min(measure.values), max(measure.values))
    )
    return f"{median} {measure.unit} ({low}-{high})"


def _format_number(value: float) -> str:
    """Format `value` with three significant digits or all digits of an integer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def render_picture(report: Report) -> bytes:
    """Draw a group of bars for each measure, and return the bytes of a PNG file."""
    from PIL import Image, ImageDraw

    groups = [
        (
            label,
            [(n, r.measures[label]) for n, r in enumerate(report.results) if label in r.measures],
        )
        for label in report.labels
    ]
    rows = sum(len(bars) for _, bars in groups)
    height = 2 * MARGIN + 90 + ROW * rows + 12 * len(groups)
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    _draw_text(draw, (MARGIN, MARGIN - 10), f"mlx-smolvlm bench: {report.model}", 22)
    machine = report.machine
    subtitle = f"{machine['chip']}, {machine['cores']} cores, {machine['device']}"
    _draw_text(draw, (MARGIN, MARGIN + 20), subtitle, 15, PALE)
    x: float = MARGIN
    for number, result in enumerate(report.results):
        color = COLORS[number % len(COLORS)]
        draw.rectangle([x, MARGIN + 50, x + 14, MARGIN + 64], fill=color)
        name = f"{result.name} {result.version or ''}".strip()
        _draw_text(draw, (x + 20, MARGIN + 48), name, 15)
        x += 20 + 9 * len(name) + 30
    y = MARGIN + 84
    for label, bars in groups:
        most = max(max(measure.values) for _, measure in bars) or 1
        _draw_text(draw, (MARGIN, y + 2), label, 15)
        for number, measure in bars:
            left = MARGIN + 300
            scale = BAR / most
            color = COLORS[number % len(COLORS)]
            draw.rectangle([left, y + 2, left + measure.median * scale, y + ROW - 4], fill=color)
            low, high = (
                left + value * scale for value in (min(measure.values), max(measure.values))
            )
            draw.line([(low, y + ROW // 2 - 1), (high, y + ROW // 2 - 1)], fill=INK, width=2)
            _draw_text(draw, (left + BAR + 15, y + 2), format_measure(measure), 14)
            y += ROW
        y += 12
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _draw_text(
    draw: Any, place: tuple[float, float], text: str, size: int, color: tuple[int, ...] = INK
) -> None:
    """Draw `text` at `place`."""
    from PIL import ImageFont

    draw.text(place, text, fill=color, font=ImageFont.load_default(size))
