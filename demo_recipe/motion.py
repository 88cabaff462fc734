"""Losses on what a clip shows: at each image token, at the end of each frame, at words.

Answers alone teach little of motion: whoever cannot compare frames yet has nothing to
answer from. So an image token tells what was at its place one frame before, then how the
shape moved that it shows and where that began; the end of a frame tells of the shape that
moves or turns; and a word of a question tells how what it names moves and which colors it
has. The answer has to copy then, as in `grounding.py`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from demo_recipe.clips import EVENTS, MOTIONS, Clip, sampled_indices
from demo_recipe.draw import COLOR_NAMES, SHAPES, Scene, Shape, render_index_map
from demo_recipe.grounding import ANY, Words

# After so many layers is read what was before, how it moved, and what frames and words tell.
BEFORE_LAYERS, WAY_LAYERS, FRAME_LAYERS, WORD_LAYERS = 2, 3, 4, 4
_BINS = 8  # of a place along a side
_LEAST_WAY = 0.04  # share of a side; with less the way is not to be told yet
_HUES = len(COLOR_NAMES)
_FRAME_SIZES = (len(SHAPES), _HUES, _HUES, _BINS, _BINS, len(MOTIONS), 4, _HUES, _HUES, len(EVENTS))
_WORD_SIZES = (len(MOTIONS) + 1, _HUES, _HUES)
_BEFORE_SIZES = (len(SHAPES) + 1, len(COLOR_NAMES))
_WAY_SIZES = (len(MOTIONS), _BINS, _BINS)
_ABSENT = len(MOTIONS)
_LEAST_COVER = 0.08  # share of a token's square that a shape must cover to be shown there


def make_token_labels(clip: Clip, side: int) -> np.ndarray:
    """Labels int32 (F, I, 5) of the image tokens, `side` x `side` a frame; -1 for nothing to tell.

    Kind + 1 (0: background) and color of what was at the token's place one frame before; and of
    the shape that it shows the motion, and the column and row of eight where that began.
    """
    indices = sampled_indices(clip.frames, clip.fps)
    labels = np.full((len(indices), side * side, 5), -1, np.int32)
    start, before = clip.scene(0), None
    for row, index in zip(labels, indices, strict=True):
        scene = clip.scene(index)
        shown = _find_visible(scene, side)
        if before is not None:
            row[:, :2] = before
            for i, (shape, first) in enumerate(zip(scene.shapes, start.shapes, strict=True)):
                motion = clip.motion if i == 0 else MOTIONS[0]
                told = motion == "none" or _compute_way(shape, first, scene) > _LEAST_WAY
                row[shown == i + 1, 2] = MOTIONS.index(motion) if told else -1
                row[shown == i + 1, 3] = int(_BINS * first.x / scene.width)
                row[shown == i + 1, 4] = int(_BINS * first.y / scene.height)
        kinds = np.array([0, *(1 + SHAPES.index(shape.kind) for shape in scene.shapes)])
        colors = [scene.background, *(shape.color for shape in scene.shapes)]
        hues = np.array([COLOR_NAMES.index(color) for color in colors])
        before = np.stack([kinds[shown], hues[shown]], -1)
    return labels


def _find_visible(scene: Scene, side: int) -> np.ndarray:
    """Return the number of the shape in each of `side` x `side` squares, flat; 0 for none."""
    squares = render_index_map(scene, 16 * side).reshape(side, 16, side, 16).swapaxes(1, 2)
    pixels = squares.reshape(side * side, 256)
    best, cover = np.zeros(side * side, int), np.full(side * side, _LEAST_COVER)
    for i in range(1, len(scene.shapes) + 1):
        share = (pixels == i).mean(-1)
        best, cover = np.where(share > cover, i, best), np.maximum(share, cover)
    return best


def _compute_way(shape: Shape, first: Shape, scene: Scene) -> float:
    """How far `shape` is from where it was at `first`, as a share of the longer of both ways."""
    return max(abs(shape.x - first.x) / scene.width, abs(shape.y - first.y) / scene.height)


def make_frame_labels(clip: Clip) -> np.ndarray:
    """Labels int32 (F, 10) of the sampled frames of `clip`; -1 where there is nothing to tell.

    Kind and color of the first shape, the background's color, the shape's column and row of
    eight, its motion so far, and which of the colors it is by now; then the color of what turns
    (or of the shape) one frame before and in the first frame, and what happened by now. Which
    of two shapes moves is not to be told from the first frame.
    """
    indices = sampled_indices(clip.frames, clip.fps)
    labels = np.full((len(indices), len(_FRAME_SIZES)), -1, np.int32)
    start, before = clip.scene(0), -1
    for row, index in zip(labels, indices, strict=True):
        scene = clip.scene(index)
        row[2] = COLOR_NAMES.index(scene.background)
        row[6] = clip.color_number(index)
        if index and clip.event != "moves":
            row[9] = EVENTS.index(clip.event if row[6] else "stays")
        if clip.event == "background turns":
            row[7:9] = before, COLOR_NAMES.index(start.background)
            before = row[2]
        if not scene.shapes:
            continue
        shape, first = scene.shapes[0], start.shapes[0]
        way = _compute_way(shape, first, scene)
        if len(scene.shapes) == 1 or way > _LEAST_WAY or clip.color_number(index):
            row[0], row[1] = SHAPES.index(shape.kind), COLOR_NAMES.index(shape.color)
            row[3] = int(_BINS * shape.x / scene.width)
            row[4] = int(_BINS * shape.y / scene.height)
            if clip.event != "background turns":
                row[7:9] = before, COLOR_NAMES.index(first.color)
                before = row[1]
        if index and (clip.motion == "none" or way > _LEAST_WAY):
            row[5] = MOTIONS.index(clip.motion)
            row[9] = EVENTS.index("moves") if clip.motion != "none" else row[9]
    return labels


def make_word_labels(clip: Clip, ids: list[int], words: Words) -> list[tuple[int, int, int, int]]:
    """Place in `ids`, motion, first and last color of what each word for a kind refers to.

    The motion is an index of `MOTIONS`, or one more if there is no such shape, whose colors
    are -1 then. Words that fit several shapes are left out.
    """
    found = []
    ends = clip.scene(0).shapes, clip.scene(clip.frames - 1).shapes
    for place, token in enumerate(ids):
        if token not in words or words[token][0] != "kind":
            continue
        asked = [words[token]]
        before = words.get(ids[place - 1]) if place else None
        if before and before[0] == "color":
            asked.append(before)
        asked = [(name, value) for name, value in asked if value != ANY]
        numbers = [
            number
            for number, shape in enumerate(clip.shapes)
            if all(getattr(shape, name) == value for name, value in asked)
        ]
        if not numbers:
            found.append((place, _ABSENT, -1, -1))
        elif len(numbers) == 1:
            motion = MOTIONS[0] if numbers[0] else clip.motion
            first, last = (COLOR_NAMES.index(shapes[numbers[0]].color) for shapes in ends)
            found.append((place, MOTIONS.index(motion), first, last))
    return found


class MotionHeads(nn.Module):
    """Linear layers from hidden states to the logits of all labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(width, sum(_BEFORE_SIZES))
        self.way = nn.Linear(width, sum(_WAY_SIZES))
        self.frame = nn.Linear(width, sum(_FRAME_SIZES))
        self.word = nn.Linear(width, sum(_WORD_SIZES))

    def token_loss(self, first: mx.array, second: mx.array, labels: mx.array) -> mx.array:
        """Loss of `token_labels` (S, 5) from states (S, D) after the layers that tell them."""
        before = _sum_losses(self.before(first), labels[:, :2], _BEFORE_SIZES)
        return before + _sum_losses(self.way(second), labels[:, 2:], _WAY_SIZES)

    def frame_loss(self, states: mx.array, labels: mx.array) -> mx.array:
        """Loss of `frame_labels` (S, 10) from states (S, D)."""
        return _sum_losses(self.frame(states), labels, _FRAME_SIZES)

    def word_loss(self, states: mx.array, labels: mx.array) -> mx.array:
        """Loss of `make_word_labels` (S, 3) from states (S, D)."""
        return _sum_losses(self.word(states), labels, _WORD_SIZES)


def normalize_states(hidden_states: mx.array) -> mx.array:
    """Scale `hidden_states` to length one, for the heads."""
    return mx.fast.rms_norm(hidden_states, None, 1e-5)


def _sum_losses(logits: mx.array, labels: mx.array, sizes: tuple[int, ...]) -> mx.array:
    """Return the summed mean cross-entropy of the columns of `labels` (S, columns), without -1."""
    parts: Any = mx.split(logits, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    total = mx.array(0.0)
    for i, part in enumerate(parts):
        known = labels[:, i] >= 0
        losses = nn.losses.cross_entropy(part, mx.maximum(labels[:, i], 0)) * known
        total = total + losses.sum() / mx.maximum(known.sum(), 1)
    return total
