"""A cache of bounded size: it keeps the pinned tokens and the latest ones.

Once the cache is full, each new token replaces the oldest one that is not pinned. Which tokens
a token attends to does therefore not depend on how the prompt is split into chunks or on what
follows; while `max_tokens` fit, it attends to all. Keys keep the rotation of their original
positions (docs/decisions/kv.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np

from mlx_smolvlm.kv.cache import FLOAT_STORAGE, NO_PINS, KVCache, Mask, Storage

SINKS = 4  # first tokens, which attention needs whatever they say (arXiv 2309.17453)
RECENT = 32  # latest tokens that must fit beside the pinned ones


@dataclass(frozen=True)
class _ChunkPlan:
    """The attention mask of L new tokens, and which tokens the cache keeps after them.

    S is the number of tokens stored before.
    """

    positions: np.ndarray  # (max_tokens,), of the tokens to keep
    mask: mx.array  # (S + L) columns, L rows
    keep: mx.array  # (max_tokens,), indices of these tokens among the S + L


class BoundedKVCache(KVCache):
    """At most `max_tokens` tokens: those that are pinned, and the latest.

    `positions` holds the position of the token in each slot, in no order; attention does not
    depend on it. `pins` holds sorted positions, which always include the first `SINKS`.

    Raises:
        ValueError: `max_tokens` is too small.
    """

    def __init__(self, num_layers: int, max_tokens: int, storage: Storage = FLOAT_STORAGE) -> None:
        if max_tokens < SINKS + RECENT:
            raise ValueError(f"max_tokens is {max_tokens}, and must be {SINKS + RECENT} or more")
        super().__init__(num_layers, storage)
        self.max_tokens = max_tokens
        self.pins, self.positions = np.arange(SINKS), np.arange(0)
        # Computed once per forward pass, since all layers share it.
        self._chunk: _ChunkPlan | None = None
        self._slot: int | None = None

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """As `KVCache.attend`, over the tokens that the cache keeps.

        Raises:
            ValueError: The mask is an array, and some tokens do not fit. An array cannot tell
                which ones are stored.
        """
        length = queries.shape[2]
        if self.offset + length <= self.max_tokens:
            return super().attend(layer, queries, keys_values, mask)
        if isinstance(mask, mx.array):
            raise ValueError(
                f"{self.offset + length} tokens exceed the {self.max_tokens} of a bounded cache, "
                "and then it takes no mask; use a cache without a bound"
            )
        new, stored = self.storage.pack(keys_values), self.buffers[layer]
        if length == 1:
            assert stored is not None
            slot = self._find_oldest_slot()
            for buffer, part in zip(stored, new, strict=True):
                buffer[:, :, slot : slot + 1] = part
            return self.storage.attend(queries, stored, None)
        if stored is not None:
            old = (buffer[:, :, : self.positions.size] for buffer in stored)
            new = tuple(mx.concatenate([*pair], axis=2) for pair in zip(old, new, strict=True))
        self._chunk = self._chunk or self._plan_chunk(length)
        keep = self._chunk.keep
        self.buffers[layer] = tuple(mx.take(part, keep, axis=2) for part in new)
        return self.storage.attend(queries, new, self._chunk.mask)

    def advance(self, length: int) -> None:
        """Count `length` tokens that every layer has attended to."""
        if self.offset + length <= self.max_tokens:
            self.positions = np.arange(self.offset + length)
        elif length == 1:
            self.positions[self._find_oldest_slot()] = self.offset
        else:
            self.positions = (self._chunk or self._plan_chunk(length)).positions
        self._chunk = self._slot = None
        super().advance(length)

    def fork(self) -> Self:
        """An independent copy; the arrays are shared until one of the two is written to."""
        twin = super().fork()
        twin.positions = self.positions.copy()
        return twin

    def can_resume(self, offset: int, pins: np.ndarray = NO_PINS) -> bool:
        """Whether `trim(offset)` and `pin(pins)` give the same cache as those tokens alone.

        After a token was dropped, this holds only for the current offset and the same pins.
        """
        if not self.num_dropped:
            return super().can_resume(offset, pins)
        return offset == self.offset and self._has_same_pins(pins)

    def can_undo(self, length: int) -> bool:
        """Whether `length` more tokens can be removed again with `trim`: no token is dropped."""
        return self.offset + length <= self.max_tokens

    def trim(self, offset: int) -> None:
        """Remove all tokens from `offset` on.

        Raises:
            ValueError: `offset` is out of range, or a token was dropped; see `can_resume`.
        """
        if self.num_dropped and 0 <= offset < self.offset:
            raise ValueError(
                f"the cache cannot go back to {offset} of {self.offset} tokens, since it has "
                f"dropped {self.num_dropped}; ask can_resume first, and begin a new cache"
            )
        super().trim(offset)
        self._chunk = self._slot = None  # left by an interrupted forward pass
        self.positions = self.positions[:offset]

    def pin(self, pins: np.ndarray) -> None:
        """Never drop the tokens at positions `pins`, some of which may lie ahead.

        Raises:
            ValueError: Too few slots remain for the latest tokens, or a token was dropped
                already and the pins before `offset` differ.
        """
        if self.num_dropped and not self._has_same_pins(pins):
            raise ValueError(
                f"the cache cannot pin other tokens among the first {self.offset}, since it has "
                f"dropped {self.num_dropped}; ask can_resume first, and begin a new cache"
            )
        pins = _add_sinks(pins)
        if pins.size > self.max_tokens - RECENT:
            raise ValueError(
                f"{pins.size} tokens to pin and {RECENT} recent ones exceed {self.max_tokens}"
            )
        self.pins = pins
        self._chunk = self._slot = None

    @property
    def num_dropped(self) -> int:
        """Number of processed tokens that are no longer stored."""
        return self.offset - self.positions.size

    def _choose_capacity(self, end: int) -> int:
        return min(super()._choose_capacity(end), self.max_tokens)

    def _has_same_pins(self, pins: np.ndarray) -> bool:
        """Whether `pins` and the present pins agree on the processed tokens."""
        old, new = self.pins, _add_sinks(pins)
        return np.array_equal(old[old < self.offset], new[new < self.offset])

    def _find_oldest_slot(self) -> int:
        """The slot of the oldest token that is not pinned, computed once per forward pass."""
        if self._slot is None:
            free = np.where(np.isin(self.positions, self.pins), self.offset, self.positions)
            self._slot = int(np.argmin(free))
        return self._slot

    def _plan_chunk(self, length: int) -> _ChunkPlan:
        """The mask for `length` new tokens, and the tokens to keep after them.

        Token t sees the pinned tokens up to t and as many of the latest others as fill
        `max_tokens`. It sees the unpinned token s if t + 1 minus the number of unpinned tokens
        up to s is below `max_tokens`.
        """
        new = np.arange(self.offset, self.offset + length)
        positions = np.concatenate([self.positions, new])
        unpinned = positions + 1 - np.searchsorted(self.pins, positions, side="right")
        recent = new[:, None] + 1 - unpinned < self.max_tokens
        pinned = np.isin(positions, self.pins)
        mask = (positions <= new[:, None]) & (pinned | recent)
        keep = np.flatnonzero(mask[-1])
        return _ChunkPlan(positions[keep], mx.array(mask), mx.array(keep))


def _add_sinks(pins: np.ndarray) -> np.ndarray:
    """`pins` and the first `SINKS` positions, sorted, without duplicates."""
    return np.union1d(pins, np.arange(SINKS)).astype(np.int64)
