"""The SigLIP vision encoder: tiles to patch features.

Attributes keep the checkpoint's names. `qkv_proj` concatenates the rows of q_proj, k_proj and
v_proj.

Source: SigLIP, arXiv 2303.15343; SmolVLM, arXiv 2504.05299, section 2.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_smolvlm.config import VisionConfig


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """Return the tanh approximation of GELU, computed in one kernel.

    (1 + tanh(z)) / 2 is written as sigmoid(2 * z). With tanh and a power, the expression is too
    deep for one kernel, and slow on a CPU.
    """
    return x * mx.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))


class VisionEmbeddings(nn.Module):
    """Embeds patches and adds learned position embeddings."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_grid, self.patch_size = config.patch_grid, config.patch_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Return the patch embeddings (N, P, V) of `pixel_values` (N, H, W, 3).

        The convolution of the paper is a matrix product with the flattened patches. Positions
        are 0 to P-1 in reading order, so the whole position table is added.
        """
        n, grid, size = pixel_values.shape[0], self.patch_grid, self.patch_size
        x = pixel_values[:, : grid * size, : grid * size]
        x = x.reshape(n, grid, size, grid, size * 3).swapaxes(2, 3)  # (N, grid, grid, size, size*3)
        x = x.reshape(n, grid * grid, size * size * 3)  # (N, P, size*size*3)
        return self.patch_embedding(x) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Self-attention among the patches of a tile, without a mask."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.num_attention_heads, config.head_dim**-0.5
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        n, p, v = x.shape
        qkv = self.qkv_proj(x).reshape(n, p, 3 * self.heads, v // self.heads)
        q, k, v_ = mx.split(qkv.swapaxes(1, 2), 3, axis=1)  # (N, heads, P, V/heads) each
        x = mx.fast.scaled_dot_product_attention(q, k, v_, scale=self.scale)
        return self.out_proj(x.swapaxes(1, 2).reshape(n, p, v))


class VisionMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu_tanh(self.fc1(x)))


class VisionLayer(nn.Module):
    """An encoder layer: attention and MLP, each after a normalization."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """The complete vision encoder."""

    is_compilable = True  # whether `mx.compile` can trace it

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Return the `patch_features` (N, P, V) of `pixel_values` (N, H, W, 3)."""
        x: mx.array = self.post_layernorm(self.encoder(self.embeddings(pixel_values)))
        return x
