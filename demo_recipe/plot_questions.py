"""Questions about a chart of `plots`, and their true answers.

Their words are those of `chart_questions`; bars of one color are told by their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from demo_recipe.chart_questions import (
    BAR_COLOR,
    BAR_LETTER,
    COMPARE,
    COUNT,
    HIGHEST,
    LIST,
    LOWEST,
    VALUE,
    WHICH,
    WHICH_VALUE,
)
from demo_recipe.draw import COLOR_NAMES
from demo_recipe.items import Box, Part, Turn, TurnMaker, fill
from demo_recipe.questions import WHAT, pick
from demo_recipe.unknown import CANNOT_TELL

PLACES = ("first", "second", "third", "fourth", "fifth")
BAR_WORD = (
    "Which word is under the {} bar?", "What is the label of the {} bar?",
    "What does it say under the {} bar?", "Read the label of the {} bar.",
    "Which label does the {} bar have?",
)  # fmt: skip
WHICH_LABEL = (
    "Which letter has the {} bar?", "What is the label of the {} bar?",
    "What is under the {} bar?", "Which label has the {} bar?",
)  # fmt: skip


@dataclass(frozen=True)
class PlotBar:
    """One bar with the label under it, and the places of both."""

    label: str
    color: str
    value: int
    box: Box
    label_box: Box


Bars = tuple[PlotBar, ...]


def makers(bars: Bars, labels: str) -> tuple[tuple[TurnMaker, float], ...]:
    """Who asks about a chart of `bars`, from left to right, with weights.

    Args:
        labels: "letter" or "word" if labels are asked about, "none" if they are too small.
    """
    asking: list[tuple[Callable[[Bars, str, np.random.Generator], Turn], float]] = [
        (ask_extreme, 0.4), (ask_value, 0.1), (ask_compare, 0.18), (ask_count, 0.08),
        (ask_values, 0.04), (ask_what, 0.08),
    ]  # fmt: skip
    if _is_colored(bars):
        asking.append((ask_absent, 0.03))
    if labels != "none":
        asking.append((ask_label, 0.15 if labels == "letter" else 0.04))
        if _is_colored(bars) and labels == "letter":
            asking.append((ask_bar_color, 0.05))
    return tuple((partial(ask, bars, labels), share) for ask, share in asking)


def ask_extreme(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """The highest or the lowest bar: its color or its order, its label or its value."""
    high = rng.random() < 0.5
    bar = (max if high else min)(bars, key=lambda one: one.value)
    asked = Part(pick(rng, HIGHEST if high else LOWEST), (bar.box,))
    form = rng.random()
    if form < 0.1:
        return Turn("plot: highest value", fill(pick(rng, WHICH_VALUE), asked), CANNOT_TELL)
    if form < 0.45 and labels == "letter":
        answer = (Part(bar.label, (bar.label_box,)), Part("."))
        return Turn("plot: highest label", fill(pick(rng, WHICH_LABEL), asked), answer)
    said = fill("The {} bar.", Part(_name(bars, bar), (bar.box,)))
    return Turn("plot: highest", fill(pick(rng, WHICH), asked), said)


def ask_value(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """What one bar shows: the numbers at the axis are too small to tell it."""
    bar = _pick_bar(bars, rng)
    question = fill(pick(rng, VALUE), *_call(bars, bar, labels, rng))
    return Turn("plot: value", question, CANNOT_TELL)


def ask_compare(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """Whether one bar is higher, or lower, than another that has not its value."""
    while True:
        one, other = (bars[int(i)] for i in rng.choice(len(bars), 2, replace=False))
        if one.value != other.value:
            break
    high = rng.random() < 0.5
    (name,), (second,) = _call(bars, one, labels, rng), _call(bars, other, labels, rng)
    question = fill(pick(rng, COMPARE), name, Part("higher" if high else "lower"), second)
    yes = (one.value > other.value) == high
    answer = Part("Yes" if yes else "No", (one.box, other.box))
    return Turn("plot: compare", question, (answer, Part(".")))


def ask_values(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """What every bar shows."""
    return Turn("plot: values", pick(rng, LIST), CANNOT_TELL)


def ask_count(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """How many bars there are."""
    answer = Part(str(len(bars)), tuple(bar.box for bar in bars))
    return Turn("plot: count", pick(rng, COUNT), (answer, Part(".")))


def ask_what(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """What the picture is."""
    number = Part(str(len(bars)), tuple(bar.box for bar in bars))
    return Turn("plot: what", pick(rng, WHAT[:-1]), fill("A bar chart with {} bars.", number))


def ask_label(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """The label under a bar: a letter, since words are too small."""
    bar = _pick_bar(bars, rng)
    asked = BAR_LETTER if labels == "letter" else BAR_WORD
    question = fill(pick(rng, asked), Part(_name(bars, bar), (bar.box,)))
    answer = Part(bar.label, (bar.label_box,))
    if labels == "word":
        return Turn("plot: word of a bar", question, CANNOT_TELL)
    return Turn("plot: letter of a bar", question, (answer, Part(".")))


def ask_bar_color(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """The color of the bar over a letter."""
    bar = _pick_bar(bars, rng)
    question = fill(pick(rng, BAR_COLOR), Part(bar.label, (bar.label_box,)))
    answer = Part(bar.color.capitalize(), (bar.box,))
    return Turn("plot: color", question, (answer, Part(".")))


def ask_absent(bars: Bars, labels: str, rng: np.random.Generator) -> Turn:
    """A question about a bar of a color that the chart does not have."""
    missing = [name for name in COLOR_NAMES if name not in {bar.color for bar in bars}]
    name = f"{pick(rng, tuple(missing))} bar"
    return Turn(
        "plot: absent", pick(rng, VALUE).format(f"the {name}"), f"There is no {name}.", name
    )


def _is_colored(bars: Bars) -> bool:
    """Whether every bar has a color of its own."""
    return len({bar.color for bar in bars}) == len(bars)


def _pick_bar(bars: Bars, rng: np.random.Generator) -> PlotBar:
    return bars[int(rng.integers(len(bars)))]


def _name(bars: Bars, bar: PlotBar) -> str:
    """The word that tells `bar` from the others: its color, or its order from the left."""
    return bar.color if _is_colored(bars) else PLACES[bars.index(bar)]


def _call(bars: Bars, bar: PlotBar, labels: str, rng: np.random.Generator) -> tuple[Part, ...]:
    """ "the red bar", "the second bar" or "bar B", as a question names it."""
    if labels == "letter" and rng.random() < 0.35:
        return (Part(f"bar {bar.label}", (bar.label_box, bar.box)),)
    return (Part(f"the {_name(bars, bar)} bar", (bar.box,)),)
