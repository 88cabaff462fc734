"""Keys and values of the tokens that the decoder has seen."""

from __future__ import annotations

import mlx.core as mx

STEP = 256  # tokens by which a full buffer grows


class KVCache:
    """One buffer a layer, (B, 2*kv_heads, capacity, head_dim): keys first, then values.

    With keys and values in one buffer, a decoded token is written by one kernel.
    `offset` counts the tokens held. The decoder advances it once, after its last
    layer.
    """

    def __init__(self, num_layers: int) -> None:
        self.buffers: list[mx.array | None] = [None] * num_layers
        self.offset = 0

    def update(self, layer: int, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values of `layer`, with `keys_values` (B, 2*kv_heads, L, head_dim) appended.

        Returns:
            keys and values, (B, kv_heads, offset + L, head_dim) each.
        """
        b, heads, length, width = keys_values.shape
        end = self.offset + length
        buffer = self.buffers[layer]
        capacity = 0 if buffer is None else buffer.shape[2]
        if end > capacity:
            more = -(-end // STEP) * STEP - capacity
            room = mx.zeros((b, heads, more, width), keys_values.dtype)
            buffer = room if buffer is None else mx.concatenate([buffer, room], axis=2)
        assert buffer is not None
        buffer[:, :, self.offset : end] = keys_values
        self.buffers[layer] = buffer
        return buffer[:, : heads // 2, :end], buffer[:, heads // 2 :, :end]

    def fork(self) -> KVCache:
        """A cache that goes on by itself; what is held is shared until either writes."""
        twin = KVCache(len(self.buffers))
        twin.buffers = [None if buffer is None else mx.array(buffer) for buffer in self.buffers]
        twin.offset = self.offset
        return twin

    def trim(self, offset: int) -> None:
        """Forget every token from `offset` on."""
        if not 0 <= offset <= self.offset:
            raise ValueError(f"offset {offset} is outside 0..{self.offset}")
        self.offset = offset

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate them."""
        return [buffer for buffer in self.buffers if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.nbytes for buffer in self.arrays)
