"""Dense labels: what each patch of a tile shows, and which image tokens show a place.

They stand in for SigLIP's own pretraining: the decoder then starts from features that
already tell shapes, letters, colors and places apart. Letters as in `mlx_smolvlm/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from demo_recipe.draw import COLOR_NAMES
from demo_recipe.items import Extent, Glyph
from demo_recipe.kinds import GLYPHS
from mlx_smolvlm.config import VisionConfig
from mlx_smolvlm.media.tiles import Grid

RANKS, TOTALS, VALUES = 8, 7, 11  # how many of each are told apart
_SIZES = (len(GLYPHS) + 1, len(COLOR_NAMES), RANKS, TOTALS, VALUES)
COLUMNS = len(_SIZES)  # kind + 1, color, rank, total, value; -1 for nothing to tell
_LEAST_COVER = 0.4  # share of a patch that a glyph must cover to be its label
_TOKEN_COVER = 0.35  # share of a token's square, or of a box, that must overlap
_KIND_SHARE, _EXTENT_SHARE = 3.0, 2.0  # of the losses of kinds and extents; the others have 1


def make_patch_labels(
    glyphs: Sequence[Glyph], background: str | None, grid: Grid, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (N, P, COLUMNS) and extents float32 (N, P, 4) of a picture's tiles.

    An extent is the centre of what a patch shows from the centre of the patch, right and down,
    then its width and height, all in sides of a tile. Ranks and totals are told in the global
    tile alone, since a crop does not show all that they count.

    Args:
        side: Patches along a side of a tile.
    """
    whole = _make_tile_labels(glyphs, background, (1, 1), side)
    if not grid.rows:
        return whole
    crops = _make_tile_labels(glyphs, background, (grid.rows, grid.cols), side)
    crops[0][..., 2:4] = -1
    labels, extents = (np.concatenate(pair) for pair in zip(crops, whole, strict=True))
    return labels, extents


def _make_tile_labels(
    glyphs: Sequence[Glyph], background: str | None, grid: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and extents of the tiles of a picture cut into `grid`, rows and columns."""
    rows, cols = grid[0] * side, grid[1] * side
    labels = np.full((rows, cols, COLUMNS), -1, np.int32)
    labels[..., 0] = 0
    labels[..., 1] = -1 if background is None else COLOR_NAMES.index(background)
    extents = np.zeros((rows, cols, 4), np.float32)
    best = np.zeros((rows, cols))
    y, x = np.mgrid[0:rows, 0:cols] + 0.5
    for glyph in glyphs:
        left, top, right, bottom = glyph.extent
        cover = compute_overlap(glyph.extent, rows, cols)
        centre = (
            min(rows - 1, max(0, int((top + bottom) / 2 * rows))),
            min(cols - 1, max(0, int((left + right) / 2 * cols))),
        )
        shown = (cover >= _LEAST_COVER) & (cover >= best)
        shown[centre] = True
        best = np.where(shown, cover, best)
        color = -1 if glyph.color is None else COLOR_NAMES.index(glyph.color)
        told = (min(glyph.rank, RANKS - 1), min(glyph.total, TOTALS - 1), glyph.value)
        labels[shown] = (1 + GLYPHS.index(glyph.kind), color, *told)
        where = ((left + right) / 2 * cols - x, (top + bottom) / 2 * rows - y)
        size = ((right - left) * cols, (bottom - top) * rows)
        found = np.stack([*where, *(np.full_like(x, s) for s in size)], -1) / side
        extents[shown] = np.clip(found[shown], -1.5, 1.5)
    shape = (grid[0], side, grid[1], side)

    def tiled(of_picture: np.ndarray) -> np.ndarray:
        cut = of_picture.reshape(*shape, -1).swapaxes(1, 2)
        flat: np.ndarray = cut.reshape(grid[0] * grid[1], side * side, -1)
        return flat

    return tiled(labels), tiled(extents)


def compute_overlap(extent: Extent, rows: int, cols: int) -> np.ndarray:
    """Return the share (rows, cols) of each square of a picture that `extent` covers."""
    left, top, right, bottom = extent

    def along(low: float, high: float, count: int) -> np.ndarray:
        at = np.arange(count)
        covered = np.minimum(high * count, at + 1) - np.maximum(low * count, at)
        shares: np.ndarray = np.clip(covered, 0, None)
        return shares

    share: np.ndarray = along(top, bottom, rows)[:, None] * along(left, right, cols)[None]
    return share


def make_token_mask(extent: Extent, grid: Grid, side: int) -> np.ndarray:
    """Which image tokens of a picture show `extent`: bool (N * I,), crops, then the global tile.

    Args:
        side: Image tokens along a side of a tile.
    """
    masks = [_find_patches(extent, side, side).reshape(-1)]
    if grid.rows:
        whole = _find_patches(extent, grid.rows * side, grid.cols * side)
        whole = whole.reshape(grid.rows, side, grid.cols, side).swapaxes(1, 2)
        masks.insert(0, whole.reshape(-1))
    return np.concatenate(masks)


def _find_patches(extent: Extent, rows: int, cols: int) -> np.ndarray:
    """Return which of `rows` x `cols` squares show `extent`: at least the one with the most."""
    cover = compute_overlap(extent, rows, cols)
    least = _TOKEN_COVER * min(1.0, float(cover.sum()))
    mask: np.ndarray = (cover >= min(least, cover.max())) & (cover > 0)
    return mask


def make_label_head(config: VisionConfig) -> nn.Linear:
    """Return a linear layer from patch features to the logits of all labels and an extent."""
    return nn.Linear(config.hidden_size, sum(_SIZES) + 4)


def dense_loss(logits: mx.array, labels: mx.array, extents: mx.array) -> mx.array:
    """Mean loss of labels (N, P, COLUMNS) and extents; patches that show something weigh most."""
    parts: Any = mx.split(logits, np.cumsum(_SIZES).tolist(), axis=-1)
    *classes, found = parts
    shown = (labels[..., 0] > 0).astype(mx.float32)
    total = mx.array(0.0)
    for i, part in enumerate(classes):
        weight = (labels[..., i] >= 0) * (0.15 + shown)
        losses = nn.losses.cross_entropy(part, mx.maximum(labels[..., i], 0)) * weight
        mean = losses.sum() / mx.maximum(weight.sum(), 1)
        total = total + (mean if i else _KIND_SHARE * mean)
    off = mx.abs(found - extents).mean(-1) * shown
    return total + _EXTENT_SHARE * off.sum() / mx.maximum(shown.sum(), 1)


def dense_accuracy(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Share of right labels of each column, on patches that show something and tell it."""
    found = np.split(logits, np.cumsum(_SIZES), axis=-1)[:-1]
    shown = labels[..., 0] > 0
    rights = []
    for i, part in enumerate(found):
        told = shown & (labels[..., i] >= 0)
        right = (part.argmax(-1) == labels[..., i]) & told
        rights.append(float(right.sum() / max(1, told.sum())))
    return rights
