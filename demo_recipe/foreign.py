"""A held-out dataset of pictures that the recipe does not draw.

    python -m demo_recipe.foreign --out FOLDER [--items 200] [--seed 0]

It writes FOLDER/foreign.jsonl in the format that `mlx-smolvlm eval` reads: bar charts by matplotlib
and by Vega-Lite (vl-convert), and scenes, textures and shapes that the demo should not name.
Training draws none of them, and prints none of the words under the bars.
"""

from __future__ import annotations

import argparse
import io
import json
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo_recipe import foreign_scenes, plot_questions, unknown
from demo_recipe.charts import sample_values
from demo_recipe.items import Box, TurnMaker, join_parts
from demo_recipe.lettering import MEASURE
from demo_recipe.lexicon import HELD_OUT
from demo_recipe.plot_questions import PlotBar
from demo_recipe.plots import READABLE_CAP

_REALM = 2**41
# As a user writes them: names that CSS and matplotlib know, and what the demo calls them.
_COLORS = {
    "red": "red", "crimson": "red", "#d62728": "red", "blue": "blue", "#1f77b4": "blue",
    "steelblue": "blue", "green": "green", "#2ca02c": "green", "orange": "orange",
    "#ff7f0e": "orange", "purple": "purple", "#9467bd": "purple", "gray": "gray", "gold": "yellow",
    "yellow": "yellow", "hotpink": "pink", "#e377c2": "pink", "black": "black",
}  # fmt: skip
_STYLES = (
    "default",
    "default",
    "default",
    "ggplot",
    "seaborn-v0_8",
    "bmh",
    "seaborn-v0_8-whitegrid",
)
_WHOLE = Box((0.0, 0.0, 1.0, 1.0))

Chart = tuple[Image.Image, tuple[PlotBar, ...], str]


def sample_bars(rng: np.random.Generator) -> tuple[str, tuple[PlotBar, ...], list[str]]:
    """Draw the kind of the labels, the bars of a chart, and their colors for a program."""
    count = 2 + int(rng.integers(4))
    values = sample_values(rng, count)
    while max(values) <= 3:  # matplotlib puts halves at the axis of such a chart
        values = sample_values(rng, count)
    kind = "letter" if rng.random() < 0.5 else "word"
    if kind == "letter":
        start = int(rng.integers(26 - count))
        labels = list(string.ascii_uppercase[start : start + count])
    else:
        pool = [word for word in HELD_OUT if 3 <= len(word) <= 5]
        labels = [pool[int(i)].lower() for i in rng.permutation(len(pool))[:count]]
        if rng.random() < 0.4:
            labels = [label.capitalize() for label in labels]
    colors: dict[str, str] = {}
    for i in rng.permutation(len(_COLORS)):
        code, name = list(_COLORS.items())[int(i)]
        colors.setdefault(name, code)
    names, codes = list(colors)[:count], list(colors.values())[:count]
    if rng.random() < 0.3:
        names, codes = [names[0]] * count, [codes[0]] * count
    bars = (
        PlotBar(label, name, value, _WHOLE, _WHOLE)
        for label, name, value in zip(labels, names, values, strict=True)
    )
    return kind, tuple(bars), codes


def draw_with_matplotlib(rng: np.random.Generator) -> Chart:
    """Draw a bar chart with matplotlib, and return it with its bars and what can be read."""
    import matplotlib
    from matplotlib import pyplot as plt

    matplotlib.use("agg")
    kind, bars, codes = sample_bars(rng)
    width, height = 3 + 3.4 * rng.random(), 2.3 + 2.5 * rng.random()
    longest = max(len(bar.label) for bar in bars)
    size = min(10 + 12 * rng.random(), 85 * width / len(bars) / longest)  # labels do not overlap
    with (
        plt.style.context(_STYLES[int(rng.integers(len(_STYLES)))]),
        plt.rc_context({"font.size": size, "xtick.labelsize": size, "ytick.labelsize": 0.9 * size}),
    ):
        figure, axes = plt.subplots(figsize=(width, height), layout="tight")
        axes.bar([bar.label for bar in bars], [bar.value for bar in bars], color=codes)
        if rng.random() < 0.4:
            axes.set_title(_sample_word(rng))
        if rng.random() < 0.25:
            axes.set_ylabel(_sample_word(rng))
        if rng.random() < 0.3:
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        if rng.random() < 0.3:
            axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, dpi=100)
        plt.close(figure)
    picture = Image.open(file, formats=["PNG"]).convert("RGB")
    return picture, bars, _find_readable(kind, size * 100 / 72, picture)


