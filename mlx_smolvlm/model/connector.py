"""Pixel shuffle and projection: patch features to the decoder's width.

Source: SmolVLM, arXiv 2504.05299, section 2.2.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_smolvlm.config import Config


def pixel_shuffle(x: mx.array, scale: int) -> mx.array:
    """Join each square of scale x scale patches into one vector.

    Args:
        x: (N, P, V).
        scale: Side of a square, in patches.

    Returns:
        (N, I, scale^2*V) with I = P/scale^2. Channel dh*(scale*V) + dw*V + e of a vector is
        channel e of the patch in row dh and column dw of the square.
    """
    n, p, v = x.shape
    side = int(p**0.5) // scale
    x = x.reshape(n, side, scale, side, scale * v).swapaxes(2, 3)  # (N, side, side, scale, scale*V)
    return x.reshape(n, side * side, scale * scale * v)


class ModalityProjection(nn.Module):
    """A linear layer without a bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.vision.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(width, config.text.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


class Connector(nn.Module):
    """Maps patch features to image embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        self.modality_projection = ModalityProjection(config)

    def __call__(self, patch_features: mx.array) -> mx.array:
        """Return the `image_embeds` (N, I, D) of `patch_features` (N, P, V)."""
        return self.modality_projection(pixel_shuffle(patch_features, self.scale_factor))
