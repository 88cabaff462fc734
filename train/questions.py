"""Questions about a scene and their true answers.

An answer has one wording, so that an exact match means something; a question has
several, among them what a newcomer would type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_smolvlm.train.draw import COLOR_NAMES, PLACES, SHAPES, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Turn:
    """A question with its answer. `family` groups the questions of one kind in an evaluation."""

    family: str
    question: str
    answer: str


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
BACKGROUND = (
    "What color is the background?", "What colour is the background?",
    "Which color is the background?",
    "What is the background color?", "What is the color of the background?",
)  # fmt: skip

GREETING = "Hello! Show me a picture of colored shapes and ask about it."
ABILITY = (
    "I answer questions about pictures of colored shapes: what, which color, how many and where."
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


def article(noun: str) -> str:
    """`noun` with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(kind: str) -> str:
    """The plural of a kind of shape."""
    return f"{kind}es" if kind.endswith("cross") else f"{kind}s"


def join(parts: list[str]) -> str:
    """`parts` as a sentence: capital first, commas, "and" before the last, a full stop."""
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def name(shape: Shape) -> str:
    """Color and kind, as in "red circle"."""
    return f"{shape.color} {shape.kind}"


def contents(scene: Scene) -> str:
    """Answer to "what is in this picture": the shapes in reading order, equal ones counted."""
    if not scene.shapes:
        return "Nothing."
    names = [name(shape) for shape in scene.shapes]
    parts = []
    for one in dict.fromkeys(names):
        count = names.count(one)
        parts.append(article(one) if count == 1 else f"{NUMBERS[count]} {plural(one)}")
    return join(parts)


def description(scene: Scene) -> str:
    """Answer to "describe this image": every shape with its place, and the background."""
    ground = f"{article(scene.background)} background"
    if not scene.shapes:
        return f"Nothing on {ground}."
    parts = [f"{article(name(shape))} {shape.place}" for shape in scene.shapes]
    return f"{join(parts)[:-1]}, on {ground}."


def what(scene: Scene, rng: np.random.Generator) -> Turn:
    """The shapes by name."""
    return Turn("what", pick(rng, WHAT), contents(scene))


def describe(scene: Scene, rng: np.random.Generator) -> Turn:
    """The shapes with their places, and the background."""
    return Turn("describe", pick(rng, DESCRIBE), description(scene))


def color(scene: Scene, rng: np.random.Generator) -> Turn:
    """The color of the one shape of its kind; of a kind that is absent, that there is none."""
    single = unique(scene, "kind")
    if len(scene.shapes) == 1 and rng.random() < 0.3:
        asked = str(rng.choice(("shape", "object")))
        question = "What color is it?" if rng.random() < 0.4 else pick(rng, COLOR).format(asked)
        return Turn("color", question, f"{scene.shapes[0].color.capitalize()}.")
    if single and (rng.random() < 0.88 or _all_kinds(scene)):
        shape = single[rng.integers(len(single))]
        return Turn("color", pick(rng, COLOR).format(shape.kind), f"{shape.color.capitalize()}.")
    kind = _absent(rng, SHAPES, [shape.kind for shape in scene.shapes])
    return Turn("absent", pick(rng, COLOR).format(kind), f"There is no {kind}.")


def shape_of(scene: Scene, rng: np.random.Generator) -> Turn:
    """The kind of the one shape of its color."""
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        return Turn("shape", pick(rng, THE_SHAPE), f"{article(scene.shapes[0].kind).capitalize()}.")
    single = unique(scene, "color")
    if not single:
        return color(scene, rng)
    shape = single[rng.integers(len(single))]
    question = pick(rng, SHAPE).format(shape.color)
    return Turn("shape", question, f"{article(shape.kind).capitalize()}.")


def count(scene: Scene, rng: np.random.Generator) -> Turn:
    """How many shapes there are, in all, of a kind, of a color or of both."""
    draw = rng.random()
    if draw < 0.4 or (not scene.shapes and draw < 0.7):
        asked, number = (
            str(rng.choice(("shapes", "objects", "shapes", "things"))),
            len(scene.shapes),
        )
    else:
        kind, hue = str(rng.choice(SHAPES)), str(rng.choice(COLOR_NAMES))
        if scene.shapes and rng.random() < 0.8:
            shape = scene.shapes[rng.integers(len(scene.shapes))]
            kind, hue = shape.kind, shape.color
        if draw < 0.7:
            asked, number = plural(kind), sum(s.kind == kind for s in scene.shapes)
        elif draw < 0.85:
            asked, number = f"{hue} shapes", sum(s.color == hue for s in scene.shapes)
        else:
            asked = f"{hue} {plural(kind)}"
            number = sum(s.kind == kind and s.color == hue for s in scene.shapes)
    return Turn("count", pick(rng, COUNT).format(asked), f"{number}.")


