"""Questions about a bar chart, and their true answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from demo_recipe.draw import COLOR_NAMES
from demo_recipe.items import Box, Part, Turn, TurnMaker, fill
from demo_recipe.questions import DESCRIBE, WHAT, pick


@dataclass(frozen=True)
class Bar:
    """One bar with the letter under it, and the places of both."""

    letter: str
    color: str
    value: int
    box: Box
    letter_box: Box


Bars = tuple[Bar, ...]

VALUE = (
    "What is the value of {}?", "What value does {} have?", "How high is {}?",
    "Which value does {} show?", "What does {} show?", "Tell me the value of {}.",
    "Read the value of {}.", "How much is {}?",
)  # fmt: skip
WHICH = (
    "Which bar is the {}?", "Which is the {} bar?", "What is the {} bar?", "Name the {} bar.",
    "Which one is the {} bar?", "Which bar is {}?",
)  # fmt: skip
WHICH_LETTER = (
    "Which letter has the {} bar?", "Which letter is under the {} bar?",
    "What letter has the {} bar?", "What is the letter of the {} bar?",
    "Under which letter is the {} bar?", "Tell me the letter of the {} bar.",
)  # fmt: skip
WHICH_VALUE = (
    "What is the {} value?", "Which is the {} value?", "What is the value of the {} bar?",
    "Tell me the {} value.", "Which value is the {}?", "How high is the {} bar?",
)  # fmt: skip
HIGHEST = ("highest", "tallest", "highest", "largest", "biggest", "highest")
LOWEST = ("lowest", "shortest", "lowest", "smallest", "lowest")
COUNT = (
    "How many bars are there?", "How many bars do you see?", "How many bars does the chart have?",
    "Count the bars.", "How many bars are in the chart?", "How many bars?",
    "How many bars can you see?",
)  # fmt: skip
COMPARE = (
    "Is {} {} than {}?", "Is the value of {} {} than that of {}?",
    "Does {} have a {} value than {}?",
    "Do you think that {} is {} than {}?", "Is it true that {} is {} than {}?",
)  # fmt: skip
LIST = (
    "List the values.", "What are the values?", "Read the values from left to right.",
    "Which values does the chart show?", "Read the chart.", "List all values.",
    "What are the values of the bars?", "Give me the values.",
)  # fmt: skip
BAR_COLOR = (
    "What color is bar {}?", "What colour is bar {}?", "Which color is bar {}?",
    "Which colour does bar {} have?", "What is the color of bar {}?",
    "Tell me the color of bar {}.",
)  # fmt: skip
BAR_LETTER = (
    "Which letter is under the {} bar?", "What is the letter of the {} bar?",
    "Which letter does the {} bar have?", "What letter is below the {} bar?",
    "Read the letter under the {} bar.", "Tell me the letter of the {} bar.",
)  # fmt: skip


def makers(bars: Bars) -> tuple[tuple[TurnMaker, float], ...]:
    """Who asks about a chart of `bars`, from left to right; the weights sum up to 1."""
    return (
        (partial(ask_value, bars), 0.28), (partial(ask_extreme, bars), 0.14),
        (partial(ask_compare, bars), 0.13), (partial(ask_values, bars), 0.12),
        (partial(ask_count, bars), 0.07), (partial(ask_bar_color, bars), 0.06),
        (partial(ask_bar_letter, bars), 0.06), (partial(ask_absent, bars), 0.05),
        (partial(ask_what, bars), 0.05), (partial(ask_describe, bars), 0.04),
    )  # fmt: skip


def ask_value(bars: Bars, rng: np.random.Generator) -> Turn:
    """What one bar shows."""
    bar = _pick_bar(bars, rng)
    by_color = rng.random() < 0.5
    question = _fill(pick(rng, VALUE), _name_bar(bar, by_color))
    return Turn("value", question, (Part(str(bar.value), (bar.box,)), Part(".")))


def ask_extreme(bars: Bars, rng: np.random.Generator) -> Turn:
    """The highest or the lowest bar: its color, its letter or its value."""
    high = rng.random() < 0.5
    bar = (max if high else min)(bars, key=lambda one: one.value)
    asked = Part(pick(rng, HIGHEST if high else LOWEST), (bar.box,))
    form = rng.random()
    if form < 0.45:
        answer = fill("The {} bar.", Part(bar.color, (bar.box,)))
        return Turn("extreme", fill(pick(rng, WHICH), asked), answer)
    if form < 0.75:
        answer = (Part(bar.letter, (bar.letter_box,)), Part("."))
        return Turn("extreme", fill(pick(rng, WHICH_LETTER), asked), answer)
    answer = (Part(str(bar.value), (bar.box,)), Part("."))
    return Turn("extreme", fill(pick(rng, WHICH_VALUE), asked), answer)


def ask_compare(bars: Bars, rng: np.random.Generator) -> Turn:
    """Whether one bar is higher, or lower, than another that has not its value."""
    while True:
        one, other = (bars[int(i)] for i in rng.choice(len(bars), 2, replace=False))
        if one.value != other.value:
            break
    high = rng.random() < 0.5
    word = "higher" if high else "lower"
    by_color = rng.random() < 0.5
    question = _fill(
        pick(rng, COMPARE), _name_bar(one, by_color), (Part(word),), _name_bar(other, by_color)
    )
    yes = (one.value > other.value) == high
    answer = Part("Yes" if yes else "No", (one.box, other.box))
    return Turn("chart compare", question, (answer, Part(".")))


def ask_values(bars: Bars, rng: np.random.Generator) -> Turn:
    """What every bar shows, from left to right."""
    answer: list[Part] = []
    for bar in bars:
        answer += [Part(", ")] if answer else []
        answer += [Part(str(bar.value), (bar.box,))]
    return Turn("chart list", pick(rng, LIST), (*answer, Part(".")))


def ask_count(bars: Bars, rng: np.random.Generator) -> Turn:
    """How many bars there are."""
    answer = Part(str(len(bars)), tuple(bar.box for bar in bars))
    return Turn("bars", pick(rng, COUNT), (answer, Part(".")))


def ask_bar_color(bars: Bars, rng: np.random.Generator) -> Turn:
    """The color of the bar over a letter."""
    bar = _pick_bar(bars, rng)
    question = fill(pick(rng, BAR_COLOR), Part(bar.letter, (bar.letter_box,)))
    return Turn("bar color", question, (Part(bar.color.capitalize(), (bar.box,)), Part(".")))


def ask_bar_letter(bars: Bars, rng: np.random.Generator) -> Turn:
    """The letter under the bar of a color."""
    bar = _pick_bar(bars, rng)
    question = fill(pick(rng, BAR_LETTER), Part(bar.color, (bar.box,)))
    return Turn("bar letter", question, (Part(bar.letter, (bar.letter_box,)), Part(".")))


def ask_absent(bars: Bars, rng: np.random.Generator) -> Turn:
    """That there is no such bar, to a question that takes one for granted."""
    if rng.random() < 0.5:
        missing = [name for name in COLOR_NAMES if name not in {bar.color for bar in bars}]
        name = f"{pick(rng, tuple(missing))} bar"
        asked = f"the {name}"
    else:
        present = {bar.letter for bar in bars}
        near = [letter for letter in "ABCDEFGHIJ" if letter not in present]
        name = asked = f"bar {pick(rng, tuple(near))}"
    return Turn("absent", pick(rng, VALUE).format(asked), f"There is no {name}.", name)


def ask_what(bars: Bars, rng: np.random.Generator) -> Turn:
    """What the picture is."""
    number = Part(str(len(bars)), tuple(bar.box for bar in bars))
    asked = WHAT[:-1]  # which asks for shapes
    return Turn("what chart", pick(rng, asked), fill("A bar chart with {} bars.", number))


def ask_describe(bars: Bars, rng: np.random.Generator) -> Turn:
    """Letter, color and value of every bar."""
    answer = [Part("A bar chart with "), Part(str(len(bars)), tuple(bar.box for bar in bars))]
    for i, bar in enumerate(bars):
        answer += [Part(", " if i else " bars: "), Part(bar.letter, (bar.letter_box,))]
        answer += [Part(f" {bar.color}", (bar.box,)), Part(f" {bar.value}", (bar.box,))]
    return Turn("describe chart", pick(rng, DESCRIBE), (*answer, Part(".")))


def _pick_bar(bars: Bars, rng: np.random.Generator) -> Bar:
    return bars[int(rng.integers(len(bars)))]


def _name_bar(bar: Bar, by_color: bool) -> tuple[Part, ...]:
    """ "The red bar" or "bar B", as a question names it."""
    if by_color:
        return Part("the "), Part(bar.color, (bar.box,)), Part(" bar")
    return Part("bar "), Part(bar.letter, (bar.letter_box, bar.box))


def _fill(template: str, *names: tuple[Part, ...]) -> tuple[Part, ...]:
    """`template` with the parts of a name in place of each {}."""
    pieces = template.split("{}")
    said = [Part(pieces[0])]
    for name, piece in zip(names, pieces[1:], strict=True):
        said += [*name, Part(piece)]
    return tuple(part for part in said if part.text)
