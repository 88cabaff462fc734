"""The keys and values of all tokens that the decoder has processed, and attention to them."""

from __future__ import annotations

from copy import copy
from typing import Literal, Protocol, Self

import mlx.core as mx
import numpy as np

Buffers = tuple[mx.array, ...]  # one layer; each (B, 2*kv_heads, tokens, width), keys first
Mask = mx.array | Literal["causal"] | None
"""bool (L, tokens) or (B, 1, L, tokens), True where a query may attend."""


class Storage(Protocol):
    """Stores keys and values as arrays, and computes attention from them."""

    def pack(self, keys_values: mx.array) -> Buffers:
        """Convert `keys_values` (B, 2*kv_heads, L, head_dim) to the stored arrays."""

    def attend(self, queries: mx.array, stored: Buffers, mask: Mask) -> mx.array:
        """Attention (B, heads, L, head_dim) of `queries`, of that shape, to `stored`."""

    def attend_to(self, queries: mx.array, keys: Buffers, values: Buffers, mask: Mask) -> mx.array:
        """As `attend`, with keys and values apart, each (B, kv_heads, tokens, width)."""


class FloatStorage:
    """Stores keys and values unchanged, for MLX's fused attention."""

    def pack(self, keys_values: mx.array) -> Buffers:
        """`keys_values` (B, 2*kv_heads, L, head_dim), unchanged."""
        return (keys_values,)

    def attend(self, queries: mx.array, stored: Buffers, mask: Mask) -> mx.array:
        """Attention (B, heads, L, head_dim) of `queries`, of that shape, to `stored`."""
        keys, values = mx.split(stored[0], 2, axis=1)
        return self.attend_to(queries, (keys,), (values,), mask)

    def attend_to(self, queries: mx.array, keys: Buffers, values: Buffers, mask: Mask) -> mx.array:
        """As `attend`, with keys and values apart, each (B, kv_heads, tokens, width)."""
        scale = queries.shape[-1] ** -0.5
        return mx.fast.scaled_dot_product_attention(queries, *keys, *values, scale=scale, mask=mask)


