"""How keys and values are held, and the attention that reads them so.

A storage turns keys and values into arrays whose third axis counts tokens, so that a
cache can write, cut and gather them without knowing what they mean. Keys and values
lie in one array, (B, 2*kv_heads, L, head_dim), keys first: one kernel writes both.
"""

from __future__ import annotations

from typing import Literal, Protocol

import mlx.core as mx

Held = tuple[mx.array, ...]  # each (B, 2*kv_heads, tokens, a width)
Mask = mx.array | Literal["causal"] | None  # (L, tokens) of bool, True where a query sees


class Storage(Protocol):
    """Keys and values of a cache."""

    def pack(self, keys_values: mx.array) -> Held:
        """`keys_values` (B, 2*kv_heads, L, head_dim) as they are held."""

    def attend(self, queries: mx.array, held: Held, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what `queries` of that shape find in `held`."""


class FloatStorage:
    """Keys and values as they come, for MLX's fused attention."""

    def pack(self, keys_values: mx.array) -> Held:
        """`keys_values` (B, 2*kv_heads, L, head_dim) themselves."""
        return (keys_values,)

    def attend(self, queries: mx.array, held: Held, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what `queries` of that shape find in `held`."""
        keys, values = mx.split(held[0], 2, axis=1)
        scale = queries.shape[-1] ** -0.5
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


class PackedStorage:
    """Keys and values of `bits` bits, each token's heads in groups of `group_size`.

    They are never unpacked: MLX multiplies by the packed arrays. The queries that share
    a head of keys are rows of one product. Scales are float32 where the network computes in
    bfloat16, else of its type.
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size

    def pack(self, keys_values: mx.array) -> Held:
        """Numbers, scales and biases of `keys_values` (B, 2*kv_heads, L, head_dim)."""
        if keys_values.dtype == mx.bfloat16:  # too coarse for scales: docs/decisions/kv.md
            keys_values = keys_values.astype(mx.float32)
        packed, scales, biases = mx.quantize(keys_values, self.group_size, self.bits)
        return packed, scales, biases

    def attend(self, queries: mx.array, held: Held, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what `queries` of that shape find in `held`."""
        b, heads, length, width = queries.shape
        kv_heads, tokens = held[0].shape[1] // 2, held[0].shape[2]
        keys, values = zip(*(mx.split(part, 2, axis=1) for part in held), strict=True)
        rows = (queries * width**-0.5).reshape(b, kv_heads, -1, width).astype(held[1].dtype)
        scores = self._product(rows, keys, transpose=True)  # (B, kv_heads, share*L, tokens)
        if mask is not None:
            scores = scores.reshape(b, kv_heads, -1, length, tokens)
            seen = causal(length, tokens) if isinstance(mask, str) else mask
            scores = mx.where(seen, scores, mx.finfo(scores.dtype).min)
            scores = scores.reshape(b, kv_heads, -1, tokens)
        weights = mx.softmax(scores, axis=-1, precise=True)
        found = self._product(weights, values, transpose=False)
        return found.reshape(b, heads, length, width).astype(queries.dtype)

    def _product(self, rows: mx.array, packed: Held, transpose: bool) -> mx.array:
        numbers, scales, biases = packed
        return mx.quantized_matmul(
            rows, numbers, scales, biases, transpose, self.group_size, self.bits
        )


def causal(length: int, tokens: int) -> mx.array:
    """(length, tokens), True where the last `length` of `tokens` see themselves and all before."""
    return mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)[None]


FLOAT = FloatStorage()
