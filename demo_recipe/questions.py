"""Questions about a scene, with the correct answers.

An answer has one wording, so that an exact match means something; a question has
several, among them what a newcomer would type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from demo_recipe.draw import (
    COLOR_NAMES,
    PLACES,
    SHAPES,
    Scene,
    Shape,
    compute_area,
    compute_cell_extent,
)
from demo_recipe.items import Box, Part, Turn, Wording, fill, get_parts, join_parts

SHAPE_NOUNS = (*SHAPES, "shape", "object", "word", "picture")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

WHAT = (
    "What is in this picture?", "What is in this image?", "What do you see?", "What is this?",
    "What's in the picture?", "What is shown here?", "What can you see in this image?",
    "What does this picture show?", "What is on this picture?", "List the shapes.",
)  # fmt: skip
DESCRIBE = (
    "Describe this image.", "Describe this picture.", "Describe the image.", "Describe it.",
    "Describe the picture in detail.", "Can you describe this image?",
    "What is in this picture and where?", "Describe what you see.",
)  # fmt: skip
COLOR = (
    "What color is the {}?", "What colour is the {}?", "Which color is the {}?",
    "Which colour does the {} have?", "What is the color of the {}?",
    "Tell me the color of the {}.",
)  # fmt: skip
SHAPE = ("What shape is {}?", "Which shape is {}?", "What is the {} shape?", "What is {}?")
THE_SHAPE = (
    "What shape is this?",
    "What shape is it?",
    "Which shape is this?",
    "What shape is shown?",
)
COUNT = (
    "How many {} are there?", "How many {} do you see?", "How many {} are in the picture?",
    "How many {} are in this image?", "Count the {}.", "How many {} can you see?", "How many {}?",
)  # fmt: skip
WHERE = (
    "Where is the {}?", "Where's the {}?", "In which part of the picture is the {}?",
    "Where can I find the {}?", "Where do you see the {}?", "What is the position of the {}?",
)  # fmt: skip
AT = ("What is {}?", "What do you see {}?", "Which shape is {}?", "What's {}?")
EXISTS = (
    "Is there {}?", "Do you see {}?", "Can you see {}?", "Is there {} in the picture?",
    "Does the picture show {}?", "Is {} in this image?",
)  # fmt: skip
THEN_WHERE = (
    "And where is it?", "Where is it?", "And in which part of the picture?", "Where is that?",
    "And where?",
)  # fmt: skip
THEN_COLOR = (
    "And what color is it?", "What color is it?", "And its color?", "What is its color?",
    "And what colour is it?",
)  # fmt: skip
THEN_SHAPE = ("And what shape is it?", "What shape is it?", "Which shape is it?", "And its shape?")
LARGER = (
    "Which is larger, the {} or the {}?", "Which is bigger, the {} or the {}?",
    "What is larger, the {} or the {}?", "Is the {} or the {} larger?",
    "Is the {} or the {} bigger?",
)  # fmt: skip
SMALLER = (
    "Which is smaller, the {} or the {}?", "What is smaller, the {} or the {}?",
    "Is the {} or the {} smaller?",
)  # fmt: skip
BESIDE = (
    "Is the {} {side} the {}?",
    "Is the {} to be seen {side} the {}?",
    "Is the {} {side} the {}?",
)
BACKGROUND = (
    "What color is the background?", "What colour is the background?",
    "Which color is the background?",
    "What is the background color?", "What is the color of the background?",
)  # fmt: skip

GREETING = "Hello! Show me a picture or a short video and ask about it."
ABILITY = (
    "I answer questions about shapes, objects, words, charts and pages, and about short videos."
)
NO_PICTURE = "I see no picture here. Please add one."
CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello", "Hi", "Hello!", "Hi!", "Hey", "Hi there!", "Good morning", "Good day!",
            "hey there",
        ),
        GREETING,
    ),
    (
        (
            "What can you do?", "Who are you?", "What are you?", "Help", "help", "What is this?",
            "How can you help me?", "What can I ask?", "What should I ask you?", "What do you do?",
        ),
        ABILITY,
    ),
    (
        ("Thanks", "Thank you", "Thanks!", "Thank you!", "Great, thanks.", "Cool, thank you!"),
        "You are welcome.",
    ),
    (("Bye", "Goodbye", "Bye!", "Goodbye!", "See you!"), "Goodbye!"),
)  # fmt: skip


def add_article(noun: str) -> str:
    """Return `noun` with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_plural(kind: str) -> str:
    """Return the plural of a kind of shape."""
    return f"{kind}es" if kind.endswith("cross") else f"{kind}s"


