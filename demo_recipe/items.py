"""The training data's types: pictures with labels, and turns that refer to places in them.

A turn has a question and an answer, and for each part of both the places in the pictures that it
refers to. Training uses the places to guide attention; nothing else uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Left, top, right, bottom, as shares of a picture's width and height.
Extent = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A place: an extent in one of the pictures of a conversation."""

    extent: Extent
    picture: int = 0


@dataclass(frozen=True)
class Part:
    """A part of a question or an answer, with the places that it refers to, if any."""

    text: str
    boxes: tuple[Box, ...] = ()


Wording = str | tuple[Part, ...]


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        family: The kind of question; an evaluation counts by it.
        missing: The words of the question that name something that no picture shows, or "".
    """

    family: str
    question: Wording
    answer: Wording
    missing: str = ""


@dataclass(frozen=True)
class Glyph:
    """One object that a picture shows, for the dense labels.

    Attributes:
        kind: One of `GLYPHS`.
        extent: Where it is.
        color: One of `draw.COLOR_NAMES`; None is not to be told.
        rank: Its number in reading order among its like (letters of a word, shapes of a
            picture, bars of a chart), from 0; -1 is not to be told.
        total: How many of its kind there are; -1 is not to be told.
        value: What a bar shows, 0 to 10; -1 is not to be told.
    """

    kind: str
    extent: Extent
    color: str | None = None
    rank: int = -1
    total: int = -1
    value: int = -1


TurnMaker = Callable[[np.random.Generator], Turn]


@dataclass(frozen=True)
class LabeledPicture:
    """A picture, the objects in it, and the makers of turns about it.

    Attributes:
        glyphs: From back to front.
        background: One of `draw.COLOR_NAMES`; None is not to be told.
        makers: Functions that make a turn about the picture, with their weights.
        talk: Makes two turns, the second of which refers to the first; None if there is none.
    """

    picture: Image.Image
    glyphs: tuple[Glyph, ...]
    makers: tuple[tuple[TurnMaker, float], ...]
    background: str | None = None
    talk: Callable[[np.random.Generator], list[Turn]] | None = None


def join_parts(said: Wording) -> str:
    """Return the text of a question or an answer."""
    return said if isinstance(said, str) else "".join(part.text for part in said)


def get_parts(said: Wording) -> tuple[Part, ...]:
    """Return the parts of a question or an answer."""
    return (Part(said),) if isinstance(said, str) else said


def fill(template: str, *parts: Part) -> tuple[Part, ...]:
    """Return the parts of `template`, with one of `parts` in place of each {}."""
    pieces = template.split("{}")
    assert len(pieces) == len(parts) + 1, (template, parts)
    said = [Part(pieces[0])]
    for part, piece in zip(parts, pieces[1:], strict=True):
        said += [part, Part(piece)]
    return tuple(part for part in said if part.text)
