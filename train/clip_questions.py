"""Questions about a clip and their true answers, one wording of an answer each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_smolvlm.train.clips import Clip
from mlx_smolvlm.train.draw import SHAPES, Shape
from mlx_smolvlm.train.questions import (
    BACKGROUND,
    COLOR,
    COUNT,
    Turn,
    article,
    casual,
    name,
    pick,
    unique,
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


def colors_in_order(clip: Clip) -> str:
    """The colors of what turns, as in "red, then blue"."""
    return ", then ".join(clip.colors)


def event(clip: Clip) -> str:
    """Answer to "what happens", without a full stop."""
    if clip.event == "background turns":
        return f"The background turns {colors_in_order(clip)}"
    first = clip.shapes[0]
    if clip.event == "shape turns":
        return f"{article(first.kind).capitalize()} turns {colors_in_order(clip)}"
    if clip.event == "moves":
        return f"{article(name(first)).capitalize()} moves {_WAYS[clip.motion]}"
    if len(clip.shapes) == 1:
        return f"{article(name(first)).capitalize()} stays still"
    return "Nothing moves"


def story(clip: Clip) -> str:
    """Answer to "describe the video": what happens, what else is there, and the background."""
    others = [article(name(shape)) for shape in clip.shapes[1:]]
    ground = f"on {article(clip.background[0])} background"
    if clip.event == "background turns":
        behind = [article(name(shape)) for shape in clip.shapes]
        return event(clip) + (f", behind {behind[0]}." if behind else ".")
    if clip.event == "stays" and others:
        return f"Nothing moves {ground}."
    if others and clip.paints:
        return f"{event(clip)}, beside {others[0]}, {ground}."
    if others:
        return f"{event(clip)} and {others[0]} stays still, {ground}."
    return f"{event(clip)}{',' if clip.paints else ''} {ground}."


def way(clip: Clip, shape: Shape) -> str:
    """Answer to which way `shape`, one of the clip's, moves."""
    if clip.motion == "none" or shape != clip.shapes[0]:
        return STILL
    return f"{_WAYS[clip.motion].capitalize()}."


def happens(clip: Clip, rng: np.random.Generator) -> Turn:
    """What happens, in a few words."""
    return Turn("happens", pick(rng, HAPPENS), f"{event(clip)}.")


def describe(clip: Clip, rng: np.random.Generator) -> Turn:
    """What happens, with what else is there and the background."""
    return Turn("story", pick(rng, STORY), story(clip))


def direction(clip: Clip, rng: np.random.Generator) -> Turn:
    """Which way a shape moves, or that it stays, or that there is none."""
    if rng.random() < 0.06 or not clip.shapes:
        kinds = [shape.kind for shape in clip.shapes]
        kind = str(rng.choice([kind for kind in SHAPES if kind not in kinds]))
        return Turn("absent", pick(rng, DIRECTION).format(f"the {kind}"), f"There is no {kind}.")
    shape = _one_of(clip, rng)
    asked = _naming(clip, shape, rng)
    answer = way(clip, shape)
    if answer != STILL and rng.random() < 0.3:
        wording = ACROSS if clip.motion in ("left", "right") else ALONG
        return Turn("direction", pick(rng, wording).format(asked), answer)
    return Turn("direction", pick(rng, DIRECTION).format(asked), answer)


def mover(clip: Clip, rng: np.random.Generator) -> Turn:
    """What moves; of two shapes now and then what stays."""
    if clip.motion == "none":
        return Turn("mover", pick(rng, MOVER), "Nothing.")
    if len(clip.shapes) == 2 and rng.random() < 0.25:
        return Turn("mover", pick(rng, KEEPER), f"{article(name(clip.shapes[1])).capitalize()}.")
    return Turn("mover", pick(rng, MOVER), f"{article(name(clip.shapes[0])).capitalize()}.")


def moves(clip: Clip, rng: np.random.Generator) -> Turn:
    """Whether a shape, or anything at all, moves."""
    if not clip.shapes or rng.random() < 0.3:
        asked = str(rng.choice(("anything", "something")))
        answer = "No." if clip.motion == "none" else "Yes."
        return Turn("moves", pick(rng, MOVES).format(asked), answer)
    shape = _one_of(clip, rng)
    moving = shape is clip.shapes[0] and clip.motion != "none"
    asked = _naming(clip, shape, rng)
    if rng.random() < 0.25:
        return Turn("moves", pick(rng, EITHER).format(asked), "It moves." if moving else STILL)
    return Turn("moves", pick(rng, MOVES).format(asked), "Yes." if moving else "No.")


