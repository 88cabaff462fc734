"""Losses on what a clip shows: at the end of each frame, and at a question's words.

The end of a frame tells what the shape is that moves or turns, where it is by now and
which way it went; a word of a question tells how what it names moves. The answer has to
copy then, as in `grounding.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.text import TextModel
from mlx_smolvlm.train.clips import MOTIONS, Clip, sampled_indices
from mlx_smolvlm.train.draw import COLOR_NAMES, SHAPES
from mlx_smolvlm.train.grounding import ANY, Words

FRAME_LAYERS, WORD_LAYERS = 2, 3  # after so many layers frames and words are read
_BINS = 8  # of a place along a side
_LEAST_WAY = 0.04  # share of a side; with less the way is not to be told yet
_FRAME_SIZES = (len(SHAPES), len(COLOR_NAMES), len(COLOR_NAMES), _BINS, _BINS, len(MOTIONS), 4)
_ABSENT = len(MOTIONS)


def frame_labels(clip: Clip) -> np.ndarray:
    """Labels int32 (F, 7) of the sampled frames of `clip`; -1 where there is nothing to tell.

    Kind and color of the first shape, the background's color, the shape's column and row of
    eight, its motion so far, and which of the colors it is by now. Which of two shapes moves
    is not to be told from the first frame.
    """
    indices = sampled_indices(clip.frames, clip.fps)
    labels = np.full((len(indices), len(_FRAME_SIZES)), -1, np.int32)
    start = clip.scene(0)
    for row, index in zip(labels, indices, strict=True):
        scene = clip.scene(index)
        row[2] = COLOR_NAMES.index(scene.background)
        row[6] = clip.color_number(index)
        if not scene.shapes:
            continue
        shape, first = scene.shapes[0], start.shapes[0]
        way = max(abs(shape.x - first.x) / scene.width, abs(shape.y - first.y) / scene.height)
        if len(scene.shapes) == 1 or way > _LEAST_WAY or clip.color_number(index):
            row[0], row[1] = SHAPES.index(shape.kind), COLOR_NAMES.index(shape.color)
            row[3] = int(_BINS * shape.x / scene.width)
            row[4] = int(_BINS * shape.y / scene.height)
        if index and (clip.motion == "none" or way > _LEAST_WAY):
            row[5] = MOTIONS.index(clip.motion)
    return labels


def word_motions(clip: Clip, ids: list[int], words: Words) -> list[tuple[int, int]]:
    """Place in `ids` and motion of what each word for a kind of shape refers to.

    The motion is an index of `MOTIONS`, or one more if there is no such shape. Words that
    fit several shapes are left out.
    """
    found = []
    for place, token in enumerate(ids):
        if token not in words or words[token][0] != "kind":
            continue
        asked = [words[token]]
        before = words.get(ids[place - 1]) if place else None
        if before and before[0] == "color":
            asked.append(before)
        asked = [(name, value) for name, value in asked if value != ANY]
        shapes = [s for s in clip.shapes if all(getattr(s, n) == value for n, value in asked)]
        if not shapes:
            found.append((place, _ABSENT))
        elif len(shapes) == 1:
            motion = clip.motion if shapes[0] is clip.shapes[0] else MOTIONS[0]
            found.append((place, MOTIONS.index(motion)))
    return found


class MotionHeads(nn.Module):
    """Linear layers from hidden states to the logits of frames' and words' labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frame = nn.Linear(width, sum(_FRAME_SIZES))
        self.word = nn.Linear(width, len(MOTIONS) + 1)

    def frame_loss(self, hidden_states: mx.array, labels: mx.array) -> mx.array:
        """Cross-entropy of `labels` (S, 7) from `hidden_states` (S, D), summed over the labels."""
        unit = mx.fast.rms_norm(hidden_states, None, 1e-5)
        parts = mx.split(self.frame(unit), np.cumsum(_FRAME_SIZES)[:-1].tolist(), axis=-1)
        known = labels >= 0
        losses = [
            nn.losses.cross_entropy(part, mx.maximum(labels[:, i], 0)) * known[:, i]
            for i, part in enumerate(parts)
        ]
        return mx.stack(losses).sum() / len(labels)

    def word_loss(self, hidden_states: mx.array, labels: mx.array) -> mx.array:
        """Mean cross-entropy of `labels` (S,), none where -1, from `hidden_states` (S, D)."""
        unit = mx.fast.rms_norm(hidden_states, None, 1e-5)
        losses = nn.losses.cross_entropy(self.word(unit), mx.maximum(labels, 0)) * (labels >= 0)
        return losses.sum() / len(labels)


class SharedPrefix(KVCache):
    """Keys and values of C beginnings, which R continuations each are computed on."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.repeats = 0

    def update(self, layer: int, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of `layer`, those of the beginnings (repeated) first."""
        if not self.repeats:
            self.buffers[layer] = keys_values
            keys, values = mx.split(keys_values, 2, axis=1)
            return keys, values
        before = self.buffers[layer]
        assert before is not None
        both = mx.concatenate([mx.repeat(before, self.repeats, axis=0), keys_values], axis=2)
        keys, values = mx.split(both, 2, axis=1)
        return keys, values


def layer_states(
    text_model: TextModel, inputs_embeds: mx.array, cache: SharedPrefix
) -> list[mx.array]:
    """Hidden states (B, L, D) after each layer, the last one normalised."""
    b, length, _ = inputs_embeds.shape
    turned = [cache.offset] * text_model.rotated_rows + [0] * text_model.still_rows
    positions = mx.array(turned * b)
    states, x = [], inputs_embeds
    for layer in text_model.layers:
        x = layer(x, positions, cache)
        states.append(x)
    cache.offset += length
    states[-1] = text_model.norm(x)
    return states
