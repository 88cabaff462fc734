"""A stand-in for the network that always says the same text, and counts its forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_smolvlm.kv.cache import KVCache


class Recital:
    """Has the methods of `Model` that the generation loops call.

    The hidden state of a token is its position. What follows position n is token n + 1 of the
    text, whatever was fed, so a loop that feeds wrong tokens is only noticed by `fed`.

    Args:
        token_ids: The text, from the first token of the prompt on.
        doubtful: Positions whose logits from a pass over several tokens are not clear.

    Attributes:
        prefill_chunk: As in `Model`.
        passes: Number of forward passes so far.
        fed: The token at each position that was fed last.
    """

    def __init__(self, token_ids: Sequence[int], doubtful: Sequence[int] = ()) -> None:
        self._token_ids, self._doubtful = np.array(token_ids), np.array(doubtful)
        self._vocab_size = int(self._token_ids.max()) + 2
        self.prefill_chunk = 512
        self.passes, self.fed = 0, dict[int, int]()

    def embed(self, input_ids: np.ndarray) -> mx.array:
        """Return the ids (L,) themselves as embeddings, (1, L, 1)."""
        return mx.array(input_ids)[None, :, None]

    def text_model(self, embeds: mx.array, cache: KVCache) -> mx.array:
        """Return the positions of `embeds` (1, L, 1), and whether they came alone, (1, L, 2)."""
        self.passes += 1
        length = embeds.shape[1]
        places = range(cache.offset, cache.offset + length)
        self.fed |= dict(zip(places, np.array(embeds)[0, :, 0].tolist(), strict=True))
        cache.advance(length)
        return mx.array([[[place, length == 1] for place in places]])

    def head(self, hidden_states: mx.array) -> mx.array:
        """Return `logits` (..., vocabulary) for `hidden_states` (..., 2)."""
        places, is_alone = np.moveaxis(np.array(hidden_states), -1, 0)
        following = self._token_ids[np.minimum(places + 1, self._token_ids.size - 1)]
        logits = (np.arange(self._vocab_size) == following[..., None]).astype(np.float32)
        is_unclear = np.isin(places, self._doubtful) & (is_alone == 0)
        logits[..., -1] = np.where(is_unclear, 1.5, 0.0)  # wrong, and not by much
        return mx.array(np.where(is_unclear[..., None], 1 + logits * 1e-5, logits))

    def step(self, token_id: mx.array, cache: KVCache) -> mx.array:
        """Feed `token_id` (1,) and return the `logits` (vocabulary,) of the next token."""
        return self.head(self.text_model(token_id[None, :, None], cache)[0, -1])