def capitalize(text: str) -> str:
    """Return `text` with a capital first letter."""
    return f"{text[0].upper()}{text[1:]}"


def join(parts: list[str]) -> str:
    """`parts` as a sentence: capital first, commas, "and" before the last, a full stop."""
    return join_parts(join_list([Part(part) for part in parts]))


def join_list(parts: list[Part], end: str = ".") -> Wording:
    """`parts` as a sentence: capital first, commas, "and" before the last, then `end`."""
    said: list[Part] = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        glue = "" if not number else " and " if last else ", "
        text = capitalize(part.text) if not number else part.text
        said += [Part(glue), Part(text, part.boxes)]
    return (*(part for part in said if part.text), Part(end))


def name_shape(shape: Shape) -> str:
    """Return color and kind, as in "red circle"."""
    return f"{shape.color} {shape.kind}"


def make_part(text: str, *shapes: Shape, scene: Scene) -> Part:
    """Return `text` as a part that refers to `shapes`."""
    return Part(text, tuple(Box(shape.extent(scene.width, scene.height)) for shape in shapes))


def list_contents(scene: Scene) -> Wording:
    """Return the answer to "what is in this picture": shapes in reading order, counted."""
    if not scene.shapes:
        return "Nothing."
    parts = []
    for one in dict.fromkeys(name_shape(shape) for shape in scene.shapes):
        found = [shape for shape in scene.shapes if name_shape(shape) == one]
        text = add_article(one) if len(found) == 1 else f"{NUMBERS[len(found)]} {make_plural(one)}"
        parts.append(make_part(text, *found, scene=scene))
    return join_list(parts)


def describe_scene(scene: Scene) -> Wording:
    """Return the answer to "describe this image": each shape with its place, and the background."""
    ground = f"{add_article(scene.background)} background"
    if not scene.shapes:
        return f"Nothing on {ground}."
    parts = [
        make_part(f"{add_article(name_shape(s))} {s.place}", s, scene=scene) for s in scene.shapes
    ]
    return join_list(parts, f", on {ground}.")