def where(scene: Scene, rng: np.random.Generator) -> Turn:
    """The place of a shape that the question names beyond doubt."""
    draw = rng.random()
    if len(scene.shapes) == 1 and draw < 0.3:
        asked = str(rng.choice(("shape", "object")))
        question = "Where is it?" if rng.random() < 0.4 else pick(rng, WHERE).format(asked)
        return Turn("where", question, _place(scene.shapes[0]))
    names = [name(shape) for shape in scene.shapes]
    options = [(shape, shape.kind) for shape in unique(scene, "kind")]
    options += [(shape, f"{shape.color} shape") for shape in unique(scene, "color") if draw < 0.6]
    options += [(s, name(s)) for s in scene.shapes if names.count(name(s)) == 1 and draw > 0.5]
    if options and (rng.random() < 0.9 or _all_kinds(scene)):
        shape, asked = options[rng.integers(len(options))]
        return Turn("where", pick(rng, WHERE).format(asked), _place(shape))
    kind = _absent(rng, SHAPES, [shape.kind for shape in scene.shapes])
    return Turn("absent", pick(rng, WHERE).format(kind), f"There is no {kind}.")


def at(scene: Scene, rng: np.random.Generator) -> Turn:
    """What stands in one of the nine places, or that nothing does."""
    cell = int(rng.integers(9))
    if scene.shapes and rng.random() < 0.75:
        cell = scene.shapes[rng.integers(len(scene.shapes))].cell
    found = [article(name(shape)) for shape in scene.shapes if shape.cell == cell]
    return Turn("at", pick(rng, AT).format(PLACES[cell]), join(found or ["nothing"]))


def exists(scene: Scene, rng: np.random.Generator) -> Turn:
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
        asked, found = article(kind), kind in kinds
    elif form < 0.5:
        asked, found = article(f"{hue} shape"), hue in hues
    else:
        asked = article(f"{hue} {kind}")
        found = any(s.kind == kind and s.color == hue for s in scene.shapes)
    return Turn("exists", pick(rng, EXISTS).format(asked), "Yes." if found else "No.")


def background(scene: Scene, rng: np.random.Generator) -> Turn:
    """The color behind the shapes."""
    return Turn("background", pick(rng, BACKGROUND), f"{scene.background.capitalize()}.")


def small_talk(rng: np.random.Generator) -> Turn:
    """A turn without a picture; a question about one is told that there is none."""
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
    (what, 0.16), (describe, 0.08), (color, 0.17), (shape_of, 0.08), (count, 0.17), (where, 0.17),
    (at, 0.07), (exists, 0.07), (background, 0.03),
)  # fmt: skip


SHORT_MAKERS = tuple(maker for maker in MAKERS if maker[0] is not describe)


def ask(
    scene: Scene,
    rng: np.random.Generator,
    turns: int,
    makers: tuple[tuple[Maker, float], ...] = MAKERS,
) -> list[Turn]:
    """`turns` questions about `scene`, of families drawn by the weights of `makers`."""
    weights = np.array([weight for _, weight in makers])
    picks = rng.choice(len(makers), size=turns, p=weights / weights.sum())
    return [casual(makers[i][0](scene, rng), rng) for i in picks]


def casual(turn: Turn, rng: np.random.Generator) -> Turn:
    """`turn`, now and then typed in lower case or without its final mark."""
    question = turn.question
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    return Turn(turn.family, question, turn.answer)


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of `options`, each as likely as any other."""
    return options[int(rng.integers(len(options)))]


def _place(shape: Shape) -> str:
    return f"{shape.place[0].upper()}{shape.place[1:]}."


def unique(scene: Scene, attribute: str) -> list[Shape]:
    """Shapes whose kind or color no other shape of the scene has."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [s for s, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]


def _all_kinds(scene: Scene) -> bool:
    """Whether no kind of shape is absent."""
    return {shape.kind for shape in scene.shapes} == set(SHAPES)


def _absent(rng: np.random.Generator, options: tuple[str, ...], present: list[str]) -> str:
    """One of `options` that is not `present`."""
    missing = [option for option in options if option not in present]
    return str(rng.choice(missing))
