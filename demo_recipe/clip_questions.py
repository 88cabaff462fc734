"""Questions about a clip, with the correct answers; each answer has one wording."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from demo_recipe.clips import Clip, sampled_indices
from demo_recipe.draw import SHAPES, Shape
from demo_recipe.items import Box, Part, Turn, fill
from demo_recipe.questions import (
    BACKGROUND,
    COLOR,
    COUNT,
    add_article,
    capitalize,
    find_unique,
    make_casual,
    name_shape,
    pick,
)

HAPPENS = (
    "What happens?", "What happens in this video?", "What happens in the video?",
    "What happens in this clip?", "What is happening?", "What's happening?", "What happens here?",
    "What do you see in this video?", "What is in this video?", "What is this video about?",
)  # fmt: skip
STORY = (
    "Describe the video.", "Describe this video.", "Describe the clip.", "Describe what happens.",
    "Can you describe this video?", "Describe it.", "Describe this video in detail.",
)  # fmt: skip
DIRECTION = (
    "Which way does {} move?", "Which direction does {} move?", "Where does {} move?",
    "In which direction does {} move?", "Which way does {} go?", "Which way is {} moving?",
    "In which direction is {} moving?", "Where does {} go?",
)  # fmt: skip
ACROSS = ("Does {} move left or right?", "Is {} moving left or right?", "Does {} go left or right?")
ALONG = ("Does {} move up or down?", "Is {} moving up or down?", "Does {} go up or down?")
MOVER = (
    "What moves?", "What is moving?", "Which shape moves?", "What moves in this video?",
    "Which shape is moving?", "Which object moves?",
)  # fmt: skip
KEEPER = ("What stays still?", "Which shape stays still?", "What does not move?")
MOVES = ("Does {} move?", "Is {} moving?", "Does {} move in this video?")
EITHER = ("Does {} move or stay still?", "Is {} moving or still?")
ORDER = (
    "In which order do the colors appear?", "In what order do the colors appear?",
    "In which order do the colours appear?", "What is the order of the colors?",
    "Which colors appear, in order?", "List the colors in order.", "Name the colors in order.",
    "How does the color change?", "In which order do you see the colors?",
)  # fmt: skip
FIRST = (
    "Which color comes first?", "What color comes first?", "What is the first color?",
    "Which colour comes first?", "Which color is first?",
)  # fmt: skip
LAST = (
    "Which color comes last?", "What color comes last?", "What is the last color?",
    "Which colour comes last?", "Which color is last?",
)  # fmt: skip
AT_FIRST = (
    "What color is the {} at the start?", "What color is the {} at first?",
    "What color is the {} at the beginning?", "Which color does the {} have at first?",
)  # fmt: skip
AT_LAST = (
    "What color is the {} at the end?", "What color is the {} in the end?",
    "What color does the {} have at the end?", "Which color does the {} have at the end?",
)  # fmt: skip
TURNER = ("What changes color?", "What changes its color?", "What changes?")

_WAYS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
STILL = "It stays still."


def find_color_boxes(clip: Clip, number: int) -> tuple[Box, ...]:
    """Return where the color `number` of the changing object is visible, a box for each frame."""
    boxes = []
    for frame, index in enumerate(sampled_indices(clip.frames, clip.fps)):
        if clip.color_number(index) == number:
            whole = clip.event == "background turns"
            boxes.append(
                Box((0.0, 0.0, 1.0, 1.0), frame) if whole else _make_box(clip, 0, frame, index)
            )
    return tuple(boxes)


def find_shape_boxes(clip: Clip, number: int) -> tuple[Box, ...]:
    """Return where the shape `number` is visible, a box for each frame."""
    indices = sampled_indices(clip.frames, clip.fps)
    return tuple(_make_box(clip, number, frame, index) for frame, index in enumerate(indices))


def _make_box(clip: Clip, number: int, frame: int, index: int) -> Box:
    scene = clip.scene(index)
    left, top, right, bottom = scene.shapes[number].extent(scene.width, scene.height)
    return Box((max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)), frame)


def make_part(clip: Clip, text: str, number: int) -> Part:
    """Return `text` as a part that refers to the shape `number`."""
    return Part(text, find_shape_boxes(clip, number))


def list_colors(clip: Clip, first_capital: bool = False) -> tuple[Part, ...]:
    """The colors of what turns, as in "red, then blue"."""
    parts: list[Part] = []
    for number, color in enumerate(clip.colors):
        text = capitalize(color) if first_capital and not number else color
        parts += [Part(", then ")] * bool(number) + [Part(text, find_color_boxes(clip, number))]
    return tuple(parts)


def describe_event(clip: Clip) -> tuple[Part, ...]:
    """Answer to "what happens", without a full stop."""
    if clip.event == "background turns":
        return (Part("The background turns "), *list_colors(clip))
    first = clip.shapes[0]
    if clip.event == "shape turns":
        kind = make_part(clip, capitalize(add_article(first.kind)), 0)
        return (kind, Part(" turns "), *list_colors(clip))
    thing = make_part(clip, capitalize(add_article(name_shape(first))), 0)
    if clip.event == "moves":
        return (thing, Part(" moves "), make_part(clip, _WAYS[clip.motion], 0))
    if len(clip.shapes) == 1:
        return (thing, Part(" stays still"))
    return (Part("Nothing moves"),)


def describe_clip(clip: Clip) -> tuple[Part, ...]:
    """Answer to "describe the video": what happens, what else is there, and the background."""
    numbers = range(len(clip.shapes))
    things = [make_part(clip, add_article(name_shape(clip.shapes[n])), n) for n in numbers]
    ground = f"on {add_article(clip.background[0])} background."
    if clip.event == "background turns":
        behind = (Part(", behind "), things[0], Part(".")) if things else (Part("."),)
        return (*describe_event(clip), *behind)
    others = things[1:]
    if clip.event == "stays" and others:
        return (Part(f"Nothing moves {ground}"),)
    if others and clip.paints:
        return (*describe_event(clip), Part(", beside "), others[0], Part(f", {ground}"))
    if others:
        return (*describe_event(clip), Part(" and "), others[0], Part(f" stays still, {ground}"))
    return (*describe_event(clip), Part(f"{',' if clip.paints else ''} {ground}"))


def describe_direction(clip: Clip, shape: Shape) -> str:
    """Answer to which way `shape`, one of the clip's, moves."""
    if clip.motion == "none" or shape != clip.shapes[0]:
        return STILL
    return f"{_WAYS[clip.motion].capitalize()}."