class PackedStorage:
    """Stores keys and values with `bits` bits, quantized in groups of `group_size` numbers.

    MLX multiplies by the packed arrays directly; the queries that share a head of keys are
    rows of one product. Scales are float32 if the network computes in bfloat16, else of the
    network's type.
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size

    def pack(self, keys_values: mx.array) -> Buffers:
        """Quantize `keys_values` (B, 2*kv_heads, L, head_dim) to numbers, scales and biases."""
        if keys_values.dtype == mx.bfloat16:  # too coarse for scales: docs/decisions/kv.md
            keys_values = keys_values.astype(mx.float32)
        packed, scales, biases = mx.quantize(keys_values, self.group_size, self.bits)
        return packed, scales, biases

    def attend(self, queries: mx.array, stored: Buffers, mask: Mask) -> mx.array:
        """Attention (B, heads, L, head_dim) of `queries`, of that shape, to `stored`."""
        keys, values = zip(*(mx.split(part, 2, axis=1) for part in stored), strict=True)
        return self.attend_to(queries, keys, values, mask)

    def attend_to(self, queries: mx.array, keys: Buffers, values: Buffers, mask: Mask) -> mx.array:
        """As `attend`, with keys and values apart, each (B, kv_heads, tokens, width)."""
        b, heads, length, width = queries.shape
        kv_heads, tokens = keys[0].shape[1:3]
        rows = (queries * width**-0.5).reshape(b, kv_heads, -1, width).astype(keys[1].dtype)
        scores = self._multiply(rows, keys, transpose=True)  # (B, kv_heads, share*L, tokens)
        if mask is not None:
            scores = scores.reshape(b, kv_heads, -1, length, tokens)
            visible = make_causal_mask(length, tokens) if isinstance(mask, str) else mask
            visible = mx.expand_dims(visible, -3)  # heads that share keys see the same
            scores = mx.where(visible, scores, mx.finfo(scores.dtype).min)
            scores = scores.reshape(b, kv_heads, -1, tokens)
        weights = mx.softmax(scores, axis=-1, precise=True)
        output = self._multiply(weights, values, transpose=False)
        return output.reshape(b, heads, length, width).astype(queries.dtype)

    def _multiply(self, rows: mx.array, packed: Buffers, transpose: bool) -> mx.array:
        numbers, scales, biases = packed
        return mx.quantized_matmul(
            rows, numbers, scales, biases, transpose, self.group_size, self.bits
        )


def make_causal_mask(length: int, tokens: int) -> mx.array:
    """(length, tokens), True where the last `length` tokens see themselves and those before."""
    return mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)[None]


FLOAT_STORAGE = FloatStorage()


STEP = 256  # buffers grow in multiples of so many tokens


def round_up(tokens: int) -> int:
    """Return the number of tokens that a buffer for `tokens` tokens has room for."""
    return -(-tokens // STEP) * STEP


NO_PINS = np.arange(0)


class KVCache:
    """Keys and values of every token, per layer.

    `offset` is the number of tokens processed; the decoder advances it once, after its last
    layer. The buffers of a layer may have room for more tokens.
    """

    def __init__(self, num_layers: int, storage: Storage = FLOAT_STORAGE) -> None:
        self.buffers: list[Buffers | None] = [None] * num_layers
        self.storage = storage
        self.offset = 0
        self._is_shared = [False] * num_layers  # whether a fork may read the same memory

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """Store new tokens in `layer` and compute their attention (B, heads, L, head_dim).

        Args:
            layer: Index of the decoder layer.
            queries: (B, heads, L, head_dim), of the new tokens.
            keys_values: (B, 2*kv_heads, L, head_dim), keys first.
            mask: "causal"; None for a single token, which sees all; or bool (L, offset + L),
                True where a new token sees another.
        """
        new = self.storage.pack(keys_values)
        end = self.offset + keys_values.shape[2]
        buffers = self._reserve(layer, new, end)
        for buffer, part in zip(buffers, new, strict=True):
            buffer[:, :, self.offset : end] = part
        self.buffers[layer] = buffers
        stored = tuple(buffer[:, :, :end] for buffer in buffers)
        return self.storage.attend(queries, stored, mask)

    def append(self, layer: int, keys_values: np.ndarray) -> np.ndarray:
        """Store new tokens from NumPy, in place; the cache becomes float32.

        Args:
            layer: Index of the decoder layer.
            keys_values: (B, 2*kv_heads, L, head_dim), keys first.

        Returns:
            A view of all tokens in `layer`, (B, 2*kv_heads, offset + L, head_dim).
        """
        end = self.offset + keys_values.shape[2]
        (buffer,) = self._reserve(layer, (mx.array(keys_values[:, :, :1]),), end)
        if buffer.dtype != mx.float32:  # a cache of an earlier run, read from disk
            buffer = buffer.astype(mx.float32)
        elif self._is_shared[layer]:
            buffer = mx.array(np.array(buffer, copy=False))
        self._is_shared[layer] = False
        self.buffers[layer] = (buffer,)
        stored: np.ndarray = np.array(buffer, copy=False)[:, :, :end]
        stored[:, :, self.offset :] = keys_values
        return stored

    def advance(self, length: int) -> None:
        """Count `length` tokens that every layer has attended to."""
        self.offset += length

    def fork(self) -> Self:
        """An independent copy; the arrays are shared until one of the two is written to."""
        twin = copy(self)
        twin.buffers = [one and tuple(buffer[:] for buffer in one) for one in self.buffers]
        self._is_shared = [True] * len(self.buffers)
        twin._is_shared = [*self._is_shared]
        return twin

    def can_resume(self, offset: int, pins: np.ndarray = NO_PINS) -> bool:
        """Whether `trim(offset)` and `pin(pins)` give the same cache as those tokens alone."""
        return 0 <= offset <= self.offset

    def can_undo(self, length: int) -> bool:
        """Whether `length` more tokens can be removed again with `trim`."""
        return True

    def trim(self, offset: int) -> None:
        """Remove all tokens from `offset` on.

        Raises:
            ValueError: `can_resume` is False.
        """
        if not 0 <= offset <= self.offset:
            raise ValueError(f"offset {offset} is outside 0..{self.offset}")
        self.offset = offset

    def pin(self, pins: np.ndarray) -> None:
        """Never drop the tokens at positions `pins`; this class drops none."""

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to evaluate them."""
        return [buffer for one in self.buffers if one is not None for buffer in one]

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.arrays)

    def _reserve(self, layer: int, new: Buffers, end: int) -> Buffers:
        """The buffers of `layer`, enlarged to hold `end` tokens, with the widths of `new`."""
        old = self.buffers[layer]
        capacity = 0 if old is None else old[0].shape[2]
        if old is not None and end <= capacity:
            return old
        more = self._choose_capacity(end) - capacity
        room = tuple(mx.zeros((*p.shape[:2], more, p.shape[3]), p.dtype) for p in new)
        if old is None:
            return room
        return tuple(mx.concatenate([*pair], axis=2) for pair in zip(old, room, strict=True))

    def _choose_capacity(self, end: int) -> int:
        """Number of tokens to allocate when `end` tokens must fit."""
        return round_up(end)
