"""Keys and values of the tokens that the decoder has seen."""

from __future__ import annotations

from copy import copy
from typing import Literal, Protocol, Self

import mlx.core as mx
import numpy as np

Buffers = tuple[mx.array, ...]  # each (B, 2*kv_heads, tokens, a width)
Mask = mx.array | Literal["causal"] | None  # (L, tokens) of bool, True where a query sees


class Storage(Protocol):
    """Keys and values of a cache."""

    def pack(self, keys_values: mx.array) -> Buffers:
        """`keys_values` (B, 2*kv_heads, L, head_dim) as they are held."""

    def attend(self, queries: mx.array, held: Buffers, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what `queries` of that shape find in `held`."""


class FloatStorage:
    """Keys and values as they come, for MLX's fused attention."""

    def pack(self, keys_values: mx.array) -> Buffers:
        """`keys_values` (B, 2*kv_heads, L, head_dim) themselves."""
        return (keys_values,)

    def attend(self, queries: mx.array, held: Buffers, mask: Mask) -> mx.array:
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

    def pack(self, keys_values: mx.array) -> Buffers:
        """Numbers, scales and biases of `keys_values` (B, 2*kv_heads, L, head_dim)."""
        if keys_values.dtype == mx.bfloat16:  # too coarse for scales: docs/decisions/kv.md
            keys_values = keys_values.astype(mx.float32)
        packed, scales, biases = mx.quantize(keys_values, self.group_size, self.bits)
        return packed, scales, biases

    def attend(self, queries: mx.array, held: Buffers, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what `queries` of that shape find in `held`."""
        b, heads, length, width = queries.shape
        kv_heads, tokens = held[0].shape[1] // 2, held[0].shape[2]
        keys, values = zip(*(mx.split(part, 2, axis=1) for part in held), strict=True)
        rows = (queries * width**-0.5).reshape(b, kv_heads, -1, width).astype(held[1].dtype)
        scores = self._product(rows, keys, transpose=True)  # (B, kv_heads, share*L, tokens)
        if mask is not None:
            scores = scores.reshape(b, kv_heads, -1, length, tokens)
            seen = make_causal_mask(length, tokens) if isinstance(mask, str) else mask
            scores = mx.where(seen, scores, mx.finfo(scores.dtype).min)
            scores = scores.reshape(b, kv_heads, -1, tokens)
        weights = mx.softmax(scores, axis=-1, precise=True)
        found = self._product(weights, values, transpose=False)
        return found.reshape(b, heads, length, width).astype(queries.dtype)

    def _product(self, rows: mx.array, packed: Buffers, transpose: bool) -> mx.array:
        numbers, scales, biases = packed
        return mx.quantized_matmul(
            rows, numbers, scales, biases, transpose, self.group_size, self.bits
        )


def make_causal_mask(length: int, tokens: int) -> mx.array:
    """(length, tokens), True where the last `length` of `tokens` see themselves and all before."""
    return mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)[None]


FLOAT_STORAGE = FloatStorage()


STEP = 256  # tokens by which a full buffer grows
NO_PINS = np.arange(0)


class KVCache:
    """Every token's keys and values, layer by layer, and the attention to them.

    `offset` counts the tokens seen. The decoder advances it once, after its last
    layer. A layer's buffers have room for more tokens than were seen.
    """

    def __init__(self, num_layers: int, storage: Storage = FLOAT_STORAGE) -> None:
        self.buffers: list[Buffers | None] = [None] * num_layers
        self.storage = storage
        self.offset = 0

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what new tokens find in `layer`, themselves included.

        Args:
            layer: It holds the new tokens too from here on.
            queries: (B, heads, L, head_dim), of the new tokens.
            keys_values: (B, 2*kv_heads, L, head_dim), keys first.
            mask: "causal"; or None, when a single token sees all; or (L, offset + L), True
                where a new token sees another.
        """
        new = self.storage.pack(keys_values)
        end = self.offset + keys_values.shape[2]
        buffers = self._with_room(layer, new, end)
        for buffer, part in zip(buffers, new, strict=True):
            buffer[:, :, self.offset : end] = part
        self.buffers[layer] = buffers
        held = tuple(buffer[:, :, :end] for buffer in buffers)
        return self.storage.attend(queries, held, mask)

    def advance(self, length: int) -> None:
        """Count `length` tokens that every layer has attended to."""
        self.offset += length

    def fork(self) -> Self:
        """A cache that goes on by itself; what is held is shared until either writes."""
        twin = copy(self)
        twin.buffers = [held and tuple(buffer[:] for buffer in held) for held in self.buffers]
        return twin

    def can_resume(self, offset: int, pins: np.ndarray = NO_PINS) -> bool:
        """Whether `trim(offset)` and `pin(pins)` give the cache of those tokens alone."""
        return 0 <= offset <= self.offset

    def trim(self, offset: int) -> None:
        """Forget every token from `offset` on.

        Raises:
            ValueError: `can_resume` says no.
        """
        if not 0 <= offset <= self.offset:
            raise ValueError(f"offset {offset} is outside 0..{self.offset}")
        self.offset = offset

    def pin(self, pins: np.ndarray) -> None:
        """Never drop the tokens at positions `pins`; here none is dropped anyway."""

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate them."""
        return [buffer for held in self.buffers if held is not None for buffer in held]

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.nbytes for buffer in self.arrays)

    def _with_room(self, layer: int, new: Buffers, end: int) -> Buffers:
        """The buffers of `layer`, of `new`'s widths, with room for `end` tokens."""
        held = self.buffers[layer]
        capacity = 0 if held is None else held[0].shape[2]
        if held is not None and end <= capacity:
            return held
        more = self._capacity(end) - capacity
        room = tuple(mx.zeros((*p.shape[:2], more, p.shape[3]), p.dtype) for p in new)
        if held is None:
            return room
        return tuple(mx.concatenate([*pair], axis=2) for pair in zip(held, room, strict=True))

    def _capacity(self, end: int) -> int:
        """Tokens to make room for when `end` are to be held."""
        return -(-end // STEP) * STEP