def _make_shape_part(clip: Clip, shape: Shape, words: str) -> Part:
    """Return `words` as a part that refers to `shape`."""
    return make_part(clip, words, clip.shapes.index(shape))


def ask_happens(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask what happens, for a short answer."""
    return Turn("happens", pick(rng, HAPPENS), (*describe_event(clip), Part(".")))


def ask_describe(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask for a description of the video."""
    return Turn("story", pick(rng, STORY), describe_clip(clip))


def ask_direction(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask which way a shape moves; it may stay still or be absent."""
    if rng.random() < 0.06 or not clip.shapes:
        kinds = [shape.kind for shape in clip.shapes]
        kind = str(rng.choice([kind for kind in SHAPES if kind not in kinds]))
        taken = pick(rng, DIRECTION).format(f"the {kind}")
        return Turn("absent", taken, f"There is no {kind}.", kind)
    shape = _pick_shape(clip, rng)
    asked = _name_shape(clip, shape, rng)
    answer = describe_direction(clip, shape)
    wording: tuple[str, ...] = DIRECTION
    if answer != STILL and rng.random() < 0.3:
        wording = ACROSS if clip.motion in ("left", "right") else ALONG
    question = fill(pick(rng, wording), _make_shape_part(clip, shape, asked))
    return Turn("direction", question, (_make_shape_part(clip, shape, answer),))


def ask_mover(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask what moves or, if there are two shapes, sometimes what stays."""
    if clip.motion == "none":
        return Turn("mover", pick(rng, MOVER), "Nothing.")
    if len(clip.shapes) == 2 and rng.random() < 0.25:
        answer = make_part(clip, f"{capitalize(add_article(name_shape(clip.shapes[1])))}.", 1)
        return Turn("mover", pick(rng, KEEPER), (answer,))
    answer = make_part(clip, f"{capitalize(add_article(name_shape(clip.shapes[0])))}.", 0)
    return Turn("mover", pick(rng, MOVER), (answer,))


def ask_moves(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask whether a shape, or anything, moves."""
    if not clip.shapes or rng.random() < 0.3:
        whatever = str(rng.choice(("anything", "something")))
        told = "No." if clip.motion == "none" else "Yes."
        return Turn("moves", pick(rng, MOVES).format(whatever), told)
    shape = _pick_shape(clip, rng)
    moving = shape is clip.shapes[0] and clip.motion != "none"
    asked = _make_shape_part(clip, shape, _name_shape(clip, shape, rng))
    wording: tuple[str, ...] = MOVES
    told = "Yes." if moving else "No."
    if rng.random() < 0.25:
        told, wording = ("It moves." if moving else STILL), EITHER
    answer = _make_shape_part(clip, shape, told)
    return Turn("moves", fill(pick(rng, wording), asked), (answer,))


def ask_order(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask for all colors of the changing object, in order."""
    family = "order of two" if len(clip.colors) == 2 else "order of more"
    answer = (*list_colors(clip, first_capital=True), Part("."))
    return Turn(family, pick(rng, ORDER), answer)


def ask_ends(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask for the first or the last color of the changing object."""
    is_first = rng.random() < 0.5
    number = 0 if is_first else len(clip.colors) - 1
    answer = (Part(f"{capitalize(clip.colors[number])}.", find_color_boxes(clip, number)),)
    if rng.random() < 0.4:
        return Turn("ends", pick(rng, FIRST if is_first else LAST), answer)
    asked = "background" if clip.event == "background turns" else _pick_noun(clip, rng)
    return Turn("ends", pick(rng, AT_FIRST if is_first else AT_LAST).format(asked), answer)


def ask_turner(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask what changes its color."""
    answer = "Nothing."
    if clip.paints:
        turns = "background" if clip.event == "background turns" else clip.shapes[0].kind
        answer = f"The {turns}."
    wording = TURNER if clip.motion == "none" else TURNER[:2]
    return Turn("turner", pick(rng, wording), answer)


def ask_seen(clip: Clip, rng: np.random.Generator) -> Turn:
    """Ask what a single frame shows: a color, the background, or the number of shapes."""
    draw = rng.random()
    if draw < 0.4 and clip.event != "background turns":
        return Turn("seen", pick(rng, BACKGROUND), f"{clip.background[0].capitalize()}.")
    if draw > 0.6:
        still = clip.shapes[1:] if clip.event == "shape turns" else clip.shapes
        single = [shape for shape in still if _list_kinds(clip.shapes).count(shape.kind) == 1]
        if single:
            shape = single[int(rng.integers(len(single)))]
            kind, hue = _make_shape_part(clip, shape, shape.kind), capitalize(shape.color)
            return Turn(
                "seen", fill(pick(rng, COLOR), kind), (_make_shape_part(clip, shape, f"{hue}."),)
            )
    return Turn("seen", pick(rng, COUNT).format("shapes"), f"{len(clip.shapes)}.")


def _list_kinds(shapes: tuple[Shape, ...]) -> list[str]:
    return [shape.kind for shape in shapes]


def _pick_shape(clip: Clip, rng: np.random.Generator) -> Shape:
    """Draw the shape to ask about: the first with a probability of 0.65 if there are two."""
    return clip.shapes[0 if len(clip.shapes) == 1 or rng.random() < 0.65 else 1]


def _name_shape(clip: Clip, shape: Shape, rng: np.random.Generator) -> str:
    """Return words that identify `shape`, as in "the red circle"."""
    scene = clip.scene(0)
    options = [f"the {name_shape(shape)}"] if clip.event != "shape turns" else []
    if shape.kind in [one.kind for one in find_unique(scene, "kind")]:
        options += [f"the {shape.kind}"] * 2
    if len(clip.shapes) == 1:
        options += ["it", "the shape"]
    return pick(rng, tuple(options or [f"the {name_shape(shape)}"]))


def _pick_noun(clip: Clip, rng: np.random.Generator) -> str:
    """Draw a noun for the changing object: its kind, or "shape" if it is the only one."""
    return "shape" if len(clip.shapes) == 1 and rng.random() < 0.3 else clip.shapes[0].kind


Maker = Callable[[Clip, np.random.Generator], Turn]
_ALWAYS: tuple[tuple[Maker, float], ...] = (
    (ask_happens, 0.2), (ask_describe, 0.3), (ask_mover, 0.12), (ask_moves, 0.12),
    (ask_turner, 0.05), (ask_seen, 0.07),
)  # fmt: skip
MOTION_MAKERS: tuple[tuple[Maker, float], ...] = (*_ALWAYS, (ask_direction, 0.36))
COLOR_MAKERS: tuple[tuple[Maker, float], ...] = (
    (ask_happens, 0.16), (ask_describe, 0.25), (ask_mover, 0.04), (ask_moves, 0.04),
    (ask_turner, 0.06), (ask_seen, 0.05), (ask_direction, 0.05), (ask_order, 0.4), (ask_ends, 0.2),
)  # fmt: skip


def select_makers(clip: Clip, long: bool = True) -> tuple[tuple[Maker, float], ...]:
    """Return the families of questions that fit `clip`, with their shares.

    Without `long`, only those with short answers.
    """
    makers = COLOR_MAKERS if clip.paints else MOTION_MAKERS
    return makers if long else tuple(maker for maker in makers if maker[0] is not ask_describe)


def ask_clip(
    clip: Clip, rng: np.random.Generator, turns: int, makers: tuple[tuple[Maker, float], ...]
) -> list[Turn]:
    """Ask `turns` questions about `clip`, of families drawn by the weights of `makers`."""
    weights = np.array([weight for _, weight in makers])
    picks = rng.choice(len(makers), size=turns, p=weights / weights.sum())
    return [make_casual(makers[i][0](clip, rng), rng) for i in picks]
