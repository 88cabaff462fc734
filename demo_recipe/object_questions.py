"""Questions about a scene of objects and their answers, worded as those about shapes are."""

from __future__ import annotations

from functools import partial

import numpy as np

from demo_recipe.draw import PLACES
from demo_recipe.items import Box, Part, Turn, TurnMaker, fill
from demo_recipe.object_scene import ObjectScene
from demo_recipe.object_sheet import KINDS
from demo_recipe.questions import (
    AT,
    BACKGROUND,
    COUNT,
    DESCRIBE,
    EXISTS,
    NUMBERS,
    WHAT,
    WHERE,
    add_article,
    pick,
)

_PLURALS = {"bus": "buses", "fish": "fish", "butterfly": "butterflies"}

THIS = (
    "What is this?", "What object is this?", "What is it?", "What is the object?",
    "Which object is this?", "What is shown here?", "Name the object.", "What's this?",
)  # fmt: skip
OBJECTS = (
    *(question for question in WHAT if "shapes" not in question),
    "Which objects do you see?", "What objects are in this picture?", "List the objects.",
    "Which things are in the picture?", "Name the objects.",
)  # fmt: skip
OBJECT_AT = tuple(question.replace("shape", "object") for question in AT)


def make_plural(kind: str) -> str:
    """The plural of an object's name."""
    return _PLURALS.get(kind, f"{kind}s")


def makers(scene: ObjectScene) -> tuple[tuple[TurnMaker, float], ...]:
    """Who asks about `scene`, with weights."""
    single = len(scene.things) == 1
    return (
        (partial(ask_this if single else ask_what, scene), 0.26),
        (partial(ask_where, scene), 0.2),
        (partial(ask_at, scene), 0.12),
        (partial(ask_exists, scene), 0.14),
        (partial(ask_count, scene), 0.16),
        (partial(ask_describe, scene), 0.08),
        (partial(ask_background, scene), 0.04),
    )


def ask_this(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """The one object by name."""
    questions = THIS if rng.random() < 0.6 else OBJECTS
    return Turn("object", pick(rng, questions), _join_sentence(_name_things(scene)))


def ask_what(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """The objects by name in reading order, equal ones counted."""
    return Turn(
        "objects", pick(rng, OBJECTS), _join_sentence(_name_things(scene) or [Part("nothing")])
    )


def ask_describe(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """Every object with its place, and the background."""
    ground = f"{add_article(scene.background)} background."
    if not scene.things:
        return Turn("object describe", pick(rng, DESCRIBE), f"Nothing on {ground}")
    said = [
        Part(f"{add_article(thing.kind)} {PLACES[thing.cell]}", (Box(scene.extent(thing)),))
        for thing in scene.things
    ]
    *parts, _ = _join_sentence(said)
    return Turn("object describe", pick(rng, DESCRIBE), (*parts, Part(f", on {ground}")))


def ask_where(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """The place of an object that is there once; of one that is absent, that there is none."""
    single = [thing for thing in scene.things if scene.count(thing.kind) == 1]
    if not single or rng.random() < 0.12:
        kind = _pick_absent(scene, rng)
        question = pick(rng, WHERE).format(kind)
        return Turn("absent", question, (Part(f"There is no {kind}.", scene.boxes()),), kind)
    thing = single[int(rng.integers(len(single)))]
    boxes = (Box(scene.extent(thing)),)
    place = PLACES[thing.cell]
    answer = (Part(f"{place[0].upper()}{place[1:]}", boxes), Part("."))
    return Turn("object where", fill(pick(rng, WHERE), Part(thing.kind, boxes)), answer)


def ask_at(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """What stands in one of the nine places, or that nothing does."""
    cell = int(rng.integers(9))
    if scene.things and rng.random() < 0.85:
        cell = scene.things[int(rng.integers(len(scene.things)))].cell
    found = [thing for thing in scene.things if thing.cell == cell]
    column, row = cell % 3, cell // 3
    boxes = (Box((column / 3, row / 3, (column + 1) / 3, (row + 1) / 3)),)
    if found:
        boxes = (Box(scene.extent(found[0])),)
    question = fill(pick(rng, OBJECT_AT), Part(PLACES[cell], boxes))
    named = add_article(found[0].kind) if found else "nothing"
    return Turn("object at", question, _join_sentence([Part(named, boxes)]))


def ask_exists(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """Yes or no to a kind, each as likely as the other."""
    if scene.things and rng.random() < 0.5:
        kind = scene.things[int(rng.integers(len(scene.things)))].kind
        boxes = scene.boxes(kind)
        question = fill(pick(rng, EXISTS), Part(add_article(kind), boxes))
        return Turn("object exists", question, (Part("Yes", boxes), Part(".")))
    template = pick(rng, EXISTS)
    kind = _pick_absent(scene, rng)
    question = fill(template, Part(add_article(kind)))
    return Turn("object exists", question, (Part("No", scene.boxes()), Part(".")), kind)


def ask_count(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """How many objects there are, in all or of a kind."""
    draw = rng.random()
    boxes = scene.boxes()
    number, asked = len(boxes), Part(str(rng.choice(("objects", "objects", "things"))), boxes)
    if draw > 0.45:
        kind = _pick_absent(scene, rng)
        if scene.things and draw > 0.53:
            repeated = [t.kind for t in scene.things if scene.count(t.kind) > 1]
            kinds = repeated or [t.kind for t in scene.things]
            kind = str(rng.choice(kinds))
        boxes = scene.boxes(kind)
        number, asked = len(boxes), Part(make_plural(kind), boxes)
    answer = (Part(str(number), boxes), Part("."))
    missing = "" if boxes else asked.text
    return Turn("object count", fill(pick(rng, COUNT), asked), answer, missing)


def ask_background(scene: ObjectScene, rng: np.random.Generator) -> Turn:
    """The color behind the objects."""
    return Turn("background", pick(rng, BACKGROUND), f"{scene.background.capitalize()}.")


def _name_things(scene: ObjectScene) -> list[Part]:
    """The kinds in reading order, each with the places of its objects."""
    parts = []
    for kind in dict.fromkeys(thing.kind for thing in scene.things):
        count = scene.count(kind)
        text = add_article(kind) if count == 1 else f"{NUMBERS[count]} {make_plural(kind)}"
        parts.append(Part(text, scene.boxes(kind)))
    return parts


def _join_sentence(parts: list[Part]) -> tuple[Part, ...]:
    """`parts` as `questions.join` says them: commas, "and" before the last, a full stop."""
    said: list[Part] = []
    for i, part in enumerate(parts):
        if i:
            said.append(Part(" and " if i == len(parts) - 1 else ", "))
        said.append(part if i else Part(part.text[0].upper() + part.text[1:], part.boxes))
    return (*said, Part("."))


def _pick_absent(scene: ObjectScene, rng: np.random.Generator) -> str:
    """A kind that no object of the scene is of."""
    present = {thing.kind for thing in scene.things}
    return str(rng.choice([kind for kind in KINDS if kind not in present]))
