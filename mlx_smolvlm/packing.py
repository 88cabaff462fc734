"""Several continuations of one beginning, side by side in one cache.

The beginning is held once. The tokens of all rows lie behind it in the order in which they
came; each sees the beginning and its own row before it, and stands where it would if its row
were alone. So nothing is padded or copied (docs/decisions/batch.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.content import common
from mlx_smolvlm.generate import PREFILL_CHUNK
from mlx_smolvlm.model import Model
from mlx_smolvlm.text import Places

CONTEXTS = 2  # the cache of rows that go together holds at most so many times the context
MAX_ROWS = 64  # and their logits are at most so many rows
BEGINNING = -1  # owner of the tokens that every row sees


class Rows:
    """Rows behind what `cache` holds, which is the beginning of each."""

    def __init__(self, model: Model, cache: KVCache, count: int) -> None:
        self._model, self._cache = model, cache
        self._owners = np.full(cache.offset, BEGINNING)
        self._lengths = np.full(count, cache.offset)

    @property
    def columns(self) -> int:
        """Tokens that the cache holds, the beginning's and all rows'."""
        return self._owners.size

    def prefill(self, suffixes: Sequence[np.ndarray]) -> mx.array:
        """`logits` (B, vocabulary) after the tokens of `suffixes`, one for each row."""
        ends = np.cumsum([suffix.size for suffix in suffixes]) - 1
        return self._model.head(self.states(suffixes)[mx.array(ends)])

    def states(self, suffixes: Sequence[np.ndarray]) -> mx.array:
        """Hidden states (L, D) of the tokens of `suffixes`, one for each row, joined."""
        token_ids = np.concatenate(suffixes)
        rows = np.repeat(np.arange(len(suffixes)), [suffix.size for suffix in suffixes])
        states = []
        for start in range(0, token_ids.size, PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            states.append(self._forward(mx.array(token_ids[part]), rows[part]))
            mx.eval(states[-1], self._cache.arrays)
        return mx.concatenate(states)

    def step(self, token_ids: mx.array, rows: np.ndarray) -> mx.array:
        """`logits` (L, vocabulary) after one token of `token_ids` (L,) for each of `rows`."""
        return self._model.head(self._forward(token_ids, rows))

    def _forward(self, token_ids: mx.array, rows: np.ndarray) -> mx.array:
        """Hidden states (L, D) of `token_ids` (L,), which belong to `rows` (L,)."""
        text_model = self._model.text_model
        embeds: mx.array = text_model.embed_tokens(token_ids)[None]  # (1, L, D)
        hidden_states: mx.array = text_model(embeds, self._cache, self._places(rows))[0]
        return hidden_states

    def _places(self, rows: np.ndarray) -> Places:
        """Where the next tokens stand, which belong to `rows` (L,) and are counted here."""
        same = rows[:, None] == rows
        positions = self._lengths[rows] + np.tril(same, -1).sum(axis=1)
        sees = (self._owners == BEGINNING) | (self._owners == rows[:, None])
        mask = mx.array(np.concatenate([sees, np.tril(same)], axis=1))
        self._owners = np.concatenate([self._owners, rows])
        np.add.at(self._lengths, rows, 1)
        return Places(positions, mask)


def beginning(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all `sequences` begin with; each has at least one more."""
    shared = min(common(sequences[0], sequence) for sequence in sequences)
    return min(shared, *(sequence.size - 1 for sequence in sequences))


def groups(columns: Sequence[int], shared: int, context: int) -> Iterator[range]:
    """Which rows go through the decoder together, one group after the other.

    A group's tokens and the beginning fill at most `CONTEXTS` contexts. What they take is
    so many tokens times 2 * kv_heads * head_dim * layers numbers.

    Args:
        columns: Tokens that each row may come to behind the beginning.
        shared: Tokens of the beginning; with any one of `columns` at most a context.
        context: The longest sequence of the model.
    """
    start, used = 0, shared
    for number, more in enumerate(columns):
        if used + more > CONTEXTS * context or number - start == MAX_ROWS:
            yield range(start, number)
            start, used = number, shared
        used += more
    if columns:
        yield range(start, len(columns))
