"""Pretraining of the vision encoder on dense labels: what each patch shows.

It stands in for SigLIP's own pretraining: the decoder then starts from features
that already tell shapes, colors and places apart.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import VisionConfig
from mlx_smolvlm.train.draw import COLOR_NAMES, SHAPES, Scene, index_map
from mlx_smolvlm.vision import VisionModel

_LEAST_COVER = 0.15  # share of a patch that a shape must cover to be its label
_SIZES = (len(SHAPES) + 1, len(COLOR_NAMES), 2, 10)  # shape, color, holds a centre, cell


def patch_labels(scene: Scene, config: VisionConfig, tiles: int) -> np.ndarray:
    """Labels (N, P, 5) of the tiles of a `tiles` x `tiles` grid, or of one global tile for 1.

    The last axis is kind, color, whether a centre lies in the patch, cell + 1, and
    whether the cell is to be predicted.
    """
    side, grid = config.patch_grid * tiles, config.patch_grid
    shown = (
        index_map(scene, 8 * side).reshape(side, 8, side, 8).swapaxes(1, 2).reshape(side, side, 64)
    )
    best, cover = np.zeros((side, side), int), np.full((side, side), _LEAST_COVER)
    for i in range(1, len(scene.shapes) + 1):
        share = (shown == i).mean(-1)
        best, cover = np.where(share > cover, i, best), np.maximum(share, cover)
    kinds = np.array([0, *(1 + SHAPES.index(shape.kind) for shape in scene.shapes)])
    colors = np.array(
        [COLOR_NAMES.index(c) for c in (scene.background, *(s.color for s in scene.shapes))]
    )
    cells = np.array([0, *(1 + shape.cell for shape in scene.shapes)])
    centre = np.zeros((side, side), int)
    for shape in scene.shapes:
        centre[int(shape.y / scene.height * side), int(shape.x / scene.width * side)] = 1
    known = np.full((side, side), int(tiles == 1))
    labels = np.stack([kinds[best], colors[best], centre, cells[best], known], -1)
    labels = labels.reshape(tiles, grid, tiles, grid, 5).swapaxes(1, 2)
    return labels.reshape(tiles * tiles, grid * grid, 5).astype(np.int32)


def label_head(config: VisionConfig) -> nn.Linear:
    """A linear layer from patch features to the logits of all labels."""
    return nn.Linear(config.hidden_size, sum(_SIZES))


def _split_labels(logits: mx.array) -> list[mx.array]:
    """Logits (N, P, classes) of each of the four labels."""
    parts: Any = mx.split(logits, np.cumsum(_SIZES)[:-1].tolist(), axis=-1)
    return list(parts)


def dense_loss(logits: mx.array, labels: mx.array) -> mx.array:
    """Mean cross-entropy of `labels` (N, P, 5); patches that show a shape weigh most."""
    kind, color, centre, cell = _split_labels(logits)
    shown = (labels[..., 0] > 0).astype(mx.float32)
    weight = 0.25 + shown
    losses = (
        nn.losses.cross_entropy(kind, labels[..., 0]) * weight
        + nn.losses.cross_entropy(color, labels[..., 1]) * weight
        + nn.losses.cross_entropy(centre, labels[..., 2])
        + nn.losses.cross_entropy(cell, labels[..., 3]) * weight * labels[..., 4]
    )
    return losses.mean()


def dense_accuracy(logits: mx.array, labels: mx.array) -> list[float]:
    """Share of right kinds and colors on shapes, of centres found, and of right cells."""
    found = [mx.argmax(part, -1) for part in _split_labels(logits)]
    shown = labels[..., 0] > 0
    wheres = (shown, shown, labels[..., 2] > 0, shown & (labels[..., 4] > 0))
    right = [np.array((found[i] == labels[..., i]) & wheres[i]).sum() for i in range(4)]
    return [float(n / max(1, np.array(w).sum())) for n, w in zip(right, wheres, strict=True)]


def word_loss(
    embed_tokens: nn.Embedding, image_embeds: mx.array, labels: mx.array, words: np.ndarray
) -> mx.array:
    """Loss that draws what the decoder sees of a shape to the words for its kind and color.

    Without it the decoder is slow to find "the circle" in a picture: a query made of a
    word has to meet a key made of pixels.

    Args:
        image_embeds: (N, I, D) of global tiles.
        labels: Their patches' labels (N, P, 5).
        words: Ids of the kinds' words, then of the colors'.
    """
    n, tokens, width = image_embeds.shape
    side = int(tokens**0.5)
    scale = int((labels.shape[1] // tokens) ** 0.5)
    squares = labels.reshape(n, side, scale, side, scale, 5).swapaxes(2, 3)
    squares = squares.reshape(n * tokens, scale * scale, 5)
    best = mx.argmax(squares[..., 0], axis=1)  # a patch that shows a shape, if one does
    shown = mx.take_along_axis(squares, best[:, None, None], axis=1)[:, 0]  # (N*I, 5)
    kinds = len(SHAPES)
    unit = partial(mx.fast.rms_norm, weight=None, eps=1e-5)
    alike = unit(image_embeds.reshape(n * tokens, width)) @ unit(embed_tokens(mx.array(words))).T
    alike = alike * (8 / width)  # 8 times the cosine
    there = (shown[:, 0] > 0).astype(mx.float32)
    losses = nn.losses.cross_entropy(alike[:, :kinds], mx.maximum(shown[:, 0] - 1, 0))
    losses = losses + nn.losses.cross_entropy(alike[:, kinds:], shown[:, 1])
    return (losses * there).sum() / mx.maximum(there.sum(), 1)


def start_encoder(model: VisionModel, pixel_values: np.ndarray) -> None:
    """Set patch embedding and positions from data: whitened principal components, sines.

    Args:
        pixel_values: (N, H, W, 3) sample tiles that the components are taken from.
    """
    embeddings = model.embeddings
    size, grid = embeddings.patch_size, embeddings.patch_grid
    n = len(pixel_values)
    x = (
        pixel_values.reshape(n, grid, size, grid, size * 3)
        .swapaxes(2, 3)
        .reshape(-1, size * size * 3)
    )
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    width = embeddings.patch_embedding.weight.shape[0]
    top = np.argsort(values)[::-1][:width]
    weight = (vectors[:, top] / np.sqrt(values[top] + 0.01)).T  # (V, p*p*3)
    embeddings.patch_embedding.weight = mx.array(weight.astype(np.float32))
    embeddings.patch_embedding.bias = mx.array((-weight @ mean).astype(np.float32))
    embeddings.position_embedding.weight = mx.array(_sines(grid, width))


def _sines(grid: int, width: int) -> np.ndarray:
    """2-d sine and cosine positions, float32 (grid*grid, width)."""
    rates = math.pi * 2 / grid * 2.0 ** (np.arange(width // 4) * 4 / (width // 4) - 1)
    angles = np.arange(grid)[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)  # (grid, width/2)
    rows = np.repeat(waves[:, None], grid, 1)
    both = np.concatenate([rows, rows.swapaxes(0, 1)], -1)
    return (0.5 * both).reshape(grid * grid, width).astype(np.float32)
