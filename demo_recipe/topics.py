"""The topics of the demo's pictures, and conversations about one or several pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from demo_recipe import charts, objects, pages, plots, prints, unknown, words
from demo_recipe.draw import Scene, render, sample_scene
from demo_recipe.items import Box, Glyph, LabeledPicture, Part, Turn, Wording, get_parts
from demo_recipe.questions import (
    MAKERS,
    SHAPE_NOUNS,
    add_article,
    ask_follow_up,
    make_casual,
    make_small_talk,
    pick,
)
from demo_recipe.unknown import CANNOT_TELL

Size = tuple[int, int]
Sampler = Callable[[np.random.Generator, Size], LabeledPicture]

UNKNOWN = (
    "How old is it?", "Who made this picture?", "When was this picture made?",
    "How much does it cost?", "What is the name of the owner?", "What is behind it?",
    "How heavy is it?", "Who drew this?", "What will happen next?",
    "Where was this picture taken?", "What time is it?", "What does it smell of?",
    "What sound does it make?", "How far away is it?", "What is inside it?", "Why was this made?",
    "Which day is it?", "How was the weather that day?", "What is on the other side?",
    "Who is the owner of the {}?", "How much does the {} cost?", "How heavy is the {}?",
    "How old is the {}?", "Who made the {}?", "What is behind the {}?", "Why is the {} there?",
)  # fmt: skip
ORDINALS = ("first", "second", "third")


def draw_shapes(rng: np.random.Generator, size: Size) -> LabeledPicture:
    """Draw a picture of colored shapes."""
    scene = sample_scene(rng, size=size)
    makers = tuple(((lambda r, m=maker: m(scene, r)), share) for maker, share in MAKERS)
    follow = partial(ask_follow_up, scene)
    return LabeledPicture(render(scene), make_shape_glyphs(scene), makers, scene.background, follow)


def make_shape_glyphs(scene: Scene) -> tuple[Glyph, ...]:
    """Return the shapes of `scene` for the dense labels."""
    kinds = [shape.kind for shape in scene.shapes]
    return tuple(
        Glyph(s.kind, s.extent(scene.width, scene.height), s.color, rank, kinds.count(s.kind))
        for rank, s in enumerate(scene.shapes)
    )


@dataclass(frozen=True)
class Topic:
    """A kind of picture.

    Attributes:
        weight: Its share of pictures, beside the others'.
        tiled: Whether it needs tiles: the global tile does not show it.
        long: Whether answers are long, so that fewer of them fit a batch.
    """

    sample: Sampler
    weight: float
    tiled: bool = False
    long: bool = False


TOPICS: dict[str, Topic] = {
    "shapes": Topic(draw_shapes, 0.4),
    "words": Topic(words.sample, 0.28),
    "charts": Topic(charts.sample, 0.2),
    "objects": Topic(objects.sample, 0.2),
    "pages": Topic(pages.sample, 0.15, tiled=True, long=True),
}
# Of the last stage alone, so that the earlier ones draw what they did.
LATE_TOPICS: dict[str, Topic] = {
    "plots": Topic(plots.sample, 0.45),
    "prints": Topic(prints.sample, 0.22),
    "unknown": Topic(unknown.sample, 0.32),
}
PICTURE_TOPICS = {**TOPICS, **LATE_TOPICS}


def draw(rng: np.random.Generator, topic: str, size: Size) -> LabeledPicture:
    """Draw a picture of `topic`; `size` is (width, height) in pixels."""
    return PICTURE_TOPICS[topic].sample(rng, size)


@dataclass(frozen=True)
class Focus:
    """Families of questions that are asked more often.

    Attributes:
        share: Of the questions that are tried to be of one of them.
        tries: Questions that are drawn for it.
        evenly: Whether one family is chosen first, so that rare ones come as often as others.
    """

    families: tuple[str, ...] = ()
    share: float = 0.4
    tries: int = 8
    evenly: bool = False


NO_FOCUS = Focus()


def ask(
    drawn: LabeledPicture, rng: np.random.Generator, count: int, focus: Focus = NO_FOCUS
) -> list[Turn]:
    """Make `count` turns about one picture; the second may refer to the first."""
    if count == 2 and drawn.talk is not None and rng.random() < 0.7:
        return drawn.talk(rng)
    weights = np.array([weight for _, weight in drawn.makers])
    picks = rng.choice(len(drawn.makers), size=count, p=weights / weights.sum())
    turns = [drawn.makers[i][0](rng) for i in picks]
    if focus.families and rng.random() < focus.share:
        wanted = (pick(rng, focus.families),) if focus.evenly else focus.families
        tries = rng.choice(len(drawn.makers), size=focus.tries, p=weights / weights.sum())
        drawn_again = (drawn.makers[i][0](rng) for i in tries)
        turns[-1] = next((turn for turn in drawn_again if turn.family in wanted), turns[-1])
    return [make_casual(ask_unknown(rng) if rng.random() < 0.03 else turn, rng) for turn in turns]


def ask_unknown(rng: np.random.Generator) -> Turn:
    """Make a turn with a question that no picture answers."""
    question = pick(rng, UNKNOWN).format(pick(rng, SHAPE_NOUNS))
    return Turn("cannot tell", question, CANNOT_TELL)


WHICH = (
    "Which picture shows {}?", "Which image shows {}?", "In which picture is {}?",
    "In which image do you see {}?", "Which of the pictures shows {}?",
)  # fmt: skip
NTH = (
    "What is in the {} picture?", "What is in the {} image?", "What does the {} picture show?",
    "What do you see in the {} image?",
)  # fmt: skip
HOW_MANY = ("How many pictures are there?", "How many images do you see?", "How many pictures?")
ABOUT = ("In the {} picture: ", "About the {} image: ", "Look at the {} picture. ")


def ask_several(pictures: list[LabeledPicture], rng: np.random.Generator) -> Turn:
    """Make a turn about several pictures, each with at least one object."""
    draw = rng.random()
    number = int(rng.integers(len(pictures)))
    chosen = pictures[number]
    if draw < 0.06:
        count = ("One", "Two", "Three")[len(pictures) - 1]
        return Turn("several", pick(rng, HOW_MANY), f"{count}.")
    named = list_things(chosen, number)
    others = {p.text for i, d in enumerate(pictures) if i != number for p in list_things(d, i)}
    own = [part for part in named if part.text not in others]
    if draw < 0.45 and own:
        part = own[int(rng.integers(len(own)))]
        template = pick(rng, WHICH)
        before, after = template.split("{}")
        question: Wording = (Part(before), part, Part(after))
        answer = Part(f"The {ORDINALS[number]} one.", part.boxes)
        return Turn("several", question, (answer,))
    turn = ask(chosen, rng, 1)[0]
    moved = get_parts(turn.question)
    lead = Part(pick(rng, ABOUT).format(ORDINALS[number]))
    return Turn(
        "several",
        (lead, *_move_boxes(moved, number)),
        _move_boxes(get_parts(turn.answer), number),
        turn.missing,
    )


def list_things(drawn: LabeledPicture, number: int) -> list[Part]:
    """Return the objects in picture `number`, as questions name them."""
    parts = []
    for glyph in drawn.glyphs:
        if len(glyph.kind) < 2 or glyph.kind in ("bar", "bullet", "rule"):
            continue
        for text in (glyph.kind, f"{glyph.color} {glyph.kind}" if glyph.color else glyph.kind):
            parts.append(Part(add_article(text), (Box(glyph.extent, number),)))
    return parts


def _move_boxes(parts: tuple[Part, ...], number: int) -> tuple[Part, ...]:
    """Return `parts` with their boxes in picture `number`."""
    return tuple(
        replace(part, boxes=tuple(replace(box, picture=number) for box in part.boxes))
        for part in parts
    )


def make_talk(rng: np.random.Generator) -> list[Turn]:
    """Make one or two turns without a picture."""
    return [make_small_talk(rng) for _ in range(1 + int(rng.random() < 0.3))]
