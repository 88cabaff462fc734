"""Good questions about the pictures and clips of `examples/`, in their plainest wording."""

from __future__ import annotations

import re

import numpy as np

from demo_recipe import chart_questions as charts
from demo_recipe import clip_questions as asking
from demo_recipe import object_questions as objects
from demo_recipe import page_questions as pages
from demo_recipe import word_questions as words
from demo_recipe.clips import Clip
from demo_recipe.draw import Scene
from demo_recipe.items import LabeledPicture, Part, Turn, join_parts
from demo_recipe.questions import (
    AT,
    BACKGROUND,
    COLOR,
    COUNT,
    DESCRIBE,
    EXISTS,
    WHAT,
    WHERE,
    add_article,
    capitalize,
    describe_scene,
    find_unique,
    list_contents,
    name_shape,
)

# By topic, {} for what a question names.
PLAIN: dict[str, tuple[str, ...]] = {
    "words": (
        words.READ_IT[0], words.READ_ONE["word"][0], words.LETTER[0], words.LETTERS[0],
        words.TEXT_COLOR[0], WHAT[0],
    ),
    "charts": (
        WHAT[0], charts.COUNT[0], charts.VALUE[0], charts.WHICH[0], charts.WHICH_LETTER[0],
        charts.COMPARE[0], charts.BAR_COLOR[0], charts.LIST[0],
    ),
    "objects": (
        WHAT[0], DESCRIBE[0], COUNT[0].format("objects"), WHERE[0], objects.OBJECT_AT[1],
        EXISTS[0], BACKGROUND[0],
    ),
    "pages": (
        pages.PAGE, pages.TITLE[0], pages.ITEMS[0], pages.ITEM_COUNT[0],
    ),
}  # fmt: skip
_TRIES = 300  # turns of each maker among which a wording is looked for


def asked(scene: Scene) -> list[Turn]:
    """Good questions about `scene`, in their plainest wording, with the true answers."""
    first, last = scene.shapes[0], scene.shapes[-1]
    turns = [
        Turn("what", WHAT[0], list_contents(scene)),
        Turn("describe", DESCRIBE[0], describe_scene(scene)),
        Turn("count", COUNT[0].format("shapes"), f"{len(scene.shapes)}."),
        Turn("exists", EXISTS[0].format(add_article(name_shape(first))), "Yes."),
        Turn("at", AT[0].format(last.place), f"{capitalize(add_article(name_shape(last)))}."),
        Turn("background", BACKGROUND[0], f"{scene.background.capitalize()}."),
    ]
    for shape in find_unique(scene, "kind")[:1]:
        turns.append(Turn("color", COLOR[0].format(shape.kind), f"{shape.color.capitalize()}."))
        turns.append(Turn("where", WHERE[0].format(shape.kind), f"{capitalize(shape.place)}."))
    return turns


def asked_of_drawn(drawn: LabeledPicture, topic: str) -> list[Turn]:
    """Those of the questions `PLAIN` of `topic` that fit `drawn`, with the true answers."""
    turns = [
        maker(np.random.default_rng(seed)) for seed in range(_TRIES) for maker, _ in drawn.makers
    ]
    turns = [turn for turn in turns if turn.family != "absent"]
    found = []
    for plain in PLAIN[topic]:
        wording = re.compile(re.escape(plain).replace(r"\{\}", ".+"))
        fitting = [turn for turn in turns if wording.fullmatch(join_parts(turn.question))]
        fitting.sort(key=lambda turn: len(join_parts(turn.question).split()))
        found += fitting[:1]
    return found


def asked_of_clip(clip: Clip) -> list[Turn]:
    """Good questions about `clip`, in their plainest wording, with the true answers."""
    happens = (*asking.describe_event(clip), Part("."))
    turns = [
        Turn("happens", asking.HAPPENS[0], happens),
        Turn("happens", asking.HAPPENS[1], happens),
        Turn("story", asking.STORY[0], asking.describe_clip(clip)),
    ]
    first = clip.shapes[0]
    if clip.paints:
        start, end = clip.colors[0].capitalize(), clip.colors[-1].capitalize()
        order = asking.list_colors(clip, first_capital=True)
        turns += [
            Turn("order", asking.ORDER[0], (*order, Part("."))),
            Turn("ends", asking.FIRST[0], f"{start}."),
            Turn("ends", asking.LAST[0], f"{end}."),
            Turn("ends", asking.AT_LAST[0].format(first.kind), f"{end}."),
        ]
    else:
        moves = clip.motion != "none"
        mover = f"{capitalize(add_article(name_shape(first)))}." if moves else "Nothing."
        turns += [
            Turn("mover", asking.MOVER[0], mover),
            Turn("moves", asking.MOVES[0].format(f"the {first.kind}"), "Yes." if moves else "No."),
        ]
    for shape in find_unique(clip.scene(0), "kind"):
        way = asking.describe_direction(clip, shape)
        turns.append(Turn("direction", asking.DIRECTION[0].format(f"the {shape.kind}"), way))
    return turns
