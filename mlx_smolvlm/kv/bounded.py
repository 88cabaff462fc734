"""A cache of bounded size: pinned tokens and the latest ones.

Once it is full, each token takes the place of the oldest that is not pinned. So what a token
sees does not depend on how a prompt is cut into chunks, nor on what comes after it, and up
to `max_tokens` it is everything. Keys stay rotated to the positions where they were
written (docs/decisions/kv.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np

from mlx_smolvlm.kv.cache import FLOAT_STORAGE, NO_PINS, KVCache, Mask, Storage

SINKS = 4  # first tokens that attention leans on whatever they say (arXiv 2309.17453)
RECENT = 32  # latest tokens that must fit beside the pinned ones


@dataclass(frozen=True)
class _ChunkPlan:
    """What several new tokens, after those held, see (`mask`), and which of all then stay."""

    positions: np.ndarray  # of those that stay, (max_tokens,)
    mask: mx.array  # (L, held + L)
    stay: mx.array  # (max_tokens,), indices into held + L


class BoundedKVCache(KVCache):
    """At most `max_tokens` tokens: those that are pinned, and the latest.

    `positions` says which token is in which slot. They are not in order, which attention
    does not mind. `pins` are positions, in order; the first `SINKS` are always among them.
    """

    def __init__(self, num_layers: int, max_tokens: int, storage: Storage = FLOAT_STORAGE) -> None:
        if max_tokens < SINKS + RECENT:
            raise ValueError(f"max_tokens is {max_tokens}, and must be {SINKS + RECENT} or more")
        super().__init__(num_layers, storage)
        self.max_tokens = max_tokens
        self.pins, self.positions = np.arange(SINKS), np.arange(0)
        # What is the same in every layer of the forward pass that is under way.
        self._chunk: _ChunkPlan | None = None
        self._slot: int | None = None

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """As `KVCache.attend`, without what is no longer seen.

        Raises:
            ValueError: The mask is an array, which cannot know what is held.
        """
        length = queries.shape[2]
        if self.offset + length <= self.max_tokens:
            return super().attend(layer, queries, keys_values, mask)
        if isinstance(mask, mx.array):
            raise ValueError(
                f"{self.offset + length} tokens exceed the {self.max_tokens} of a bounded cache, "
                "and then it takes no mask; use a cache without a bound"
            )
        new, held = self.storage.pack(keys_values), self.buffers[layer]
        if length == 1:
            assert held is not None
            slot = self._find_oldest_slot()
            for buffer, part in zip(held, new, strict=True):
                buffer[:, :, slot : slot + 1] = part
            return self.storage.attend(queries, held, None)
        if held is not None:
            kept = (buffer[:, :, : self.positions.size] for buffer in held)
            new = tuple(mx.concatenate([*pair], axis=2) for pair in zip(kept, new, strict=True))
        self._chunk = self._chunk or self._plan_chunk(length)
        stay = self._chunk.stay
        self.buffers[layer] = tuple(mx.take(part, stay, axis=2) for part in new)
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
        """A cache that goes on by itself; what is held is shared until either writes."""
        twin = super().fork()
        twin.positions = self.positions.copy()
        return twin

    def can_resume(self, offset: int, pins: np.ndarray = NO_PINS) -> bool:
        """Whether `trim(offset)` and `pin(pins)` give the cache of those tokens alone.

        Once a token was dropped, only the very state that the cache is in will do.
        """
        if not self.num_dropped:
            return super().can_resume(offset, pins)
        return offset == self.offset and self._has_same_pins(pins)

    def trim(self, offset: int) -> None:
        """Forget every token from `offset` on.

        Raises:
            ValueError: It is no token seen, or a token was dropped: `can_resume` says no.
        """
        if self.num_dropped and 0 <= offset < self.offset:
            raise ValueError(
                f"the cache cannot go back to {offset} of {self.offset} tokens, since it has "
                f"dropped {self.num_dropped}; ask can_resume first, and begin a new cache"
            )
        super().trim(offset)
        self._chunk = self._slot = None  # of a forward pass that was interrupted
        self.positions = self.positions[:offset]

    def pin(self, pins: np.ndarray) -> None:
        """Never drop the tokens at positions `pins`, of which some may be to come.

        Raises:
            ValueError: They leave no room for the latest tokens, or differ from those before
                which a token was dropped.
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
        """Tokens that were seen and are no longer held."""
        return self.offset - self.positions.size

    def _capacity(self, end: int) -> int:
        return min(super()._capacity(end), self.max_tokens)

    def _has_same_pins(self, pins: np.ndarray) -> bool:
        """Whether the same tokens are pinned of those that were seen."""
        old, new = self.pins, _add_sinks(pins)
        return np.array_equal(old[old < self.offset], new[new < self.offset])

    def _find_oldest_slot(self) -> int:
        """The slot of the oldest token that is not pinned, computed once a forward pass."""
        if self._slot is None:
            free = np.where(np.isin(self.positions, self.pins), self.offset, self.positions)
            self._slot = int(np.argmin(free))
        return self._slot

    def _plan_chunk(self, length: int) -> _ChunkPlan:
        """What `length` new tokens see and leave.

        A token t has room for `max_tokens` less the pinned ones up to it. So it sees an
        unpinned one if t + 1, less the unpinned ones up to that one, is below `max_tokens`.
        """
        new = np.arange(self.offset, self.offset + length)
        positions = np.concatenate([self.positions, new])
        unpinned = positions + 1 - np.searchsorted(self.pins, positions, side="right")
        recent = new[:, None] + 1 - unpinned < self.max_tokens
        pinned = np.isin(positions, self.pins)
        mask = (positions <= new[:, None]) & (pinned | recent)
        stay = np.flatnonzero(mask[-1])
        return _ChunkPlan(positions[stay], mx.array(mask), mx.array(stay))


def _add_sinks(pins: np.ndarray) -> np.ndarray:
    """`pins` and the first tokens, in order, each once."""
    return np.union1d(pins, np.arange(SINKS)).astype(np.int64)