def draw_with_vega(rng: np.random.Generator) -> Chart:
    """Draw a bar chart with Vega-Lite, and return it with its bars and what can be read."""
    import vl_convert

    kind, bars, codes = sample_bars(rng)
    wide, longest = 160 + int(rng.integers(140)), max(len(bar.label) for bar in bars)
    size = min(11 + int(rng.integers(9)), int(1.6 * wide / len(bars) / longest))
    rows = [{"label": bar.label, "value": bar.value} for bar in bars]
    title = _sample_word(rng) if rng.random() < 0.5 else None
    axis = {"labelAngle": 0, "labelFontSize": size, "title": title, "grid": rng.random() < 0.5}
    spec = {
        "data": {"values": rows},
        "mark": "bar",
        "width": wide,
        "height": 130 + int(rng.integers(130)),
        "encoding": {
            "x": {"field": "label", "type": "nominal", "sort": None,
                  "axis": {**axis, "grid": False}},
            "y": {"field": "value", "type": "quantitative", "axis": {**axis, "title": None}},
            "color": {
                "field": "label", "type": "nominal", "legend": None,
                "scale": {"domain": [bar.label for bar in bars], "range": codes},
            },
        },
    }  # fmt: skip
    file = io.BytesIO(vl_convert.vegalite_to_png(spec))
    picture = Image.open(file, formats=["PNG"]).convert("RGB")
    return picture, bars, _find_readable(kind, size, picture)


def _find_readable(kind: str, pixels: float, picture: Image.Image) -> str:
    """Return `kind`, or "none" if labels of a font of so many `pixels` are too small to read."""
    cap = 0.72 * pixels * MEASURE / max(picture.size)
    return kind if cap >= READABLE_CAP else "none"


def _sample_word(rng: np.random.Generator) -> str:
    return HELD_OUT[int(rng.integers(len(HELD_OUT)))].capitalize()


def draw_unknown(rng: np.random.Generator, kind: str) -> Image.Image:
    """Draw a scene, a texture or shapes of kinds that training does not draw."""
    makers = foreign_scenes.KINDS[kind]
    aspect = np.exp(rng.normal() * 0.25)
    side = 120 + 360 * rng.random()
    size = round(side * aspect**0.5), round(side / aspect**0.5)
    return makers[int(rng.integers(len(makers)))](rng, size)


Item = tuple[str, Image.Image, str, str]  # task, picture, question, answer


def collect_charts(
    program: str, draw: Callable[[np.random.Generator], Chart], count: int, seed: int
) -> Iterator[Item]:
    """Yield up to `count` items of every family of charts that `draw` draws."""
    found: Counter[str] = Counter()
    for number in range(20 * count):
        if number > 3 * count and min(found.values()) >= count:
            return
        rng = np.random.default_rng([_REALM, *program.encode(), seed, number])
        picture, bars, labels = draw(rng)
        makers: list[TurnMaker] = [maker for maker, _ in plot_questions.makers(bars, labels)]
        for make in makers:
            turn = make(rng)
            task = turn.family.replace("plot", program)
            if found[task] < count:
                found[task] += 1
                yield task, picture, join_parts(turn.question), join_parts(turn.answer)


def collect_unknown(count: int, seed: int) -> Iterator[Item]:
    """Yield `count` items of every kind of picture that the demo should not name."""
    for kind in foreign_scenes.KINDS:
        for number in range(count):
            rng = np.random.default_rng([_REALM, *kind.encode(), seed, number])
            yield (
                f"cannot tell: {kind}",
                draw_unknown(rng, kind),
                unknown.sample_question(rng),
                unknown.CANNOT_TELL,
            )


def collect(count: int, seed: int = 0) -> Iterator[Item]:
    """Yield up to `count` items of every family."""
    yield from collect_charts("matplotlib", draw_with_matplotlib, count, seed)
    yield from collect_charts("vega", draw_with_vega, count, seed)
    yield from collect_unknown(count, seed)


def write_dataset(out: Path, count: int, seed: int) -> int:
    """Write the items to `out`/foreign.jsonl and their pictures; return the number of lines."""
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    saved: dict[int, tuple[str, Image.Image]] = {}
    for task, picture, question, answer in collect(count, seed):
        if id(picture) not in saved:
            saved[id(picture)] = (f"foreign-{len(saved):05d}.png", picture)
            picture.save(out / saved[id(picture)][0])
        content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(
            json.dumps({"task": task, "messages": messages, "images": [saved[id(picture)][0]]})
        )
    (out / "foreign.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description="Write the held-out pictures of other programs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_dataset(options.out, options.items, options.seed), "lines")


if __name__ == "__main__":
    main()
