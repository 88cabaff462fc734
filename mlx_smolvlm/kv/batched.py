"""Keys and values of several independent sequences, to decode one token of each per step.

Every sequence is a row, padded on the right to the longest one. So a step is one update and one
attention per layer, as for a single sequence. Rows join and leave between steps.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache, Mask, Storage, round_up


class BatchedKVCache(KVCache):
    """Keys and values of B rows, in buffers (rows * kv_heads * 2, tokens, width) per layer.

    Keys and values lie side by side within a head, so that those of all rows are views with
    equal strides, which MLX's attention reads without a copy. A row begins at token 0; what lies
    behind its end is undefined and masked.

    To the decoder, the new tokens of all rows are one sequence (1, B, D), whose positions are
    `lengths` and whose mask is `make_mask()`. Call `reserve` before each step.

    Attributes:
        lengths: Number of tokens of each row, (B,).
    """

    def __init__(self, num_layers: int, storage: Storage = FLOAT_STORAGE) -> None:
        super().__init__(num_layers, storage)
        self.lengths = np.zeros(0, np.int64)
        self._heads = 1  # of keys and of values, of a row
        # Indices of the new tokens in the first two axes of the buffers; they have the shapes
        # (B, kv_heads, 2) and (B, 1, 1), so that the update is one kernel.
        self._slots: tuple[mx.array, mx.array] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows (B)."""
        return self.lengths.size

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row; 0 without rows."""
        return int(self.lengths.max(initial=0))

    @property
    def capacity(self) -> int:
        """Number of tokens that the buffers hold, those of all rows and their padding."""
        first = self.buffers[0]
        return 0 if first is None else first[0].shape[0] // self._heads * first[0].shape[1]

    def make_mask(self) -> mx.array:
        """Return what the next token of each row sees: bool (B, 1, 1, longest + 1)."""
        return mx.array(np.arange(self.longest + 1) <= self.lengths[:, None])[:, None, None]

    def reserve(self) -> None:
        """Make room for one more token of each row; the buffers grow if it is needed."""
        self._allocate(self.num_rows, self.longest + 1)
        rows = np.arange(self.num_rows * self._heads).reshape(self.num_rows, -1, 2)
        tokens = self.lengths.reshape(-1, 1, 1)
        self._slots = mx.array(rows.astype(np.uint32)), mx.array(tokens.astype(np.uint32))

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """Store one new token per row in `layer`, and compute their attention (1, heads, B, width).

        Args:
            layer: Index of the decoder layer.
            queries: (1, heads, B, head_dim).
            keys_values: (1, 2*kv_heads, B, head_dim), keys first.
            mask: `make_mask()`.
        """
        buffers, kv_heads = self.buffers[layer], keys_values.shape[1] // 2
        assert buffers is not None
        assert self._slots is not None
        for buffer, part in zip(buffers, self.storage.pack(keys_values), strict=True):
            new = mx.unflatten(part.squeeze(0), 0, (2, kv_heads))  # (2, kv_heads, B, width)
            buffer[self._slots] = new.transpose(2, 1, 0, 3)
        count, tokens = self.num_rows * self._heads, self.longest + 1
        stored = [mx.unflatten(b[:count, :tokens], 0, (-1, kv_heads, 2)) for b in buffers]
        keys, values = (tuple(one[:, :, i : i + 1].squeeze(2) for one in stored) for i in (0, 1))
        # The queries that share a head of keys are its rows, (B, kv_heads, share, head_dim).
        grouped = mx.unflatten(queries.squeeze(0), 0, (kv_heads, -1)).transpose(2, 0, 1, 3)
        output = self.storage.attend_to(grouped, keys, values, mask)
        return output.transpose(1, 2, 0, 3).reshape(queries.shape)

    def append(self, layer: int, keys_values: np.ndarray) -> np.ndarray:
        """Store one new token per row of a float32 cache from NumPy, in place.

        Args:
            layer: Index of the decoder layer.
            keys_values: (1, 2*kv_heads, B, head_dim), keys first.

        Returns:
            A view of the tokens of all rows in `layer`, (B, kv_heads, 2, longest + 1, head_dim).
        """
        buffers, count, width = self.buffers[layer], self.num_rows, keys_values.shape[-1]
        assert buffers is not None
        buffer = np.array(buffers[0], copy=False)
        rows = buffer[: count * self._heads].reshape(count, -1, 2, buffer.shape[1], width)
        new = keys_values[0].reshape(2, -1, count, width)
        rows[np.arange(count), :, :, self.lengths] = new.transpose(2, 1, 0, 3)
        stored: np.ndarray = rows[:, :, :, : self.longest + 1]
        return stored

    def advance(self, length: int) -> None:
        """Count the `length` tokens of a step, one per row, that every layer has attended to."""
        assert length == self.num_rows
        self.lengths = self.lengths + 1
        self._slots = None

    def add(self, cache: KVCache) -> None:
        """Append the tokens of `cache`, which keeps every token, as the last row."""
        row, length = self.num_rows, cache.offset
        self._allocate(row + 1, max(self.longest, length), cache)
        for layer, stored in enumerate(cache.buffers):
            buffers = self.buffers[layer]
            assert buffers is not None
            assert stored is not None
            for buffer, part in zip(buffers, stored, strict=True):
                heads = mx.unflatten(part[:, :, :length].squeeze(0), 0, (2, -1))
                buffer[self._find(row), :length] = heads.swapaxes(0, 1).flatten(0, 1)
            mx.eval(buffers)
        self.lengths = np.append(self.lengths, length)

    def copy_row(self, row: int) -> KVCache:
        """Return the tokens of `row` as a cache of their own."""
        cache = KVCache(len(self.buffers), self.storage)
        cache.offset = length = int(self.lengths[row])
        for layer, buffers in enumerate(self.buffers):
            assert buffers is not None
            parts = (mx.unflatten(b[self._find(row), :length], 0, (-1, 2)) for b in buffers)
            cache.buffers[layer] = tuple(  # a copy, unlike `mx.contiguous`, also of a single head
                mx.concatenate([part[:, 0], part[:, 1]])[None] for part in parts
            )
        mx.eval(cache.arrays)
        return cache

    def remove(self, row: int) -> None:
        """Remove `row`; the last row takes its number. Without rows, the buffers are freed."""
        last = self.num_rows - 1
        if row != last:
            end = int(self.lengths[last])
            for buffers in self.buffers:
                assert buffers is not None
                for buffer in buffers:
                    moved = mx.contiguous(buffer[self._find(last), :end])
                    mx.eval(moved)  # or the update would copy the whole buffer
                    buffer[self._find(row), :end] = moved
                mx.eval(buffers)
            self.lengths[row] = end
        self.lengths = self.lengths[:last]
        if not last:
            self.buffers = [None] * len(self.buffers)

    def _find(self, row: int) -> slice:
        """The place of `row` in the first axis of the buffers."""
        return slice(row * self._heads, (row + 1) * self._heads)

    def _allocate(self, rows: int, tokens: int, like: KVCache | None = None) -> None:
        """Give every layer buffers for `rows` rows of `tokens` tokens, unless it has them.

        Args:
            rows: Number of rows.
            tokens: Number of tokens of the longest one.
            like: A cache with arrays of the same types and widths, for the first row.
        """
        first = self.buffers[0]
        needed = rows * self._heads, tokens
        if first is not None and all(np.array(first[0].shape[:2]) >= needed):
            return
        size = round_up(tokens)
        for layer, old in enumerate(self.buffers):
            stored = like.buffers[layer] if old is None and like is not None else old
            assert stored is not None
            if old is None:
                self._heads = stored[0].shape[1]
            shape = rows * self._heads, size
            new = tuple(mx.zeros((*shape, part.shape[-1]), part.dtype) for part in stored)
            if old is not None:
                filled = slice(self.num_rows * self._heads), slice(self.longest)
                for target, source in zip(new, old, strict=True):
                    target[filled] = source[filled]
            self.buffers[layer] = new
            mx.eval(new)
