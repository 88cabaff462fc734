"""Questions about printed words and numbers, and their true answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from demo_recipe.items import Box, Part, Turn, TurnMaker, fill
from demo_recipe.questions import DESCRIBE, WHAT, pick


@dataclass(frozen=True)
class Line:
    """One printed line: `kind` is "word", "number" or "letter"; a box for each letter."""

    kind: str
    text: str
    color: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class WordsPage:
    """One line or two, from top to bottom, on the color `ground` of the `surface` behind them."""

    lines: tuple[Line, ...]
    ground: str
    surface: str = "background"

    def of(self, kind: str) -> list[Line]:
        """The lines of one kind."""
        return [line for line in self.lines if line.kind == kind]


READ_IT = (
    "What does it say?", "What is written here?", "What does the picture say?", "Read it.",
    "What does this say?", "What is printed here?", "What is written in this image?",
    "Read what it says.",
)  # fmt: skip
READ_TEXT = (
    "Read the text.", "What does the text say?", "What does it say?", "What is written here?",
    "What is the text?", "Read this text.", "What does this say?", "Read both lines.",
)  # fmt: skip
READ_ONE = {
    "word": (
        "Read the {}.", "Which {} is written here?", "What is the {}?", "What {} is this?",
        "Which {} is this?", "What {} do you see?", "What {} is shown?", "Tell me the {}.",
    ),
    "number": (
        "Read the {}.", "Which {} is this?", "What is the {}?", "What {} is this?",
        "Which {} is written here?", "What {} do you see?", "What {} is shown?", "Tell me the {}.",
    ),
    "letter": (
        "Read the {}.", "Which {} is this?", "What is the {}?", "What {} is this?",
        "What {} do you see?", "What {} is shown?",
    ),
}  # fmt: skip
LINE = (
    "What does the {} line say?", "Read the {} line.", "What is written in the {} line?",
    "What is the {} line?", "What is in the {} line?", "What does it say in the {} line?",
)  # fmt: skip
TEXT_COLOR = (
    "What color is the {}?", "What colour is the {}?", "Which color is the {}?",
    "What is the color of the {}?", "Which colour does the {} have?",
    "Tell me the color of the {}.",
)  # fmt: skip
LETTER = (
    "What is the {} letter?", "Which letter is the {} one?", "What is the {} letter of the word?",
    "Which letter comes {}?", "Tell me the {} letter.", "Read the {} letter.",
)  # fmt: skip
LETTERS = (
    "How many {} are there?", "How many {} do you see?", "How many {} does it have?",
    "Count the {}.", "How many {} are in the picture?", "How many {}?",
)  # fmt: skip


def makers(page: WordsPage) -> tuple[tuple[TurnMaker, float], ...]:
    """Who asks about `page`, with weights that sum up to 1."""
    common: list[tuple[TurnMaker, float]] = [
        (partial(ask_text_color, page), 0.1), (partial(ask_what, page), 0.06),
        (partial(ask_describe, page), 0.04), (partial(ask_absent, page), 0.04),
    ]  # fmt: skip
    if len(page.lines) == 2:
        one = partial(ask_line, page) if _is_one_kind(page) else partial(read_one, page)
        common += [(partial(read_text, page), 0.5), (one, 0.16), (partial(ask_line, page), 0.1)]
    elif page.lines[0].kind == "word":
        common += [
            (partial(read_one, page), 0.6), (partial(ask_letter, page), 0.08),
            (partial(ask_letters, page), 0.08),
        ]  # fmt: skip
    elif page.lines[0].kind == "number":
        common += [(partial(read_one, page), 0.7), (partial(ask_letters, page), 0.06)]
    else:
        common += [(partial(read_one, page), 0.76)]
    return tuple(common)


def read_one(page: WordsPage, rng: np.random.Generator) -> Turn:
    """What the one line of its kind says."""
    line = page.lines[int(rng.integers(len(page.lines)))]
    family = "long word" if line.kind == "word" and len(line.text) > 5 else line.kind
    if len(page.lines) == 1 and rng.random() < 0.4:
        return Turn(family, pick(rng, READ_IT), _spell_line(line))
    question = fill(pick(rng, READ_ONE[line.kind]), Part(line.kind, line.boxes))
    return Turn(family, question, _spell_line(line))


def read_text(page: WordsPage, rng: np.random.Generator) -> Turn:
    """What both lines say, the upper one first."""
    upper, lower = page.lines
    answer = (*_spell_line(upper), Part(" "), *_spell_line(lower))
    if _is_one_kind(page) and rng.random() < 0.3:
        noun = Part(f"{upper.kind}s", (*upper.boxes, *lower.boxes))
        asked = pick(
            rng, ("Read the {}.", "What are the {}?", "Read both {}.", "Which {} are these?")
        )
        return Turn("two words", fill(asked, noun), answer)
    return Turn("two words", pick(rng, READ_TEXT), answer)


def ask_line(page: WordsPage, rng: np.random.Generator) -> Turn:
    """What one of the two lines says."""
    which = int(rng.integers(2))
    names = (("upper", "first", "top"), ("lower", "second", "bottom"))[which]
    line = page.lines[which]
    return Turn(
        "line", fill(pick(rng, LINE), Part(pick(rng, names), line.boxes)), _spell_line(line)
    )


def ask_text_color(page: WordsPage, rng: np.random.Generator) -> Turn:
    """The color of the text, or of a line that the question tells from the other."""
    line = page.lines[int(rng.integers(len(page.lines)))]
    boxes = tuple(box for line in page.lines for box in line.boxes)
    noun: tuple[Part, ...] = (Part("text", boxes),)
    if len({one.color for one in page.lines}) == 2:
        noun = (Part(f"{line.kind} ", line.boxes), *_spell_line(line))
        boxes = line.boxes
    elif len(page.lines) == 1 and rng.random() < 0.6:
        noun = (Part(line.kind, boxes),)
    template = pick(rng, TEXT_COLOR).replace("{}", "{}" * len(noun))
    return Turn(
        "text color", fill(template, *noun), _end_sentence(Part(line.color.capitalize(), boxes))
    )


def ask_letter(page: WordsPage, rng: np.random.Generator) -> Turn:
    """The first or the last letter of the word."""
    line = page.lines[0]
    which = int(rng.integers(2)) - 1
    box = line.boxes[which : which + 1 or None]
    question = fill(pick(rng, LETTER), Part("last" if which else "first", box))
    return Turn("first letter", question, (Part(line.text[which], box),))


def ask_letters(page: WordsPage, rng: np.random.Generator) -> Turn:
    """How many letters the word has, or digits the number."""
    line = page.lines[0]
    noun = Part("letters" if line.kind == "word" else "digits", line.boxes)
    answer = _end_sentence(Part(str(len(line.text)), line.boxes))
    return Turn("letters", fill(pick(rng, LETTERS), noun), answer)


def ask_absent(page: WordsPage, rng: np.random.Generator) -> Turn:
    """That there is no word or no number, to a question that takes one for granted."""
    missing = [kind for kind in ("word", "number") if not page.of(kind)]
    if not missing:
        return read_one(page, rng)
    kind = pick(rng, tuple(missing))
    return Turn("absent", pick(rng, READ_ONE[kind]).format(kind), f"There is no {kind}.", kind)


def ask_what(page: WordsPage, rng: np.random.Generator) -> Turn:
    """What the picture shows: the kinds of the lines and what they say."""
    asked = WHAT[:-1]  # which asks for shapes
    return Turn("what text", pick(rng, asked), _end_sentence(*_name_lines(page, colored=False)))


def ask_describe(page: WordsPage, rng: np.random.Generator) -> Turn:
    """What the picture shows, with its colors."""
    ground = f"{'an' if page.ground == 'orange' else 'a'} {page.ground} {page.surface}"
    return Turn(
        "describe text",
        pick(rng, DESCRIBE),
        _end_sentence(*_name_lines(page, colored=True), Part(f" on {ground}")),
    )


def _name_lines(page: WordsPage, colored: bool) -> tuple[Part, ...]:
    """ "The word RED and the number 7", with or without the color of each."""
    said: list[Part] = []
    for line in page.lines:
        said += [Part(" and the " if said else "The "), Part(f"{line.kind} ", line.boxes)]
        said += _spell_line(line)
        if colored:
            said += [Part(f" in {line.color}", line.boxes)]
    return tuple(said)


def _spell_line(line: Line) -> tuple[Part, ...]:
    """The text of `line`, a part a letter."""
    return tuple(Part(letter, (box,)) for letter, box in zip(line.text, line.boxes, strict=True))


def _end_sentence(*parts: Part) -> tuple[Part, ...]:
    return (*parts, Part("."))


def _is_one_kind(page: WordsPage) -> bool:
    return len({line.kind for line in page.lines}) == 1