def order(clip: Clip, rng: np.random.Generator) -> Turn:
    """All colors of what turns, in order."""
    family = "order of two" if len(clip.colors) == 2 else "order of more"
    return Turn(family, pick(rng, ORDER), f"{colors_in_order(clip).capitalize()}.")


def ends(clip: Clip, rng: np.random.Generator) -> Turn:
    """The first or the last color of what turns."""
    is_first = rng.random() < 0.5
    answer = f"{clip.colors[0 if is_first else -1].capitalize()}."
    if rng.random() < 0.4:
        return Turn("ends", pick(rng, FIRST if is_first else LAST), answer)
    asked = "background" if clip.event == "background turns" else _noun(clip, rng)
    return Turn("ends", pick(rng, AT_FIRST if is_first else AT_LAST).format(asked), answer)


def turner(clip: Clip, rng: np.random.Generator) -> Turn:
    """What changes its color, if anything does."""
    answer = "Nothing."
    if clip.paints:
        turns = "background" if clip.event == "background turns" else clip.shapes[0].kind
        answer = f"The {turns}."
    wording = TURNER if clip.motion == "none" else TURNER[:2]
    return Turn("turner", pick(rng, wording), answer)


def seen(clip: Clip, rng: np.random.Generator) -> Turn:
    """What a single frame shows as well: a color, the background, how many shapes there are."""
    draw = rng.random()
    if draw < 0.4 and clip.event != "background turns":
        return Turn("seen", pick(rng, BACKGROUND), f"{clip.background[0].capitalize()}.")
    if draw > 0.6:
        still = clip.shapes[1:] if clip.event == "shape turns" else clip.shapes
        single = [shape for shape in unique(clip.scene(0), "kind") if shape.kind in _kinds(still)]
        if single:
            shape = single[int(rng.integers(len(single)))]
            return Turn("seen", pick(rng, COLOR).format(shape.kind), f"{shape.color.capitalize()}.")
    return Turn("seen", pick(rng, COUNT).format("shapes"), f"{len(clip.shapes)}.")


def _kinds(shapes: tuple[Shape, ...]) -> list[str]:
    return [shape.kind for shape in shapes]


def _one_of(clip: Clip, rng: np.random.Generator) -> Shape:
    """What is asked about: the first shape in two cases of three."""
    return clip.shapes[0 if len(clip.shapes) == 1 or rng.random() < 0.65 else 1]


def _naming(clip: Clip, shape: Shape, rng: np.random.Generator) -> str:
    """Words that name `shape` beyond doubt, as in "the red circle"."""
    scene = clip.scene(0)
    options = [f"the {name(shape)}"] if clip.event != "shape turns" else []
    if shape.kind in [one.kind for one in unique(scene, "kind")]:
        options += [f"the {shape.kind}"] * 2
    if len(clip.shapes) == 1:
        options += ["it", "the shape"]
    return pick(rng, tuple(options or [f"the {name(shape)}"]))


def _noun(clip: Clip, rng: np.random.Generator) -> str:
    """A noun for what turns: its kind, or "shape" where there is one only."""
    return "shape" if len(clip.shapes) == 1 and rng.random() < 0.3 else clip.shapes[0].kind


Maker = Callable[[Clip, np.random.Generator], Turn]
_ALWAYS: tuple[tuple[Maker, float], ...] = (
    (happens, 0.2), (describe, 0.3), (mover, 0.12), (moves, 0.12), (turner, 0.05), (seen, 0.07),
)  # fmt: skip
MOTION_MAKERS: tuple[tuple[Maker, float], ...] = (*_ALWAYS, (direction, 0.36))
COLOR_MAKERS: tuple[tuple[Maker, float], ...] = (
    (happens, 0.16), (describe, 0.25), (mover, 0.04), (moves, 0.04), (turner, 0.06), (seen, 0.05),
    (direction, 0.05), (order, 0.4), (ends, 0.2),
)  # fmt: skip


def makers_of(clip: Clip, long: bool = True) -> tuple[tuple[Maker, float], ...]:
    """Families of questions that make sense for `clip`, with their shares.

    Without `long`, only those with short answers.
    """
    makers = COLOR_MAKERS if clip.paints else MOTION_MAKERS
    return makers if long else tuple(maker for maker in makers if maker[0] is not describe)


def ask_clip(
    clip: Clip, rng: np.random.Generator, turns: int, makers: tuple[tuple[Maker, float], ...]
) -> list[Turn]:
    """`turns` questions about `clip`, of families drawn by the weights of `makers`."""
    weights = np.array([weight for _, weight in makers])
    picks = rng.choice(len(makers), size=turns, p=weights / weights.sum())
    return [casual(makers[i][0](clip, rng), rng) for i in picks]
