"""Where the vision encoder starts: whitened principal components of patches, and sines."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_smolvlm.model.vision import VisionModel


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
    embeddings.position_embedding.weight = mx.array(_make_sines(grid, width))


def _make_sines(grid: int, width: int) -> np.ndarray:
    """2-d sine and cosine positions, float32 (grid*grid, width)."""
    rates = math.pi * 2 / grid * 2.0 ** (np.arange(width // 4) * 4 / (width // 4) - 1)
    angles = np.arange(grid)[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)  # (grid, width/2)
    rows = np.repeat(waves[:, None], grid, 1)
    both = np.concatenate([rows, rows.swapaxes(0, 1)], -1)
    return (0.5 * both).reshape(grid * grid, width).astype(np.float32)
