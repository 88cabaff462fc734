"""A cache of bounded size: the first tokens and the latest ones.

A token t sees, of the tokens up to itself, the first `pinned` and the last
`max_tokens - pinned`. That does not depend on how a prompt is cut into chunks, and up to
`max_tokens` it is everything. Keys stay rotated to the positions where they were
written (docs/decisions/kv.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.storage import FLOAT, Mask, Storage

if TYPE_CHECKING:
    from typing_extensions import Self

SINKS = 4  # first tokens that attention leans on whatever they say (arXiv 2309.17453)
RECENT = 32  # latest tokens that must fit beside the pinned ones


@dataclass(frozen=True)
class _Chunk:
    """What several new tokens, after those held, see (`mask`), and which slots then stay."""

    mask: mx.array  # (L, held + L)
    stay: mx.array  # (max_tokens,), indices into held + L


class BoundedKVCache(KVCache):
    """At most `max_tokens` tokens: the first `pinned` ones, and the latest.

    `positions` says which token is in which slot. A single token replaces the oldest
    one that is not pinned; slots are not in order, which attention does not mind.
    """

    def __init__(self, num_layers: int, max_tokens: int, storage: Storage = FLOAT) -> None:
        if max_tokens < SINKS + RECENT:
            raise ValueError(f"max_tokens is {max_tokens}, and must be {SINKS + RECENT} or more")
        super().__init__(num_layers, storage)
        self.max_tokens, self.pinned = max_tokens, SINKS
        self.positions = np.arange(0)
        self._chunk: _Chunk | None = None  # of the forward pass that is under way

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """As `KVCache.attend`, without what is no longer seen."""
        length = queries.shape[2]
        if self.offset + length <= self.max_tokens:
            return super().attend(layer, queries, keys_values, mask)
        new, held = self.storage.pack(keys_values), self.buffers[layer]
        if length == 1:
            assert held is not None
            slot = self._oldest()
            for buffer, part in zip(held, new, strict=True):
                buffer[:, :, slot : slot + 1] = part
            return self.storage.attend(queries, held, None)
        if held is not None:
            kept = (buffer[:, :, : self.positions.size] for buffer in held)
            new = tuple(mx.concatenate([*pair], axis=2) for pair in zip(kept, new, strict=True))
        self._chunk = self._chunk or self._plan(length)
        stay = self._chunk.stay
        self.buffers[layer] = tuple(mx.take(part, stay, axis=2) for part in new)
        return self.storage.attend(queries, new, self._chunk.mask)

    def advance(self, length: int) -> None:
        """Count `length` tokens that every layer has attended to."""
        if self.offset + length <= self.max_tokens:
            self.positions = np.arange(self.offset + length)
        elif length == 1:
            self.positions[self._oldest()] = self.offset
        else:
            positions = self._with_new(length)
            self.positions = positions[self._stay(positions)]
        self._chunk = None
        super().advance(length)

    def fork(self) -> Self:
        """A cache that goes on by itself; what is held is shared until either writes."""
        twin = super().fork()
        twin.positions = self.positions.copy()
        return twin

    def can_resume(self, offset: int, pinned: int = 0) -> bool:
        """Whether `trim(offset)` and `pin(pinned)` give the cache of those tokens alone.

        Once a token was dropped, only the very state that the cache is in will do.
        """
        same = offset == self.offset and max(pinned, SINKS) == self.pinned
        return super().can_resume(offset, pinned) and (not self.dropped or same)

    def trim(self, offset: int) -> None:
        """Forget every token from `offset` on.

        Raises:
            ValueError: It is no token seen, or a token was dropped: `can_resume` says no.
        """
        if self.dropped and 0 <= offset < self.offset:
            raise ValueError(
                f"the cache cannot go back to {offset} of {self.offset} tokens, since it has "
                f"dropped {self.dropped}; ask can_resume first, and begin a new cache"
            )
        super().trim(offset)
        self.positions = self.positions[:offset]

    def pin(self, count: int) -> None:
        """Never forget the first `count` tokens.

        Raises:
            ValueError: They leave no room for the latest tokens, or a token was dropped while
                others were pinned.
        """
        count = max(count, SINKS)
        if count > self.max_tokens - RECENT:
            raise ValueError(
                f"{count} tokens to keep and {RECENT} recent ones exceed {self.max_tokens}"
            )
        if count != self.pinned and self.dropped:
            raise ValueError(
                f"the cache cannot keep {count} tokens any more, since it has dropped "
                f"{self.dropped}; ask can_resume first, and begin a new cache"
            )
        self.pinned = count

    @property
    def dropped(self) -> int:
        """Tokens that were seen and are no longer held."""
        return self.offset - self.positions.size

    def _capacity(self, end: int) -> int:
        return min(super()._capacity(end), self.max_tokens)

    def _oldest(self) -> int:
        """The slot of the oldest token that is not pinned."""
        positions = self.positions
        return int(np.argmin(np.where(positions < self.pinned, self.offset, positions)))

    def _with_new(self, length: int) -> np.ndarray:
        """Positions of the tokens held, then of `length` new ones."""
        return np.concatenate([self.positions, np.arange(self.offset, self.offset + length)])

    def _stay(self, positions: np.ndarray) -> np.ndarray:
        """Indices of `positions` that stay, in their order."""
        order = np.argsort(positions)
        latest = order[-(self.max_tokens - self.pinned) :]
        return np.concatenate([order[: self.pinned], latest])

    def _plan(self, length: int) -> _Chunk:
        """What `length` new tokens see and leave."""
        seen = self._with_new(length)[None]
        now = np.arange(self.offset, self.offset + length)[:, None]
        recent = seen > now - (self.max_tokens - self.pinned)
        mask = (seen <= now) & ((seen < self.pinned) | recent)
        return _Chunk(mx.array(mask), mx.array(self._stay(seen[0])))
