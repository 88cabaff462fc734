"""The SmolLM2 decoder (Llama): embeddings to hidden states.

Attributes keep the checkpoint's names. `qkv_proj` concatenates the rows of q_proj, k_proj and
v_proj, `gate_up_proj` those of gate_proj and up_proj.

Source: SmolLM2, arXiv 2502.02737. Kernels per token: docs/decisions/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import TextConfig
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache, Mask


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, computed in one kernel."""
    return gate * mx.sigmoid(gate) * up


def divide_by_rms(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return `x` (..., D) with its root mean square divided out, times `weight` (D,)."""
    return mx.fast.rms_norm(x, weight, eps)


def rotate_rows(qkv: mx.array, positions: mx.array, theta: float) -> mx.array:
    """Rotate the rows of `qkv` (B, L, rows, head_dim), each by its own position.

    Returns:
        (B, rows, L, head_dim).
    """
    width = qkv.shape[-1]
    rotated = mx.fast.rope(
        qkv.reshape(-1, 1, 1, width),
        width,
        traditional=False,
        base=theta,
        scale=1.0,
        offset=positions,
    )
    return rotated.reshape(qkv.shape).swapaxes(1, 2)


# MLX replays compiled functions faster than it builds their nodes: on a CPU, where each of the two
# is many nodes, the graph of a token is built in four fifths of the time. The kernels are the same.
# Each shape is compiled anew, so this is only done for one token of each row. It must not be
# `shapeless`: a first call inside of a gradient would make the width a constant for all later ones.
normalize_step = mx.compile(divide_by_rms)
rotate_step = mx.compile(rotate_rows)


class RMSNorm(nn.RMSNorm):
    """A normalization by the root mean square."""

    def __call__(self, x: mx.array) -> mx.array:
        normalize = normalize_step if x.shape[-2] == 1 else divide_by_rms
        return normalize(x, self["weight"], self.eps)


@dataclass(frozen=True)
class Placement:
    """Positions and mask of tokens that do not simply continue the sequence in the cache.

    Attributes:
        positions: Rotary position of each token, integers (L,).
        mask: Whether each token attends to each token of the cache and of the input, bool
            (L, offset + L).
    """

    positions: np.ndarray
    mask: mx.array


class Attention(nn.Module):
    """Causal grouped-query attention with rotary position embeddings."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)

    def __call__(
        self,
        x: mx.array,
        positions: mx.array,
        cache: KVCache | None,
        mask: mx.array | None = None,
    ) -> mx.array:
        length = x.shape[1]
        qkv = mx.unflatten(self.qkv_proj(x), -1, (-1, self.head_dim))
        qkv = self._rotate(qkv, positions)  # (B, heads + 2*kv_heads, L, head_dim)
        queries, keys_values = mx.split(qkv, [self.heads], axis=1)
        sees: Mask = "causal" if mask is None and length > 1 else mask
        if cache is None:
            x = FLOAT_STORAGE.attend(queries, FLOAT_STORAGE.pack(keys_values), sees)
        else:
            x = cache.attend(self.layer, queries, keys_values, sees)
        return self.o_proj(mx.flatten(x.swapaxes(1, 2), 2))

    def _rotate(self, qkv: mx.array, positions: mx.array) -> mx.array:
        """Rotate the queries and keys of `qkv` (B, L, heads + 2*kv_heads, head_dim).

        If `positions` has a position per token and head, each head is a row of one rotation.
        The values are rows at position 0, which a rotation does not change. Otherwise
        `positions` has the position of the first token of each batch row, repeated per head,
        and the values are split off.

        Returns:
            (B, heads + 2*kv_heads, L, head_dim).
        """
        b, length, rows, width = qkv.shape
        if length == 1:
            return rotate_step(qkv, positions, self.theta)
        if positions.size == b * length * rows:
            return rotate_rows(qkv, positions, self.theta)
        rope = partial(mx.fast.rope, dims=width, traditional=False, base=self.theta, scale=1.0)
        queries_keys, values = mx.split(qkv.swapaxes(1, 2), [self.heads + self.kv_heads], axis=1)
        return mx.concatenate([rope(queries_keys, offset=positions[0]), values], axis=1)


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(swiglu(gate, up))


class DecoderLayer(nn.Module):
    """A decoder layer: attention and MLP, each after a normalization."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        positions: mx.array,
        cache: KVCache | None,
        mask: mx.array | None = None,
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    """The decoder without its output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.rotary_rows = config.num_attention_heads + config.num_key_value_heads
        self.value_rows = config.num_key_value_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        inputs_embeds: mx.array,
        cache: KVCache | None = None,
        placement: Placement | None = None,
    ) -> mx.array:
        """Return the normalized hidden states (B, L, D) of `inputs_embeds` (B, L, D).

        Args:
            inputs_embeds: (B, L, D).
            cache: Keys and values of the preceding tokens; those of `inputs_embeds` are
                appended. None for a whole sequence that is not continued, as in training.
            placement: Positions and mask of the tokens, for B = 1. None if they continue the
                sequence in the cache, with causal attention.
        """
        b, length, _ = inputs_embeds.shape
        starts = [0 if cache is None else cache.offset] * b
        rotated = [1] * self.rotary_rows + [0] * self.value_rows
        positions = np.outer(starts if placement is None else placement.positions, rotated)
        rows = mx.array(positions.reshape(-1).astype(np.int32))
        mask = None if placement is None else placement.mask
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, rows, cache, mask)
        if cache is not None:
            cache.advance(length)
        hidden_states: mx.array = self.norm(x)
        return hidden_states
