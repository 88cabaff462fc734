"""Turns as token ids, with the weight of each token in the loss and the places it refers to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo_recipe.items import Box, Turn, get_parts, join_parts
from mlx_smolvlm.prompt.builder import PromptBuilder

Pointed = tuple[int, tuple[Box, ...]]  # an index in a row, and where its token should attend


@dataclass(frozen=True)
class QuestionRow:
    """The tokens of some turns, after the prefix that holds the pictures.

    Attributes:
        ids: Token ids (M,).
        weights: The weight of each token in the loss, (M,); 0 for tokens that are not targets.
        question_pointers: The question's words that name something.
        answer_pointers: The tokens before answer tokens that are read off a picture.
        missing_places: The indices of words that name something that no picture shows.
    """

    ids: list[int]
    weights: list[float]
    question_pointers: list[Pointed]
    answer_pointers: list[Pointed]
    missing_places: list[int]


def make_row(builder: PromptBuilder, turns: list[Turn], before: str) -> QuestionRow:
    """Tokenize `turns`; the text `before` comes before the first question.

    A test checks that prefix and row together equal `PromptBuilder.build` of the same messages.
    """
    row = QuestionRow([], [], [], [], [])
    end = builder.config.eos_token_ids[0]
    for turn in turns:
        ids, ends = _encode(builder, f"{before}{join_parts(turn.question)}")
        for start, stop, boxes in _find_spans(turn, len(before)):
            if boxes:
                places = _find_last(ends, start, stop)
                row.question_pointers.extend((len(row.ids) + place, boxes) for place in places)
        places = _find_last(ends, *_find_missing(turn, len(before)))
        row.missing_places.extend(len(row.ids) + place for place in places)
        asked = [*ids, end, *_encode(builder, "\nAssistant:")[0]]
        _add_answer(builder, row, turn, asked)
        before = "\nUser: "
    return row


def _add_answer(builder: PromptBuilder, row: QuestionRow, turn: Turn, asked: list[int]) -> None:
    """Add the question `asked` and the answer of `turn` to `row`."""
    ids, ends = _encode(builder, f" {join_parts(turn.answer)}")
    first, start = len(row.ids) + len(asked), 1
    for part in get_parts(turn.answer):
        stop = start + len(part.text)
        if part.boxes:
            places = [i for i, at in enumerate(ends) if start < at <= stop]
            row.answer_pointers.extend((first + place - 1, part.boxes) for place in places)
        start = stop
    row.ids.extend([*asked, *ids, builder.config.eos_token_ids[0]])
    share = (len(ids) + 1) ** -0.75
    row.weights.extend([0.0] * len(asked) + [share] * (len(ids) + 1))


def _find_last(ends: list[int], start: int, stop: int) -> list[int]:
    """Return the last token that ends between two characters, as a list of at most one index."""
    return [place for place, at in enumerate(ends) if start < at <= stop][-1:]


def _find_missing(turn: Turn, start: int) -> tuple[int, int]:
    """Return the character range (start, stop) of the missing words in the question of `turn`."""
    found = join_parts(turn.question).lower().rfind(turn.missing.lower())
    return (start + found, start + found + len(turn.missing)) if found >= 0 else (0, 0)


def _find_spans(turn: Turn, start: int) -> list[tuple[int, int, tuple[Box, ...]]]:
    """Return the character range (start, stop) and the boxes of each part of the question."""
    spans = []
    for part in get_parts(turn.question):
        spans.append((start, start + len(part.text), part.boxes))
        start += len(part.text)
    return spans


def _encode(builder: PromptBuilder, text: str) -> tuple[list[int], list[int]]:
    """Return the token ids of `text`, and the character offset at which each token ends."""
    encoding = builder.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [stop for _, stop in encoding.offsets]


def pad_rows(rows: list[QuestionRow]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids, int32 (B, M), and weights, float32 (B, M), of `rows`, padded with 0."""
    length = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], weights[i, : len(row.ids)] = row.ids, row.weights
    return ids, weights