def ask_what(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the shapes by name."""
    return Turn("what", pick(rng, WHAT), list_contents(scene))


def ask_describe(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the shapes with their places, and the background."""
    return Turn("describe", pick(rng, DESCRIBE), describe_scene(scene))


def ask_color(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the color of the only shape of a kind, or of a kind that is absent."""
    single = find_unique(scene, "kind")
    if len(scene.shapes) == 1 and rng.random() < 0.3:
        shape, asked = scene.shapes[0], str(rng.choice(("shape", "object")))
        if rng.random() < 0.4:
            question: Wording = "What color is it?"
        else:
            question = fill(pick(rng, COLOR), make_part(asked, shape, scene=scene))
        return Turn(
            "color", question, (make_part(f"{capitalize(shape.color)}.", shape, scene=scene),)
        )
    if single and (rng.random() < 0.88 or _has_all_kinds(scene)):
        shape = single[rng.integers(len(single))]
        question = fill(pick(rng, COLOR), make_part(shape.kind, shape, scene=scene))
        return Turn(
            "color", question, (make_part(f"{capitalize(shape.color)}.", shape, scene=scene),)
        )
    kind = _pick_absent(rng, SHAPES, [shape.kind for shape in scene.shapes])
    return Turn("absent", pick(rng, COLOR).format(kind), f"There is no {kind}.", kind)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the kind of the only shape of a color."""
    single = find_unique(scene, "color")
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        shape, question = scene.shapes[0], pick(rng, THE_SHAPE)
        return Turn(
            "shape",
            question,
            (make_part(f"{capitalize(add_article(shape.kind))}.", shape, scene=scene),),
        )
    if not single:
        return ask_color(scene, rng)
    shape = single[rng.integers(len(single))]
    return Turn(
        "shape",
        fill(pick(rng, SHAPE), make_part(shape.color, shape, scene=scene)),
        (make_part(f"{capitalize(add_article(shape.kind))}.", shape, scene=scene),),
    )


def ask_count(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask how many shapes there are: in all, of a kind, of a color or of both."""
    draw = rng.random()
    if draw < 0.4 or (not scene.shapes and draw < 0.7):
        asked = str(rng.choice(("shapes", "objects", "shapes", "things")))
        found = list(scene.shapes)
    else:
        kind, hue = str(rng.choice(SHAPES)), str(rng.choice(COLOR_NAMES))
        if scene.shapes and rng.random() < 0.8:
            shape = scene.shapes[rng.integers(len(scene.shapes))]
            kind, hue = shape.kind, shape.color
        if draw < 0.7:
            asked, found = make_plural(kind), [s for s in scene.shapes if s.kind == kind]
        elif draw < 0.85:
            asked, found = f"{hue} shapes", [s for s in scene.shapes if s.color == hue]
        else:
            asked = f"{hue} {make_plural(kind)}"
            found = [s for s in scene.shapes if s.kind == kind and s.color == hue]
    question = fill(pick(rng, COUNT), make_part(asked, *found, scene=scene))
    answer = make_part(f"{len(found)}.", *found, scene=scene)
    return Turn("count", question, (answer,), "" if found else asked)


def ask_where(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the place of a shape that the question identifies."""
    draw = rng.random()
    if len(scene.shapes) == 1 and draw < 0.3:
        shape, asked = scene.shapes[0], str(rng.choice(("shape", "object")))
        if rng.random() < 0.4:
            question: Wording = "Where is it?"
        else:
            question = fill(pick(rng, WHERE), make_part(asked, shape, scene=scene))
        return Turn(
            "where", question, (make_part(f"{capitalize(shape.place)}.", shape, scene=scene),)
        )
    options = _name_shapes(scene, draw)
    if options and (rng.random() < 0.9 or _has_all_kinds(scene)):
        shape, asked = options[rng.integers(len(options))]
        question = fill(pick(rng, WHERE), make_part(asked, shape, scene=scene))
        return Turn(
            "where", question, (make_part(f"{capitalize(shape.place)}.", shape, scene=scene),)
        )
    kind = _pick_absent(rng, SHAPES, [shape.kind for shape in scene.shapes])
    return Turn("absent", pick(rng, WHERE).format(kind), f"There is no {kind}.", kind)


def _name_shapes(scene: Scene, draw: float) -> list[tuple[Shape, str]]:
    """Return shapes with words that identify them: a kind, a color, or both (by `draw`)."""
    names = [name_shape(shape) for shape in scene.shapes]
    options = [(shape, shape.kind) for shape in find_unique(scene, "kind")]
    options += [
        (shape, f"{shape.color} shape") for shape in find_unique(scene, "color") if draw < 0.6
    ]
    options += [
        (s, name_shape(s)) for s in scene.shapes if names.count(name_shape(s)) == 1 and draw > 0.5
    ]
    return options


def ask_at(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask what is in one of the nine places."""
    cell = int(rng.integers(9))
    if scene.shapes and rng.random() < 0.75:
        cell = scene.shapes[rng.integers(len(scene.shapes))].cell
    found = [shape for shape in scene.shapes if shape.cell == cell]
    answer = join_list(
        [make_part(add_article(name_shape(shape)), shape, scene=scene) for shape in found]
    )
    place = Part(PLACES[cell], (Box(compute_cell_extent(cell)),))
    return Turn("at", fill(pick(rng, AT), place), answer if found else "Nothing.")


def ask_exists(scene: Scene, rng: np.random.Generator) -> Turn:
    """Yes or no to a kind, a color or both; about half of them, and half of the noes are near."""
    kinds, hues = [s.kind for s in scene.shapes], [s.color for s in scene.shapes]
    kind, hue = str(rng.choice(SHAPES)), str(rng.choice(COLOR_NAMES))
    if scene.shapes:
        first, second = rng.integers(len(kinds)), rng.integers(len(kinds))
        near = rng.random()
        kind = kinds[first] if near < 0.75 else kind
        hue = hues[first] if near < 0.5 else hues[second] if near < 0.7 else hue
    form = rng.random()
    if form < 0.35:
        asked, found = add_article(kind), [s for s in scene.shapes if s.kind == kind]
    elif form < 0.5:
        asked, found = add_article(f"{hue} shape"), [s for s in scene.shapes if s.color == hue]
    else:
        asked = add_article(f"{hue} {kind}")
        found = [s for s in scene.shapes if s.kind == kind and s.color == hue]
    question = fill(pick(rng, EXISTS), make_part(asked, *found, scene=scene))
    answer = make_part("Yes.", *found, scene=scene) if found else Part("No.")
    return Turn("exists", question, (answer,), "" if found else asked)


def ask_compare(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask which of two shapes is larger, or whether one lies to one side of the other."""
    options = _name_shapes(scene, 0.8)
    pairs = [
        (first, second) for first in options for second in options if first[0] is not second[0]
    ]
    if not pairs:
        return ask_exists(scene, rng)
    plain = [pair for pair in pairs if _differ_clearly(pair[0][0], pair[1][0])]
    sized = bool(plain) and rng.random() < 0.7
    chosen = plain if sized else pairs
    (one, asked), (other, against) = chosen[rng.integers(len(chosen))]
    first, second = make_part(asked, one, scene=scene), make_part(against, other, scene=scene)
    both = (one, other)
    if sized:
        larger = rng.random() < 0.6
        question = fill(pick(rng, LARGER if larger else SMALLER), first, second)
        (answer,) = (first,) if (one.radius > other.radius) == larger else (second,)
        shown = one if answer is first else other
        return Turn("larger", question, (make_part(f"The {answer.text}.", shown, scene=scene),))
    across = abs(one.x - other.x) / scene.width
    along = abs(one.y - other.y) / scene.height
    side = str(rng.choice(("left of", "right of") if across > along else ("above", "below")))
    before = one.x < other.x if across > along else one.y < other.y
    is_true = before == (side in ("left of", "above"))
    question = fill(pick(rng, BESIDE).replace("{side}", side), first, second)
    return Turn("beside", question, (make_part("Yes." if is_true else "No.", *both, scene=scene),))


def _differ_clearly(one: Shape, other: Shape) -> bool:
    """Whether one shape is clearly larger: its radius by 2/5, and its area by 1/4."""
    small, large = sorted((one, other), key=lambda shape: shape.radius)
    return large.radius > 1.4 * small.radius and compute_area(large) > 1.25 * compute_area(small)


def ask_follow_up(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Ask about a shape, and then about the same shape as "it"."""
    options = _name_shapes(scene, float(rng.random()))
    if not options:
        return [ask_background(scene, rng), ask_count(scene, rng)]
    shape, asked = options[int(rng.integers(len(options)))]
    named, kind = make_part(asked, shape, scene=scene), capitalize(add_article(shape.kind))
    facts = {
        "where": (WHERE, THEN_WHERE, f"{capitalize(shape.place)}."),
        "color": (COLOR, THEN_COLOR, f"{capitalize(shape.color)}."),
        "shape": (SHAPE, THEN_SHAPE, f"{kind}."),
    }
    known = [fact for fact in facts if not (fact != "where" and _reveals(asked, shape, fact))]
    first = str(rng.choice(known))
    second = str(rng.choice([fact for fact in facts if fact != first]))
    wording, _, answer = facts[first]
    if first == "shape":
        named = make_part(shape.color, shape, scene=scene)
    turns = [
        Turn("two turns", fill(pick(rng, wording), named), (make_part(answer, shape, scene=scene),))
    ]
    then = (make_part(facts[second][2], shape, scene=scene),)
    return [*turns, Turn("two turns", pick(rng, facts[second][1]), then)]


def _reveals(asked: str, shape: Shape, fact: str) -> bool:
    """Whether the words `asked` already contain the answer."""
    return (
        shape.color in asked if fact == "color" else shape.color not in asked or shape.kind in asked
    )


def ask_background(scene: Scene, rng: np.random.Generator) -> Turn:
    """Ask for the color of the background."""
    return Turn("background", pick(rng, BACKGROUND), f"{scene.background.capitalize()}.")


def make_small_talk(rng: np.random.Generator) -> Turn:
    """Make a turn without a picture; if it asks about one, the answer is that there is none."""
    if rng.random() < 0.35:
        asked = pick(rng, (WHAT[0], *WHAT[1:3], *WHAT[4:], *DESCRIBE, *BACKGROUND))
        if rng.random() < 0.6:
            family = (COLOR, WHERE)[int(rng.integers(2))]
            asked = pick(rng, family).format(str(rng.choice(SHAPES)))
        return Turn("chat", asked, NO_PICTURE)
    questions, answer = CHAT[int(rng.choice(len(CHAT), p=(0.35, 0.4, 0.15, 0.1)))]
    return Turn("chat", pick(rng, questions), answer)


Maker = Callable[[Scene, np.random.Generator], Turn]
MAKERS: tuple[tuple[Maker, float], ...] = (
    (ask_what, 0.14), (ask_describe, 0.14), (ask_color, 0.12), (ask_shape, 0.09), (ask_count, 0.15),
    (ask_where, 0.12), (ask_at, 0.08), (ask_exists, 0.07), (ask_compare, 0.12),
    (ask_background, 0.03),
)  # fmt: skip


SHORT_MAKERS = tuple(maker for maker in MAKERS if maker[0] is not ask_describe)


def ask(
    scene: Scene,
    rng: np.random.Generator,
    turns: int,
    makers: tuple[tuple[Maker, float], ...] = MAKERS,
) -> list[Turn]:
    """Ask `turns` questions about `scene`, of families drawn by the weights of `makers`."""
    weights = np.array([weight for _, weight in makers])
    picks = rng.choice(len(makers), size=turns, p=weights / weights.sum())
    return [make_casual(makers[i][0](scene, rng), rng) for i in picks]


def make_casual(turn: Turn, rng: np.random.Generator) -> Turn:
    """Return `turn`, sometimes with a question in lower case or without its final mark."""
    parts = list(get_parts(turn.question))
    if rng.random() < 0.15:
        text = parts[0].text
        parts[0] = Part(text[0].lower() + text[1:], parts[0].boxes)
    if rng.random() < 0.15 and parts[-1].text.rstrip("?.!"):
        parts[-1] = Part(parts[-1].text.rstrip("?.!"), parts[-1].boxes)
    elif rng.random() < 0.15 and parts[-1].text in ("?", ".") and len(parts) > 1:
        parts.pop()
    return replace(turn, question=tuple(parts))


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """Draw one of `options`, all with the same probability."""
    return options[int(rng.integers(len(options)))]


def find_unique(scene: Scene, attribute: str) -> list[Shape]:
    """Return the shapes whose kind or color no other shape of the scene has."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [s for s, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]


def _has_all_kinds(scene: Scene) -> bool:
    """Whether no kind of shape is absent."""
    return {shape.kind for shape in scene.shapes} == set(SHAPES)


def _pick_absent(rng: np.random.Generator, options: tuple[str, ...], present: list[str]) -> str:
    """Draw one of `options` that is not `present`."""
    missing = [option for option in options if option not in present]
    return str(rng.choice(missing))
