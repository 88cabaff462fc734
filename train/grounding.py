"""A loss on the words of a question: what "circle" refers to in the picture.

The answers alone leave the decoder on a plateau where it names any of the colors
that it sees. With this loss a word of a question looks its shape up, and the
answer only has to copy what was found.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from mlx_smolvlm.text import TextModel
from mlx_smolvlm.train.draw import COLOR_NAMES, SHAPES, Scene
from mlx_smolvlm.train.questions import plural

LAYERS = 2  # the lookup is read after so many layers; the others can use it
_SIZES = (
    7,
    len(SHAPES),
    len(COLOR_NAMES),
    9,
)  # how many there are; of the only one kind, color, cell

ANY = "any"  # the kind that "shape" and "object" mean

Words = dict[int, tuple[str, str]]


def word_table(tokenizer: Tokenizer) -> Words:
    """Attribute and value that the tokens for kinds and colors stand for."""
    spelled = [(kind, "kind", kind) for kind in SHAPES]
    spelled += [(plural(kind), "kind", kind) for kind in SHAPES]
    spelled += [(color, "color", color) for color in COLOR_NAMES]
    spelled += [(noun, "kind", ANY) for noun in ("shape", "object", "shapes", "objects", "things")]
    table: Words = {}
    for text, attribute, value in spelled:
        token = tokenizer.token_to_id(f"Ġ{text}")
        if token is not None:
            table[token] = (attribute, value)
    return table


def referents(scene: Scene, ids: list[int], words: Words) -> list[tuple[int, int, int, int, int]]:
    """Place in `ids`, count, kind, color and cell of what each word for a shape refers to.

    Kind, color and cell are -1 unless there is one such shape. A kind after a color
    refers to both, as in "red circle".
    """
    found = []
    for place, token in enumerate(ids):
        if token not in words:
            continue
        asked = [words[token]]
        before = words.get(ids[place - 1]) if place else None
        if asked[0][0] == "kind" and before and before[0] == "color":
            asked.append(before)
        asked = [(name, value) for name, value in asked if value != ANY]
        shapes = [s for s in scene.shapes if all(getattr(s, n) == value for n, value in asked)]
        only = (-1, -1, -1)
        if len(shapes) == 1:
            shape = shapes[0]
            only = (SHAPES.index(shape.kind), COLOR_NAMES.index(shape.color), shape.cell)
        found.append((place, len(shapes), *only))
    return found


def referent_head(width: int) -> nn.Linear:
    """A linear layer from hidden states to the logits of what a word refers to."""
    return nn.Linear(width, sum(_SIZES))


def referent_loss(head: nn.Linear, hidden_states: mx.array, labels: mx.array) -> mx.array:
    """Mean cross-entropy of `labels` (S, 4) from `hidden_states` (S, D) of the words."""
    unit = mx.fast.rms_norm(hidden_states, None, 1e-5)
    parts = mx.split(head(unit), np.cumsum(_SIZES)[:-1].tolist(), axis=-1)
    known = labels >= 0
    losses = [
        nn.losses.cross_entropy(part, mx.maximum(labels[:, i], 0)) * known[:, i]
        for i, part in enumerate(parts)
    ]
    return mx.stack(losses).sum() / len(labels)


def hidden_states(text_model: TextModel, inputs_embeds: mx.array) -> tuple[mx.array, mx.array]:
    """Hidden states (B, L, D) after the first `LAYERS` layers, and the model's own at the end."""
    b = len(inputs_embeds)
    positions = mx.zeros((b * (text_model.rotated_rows + text_model.still_rows),), mx.int32)
    x = middle = inputs_embeds
    for number, layer in enumerate(text_model.layers):
        x = layer(x, positions, None)
        if number + 1 == LAYERS:
            middle = x
    return middle, text_model.norm(x)
