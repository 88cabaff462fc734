"""Rows that share the keys and values of a prefix, and the loss on where they attend.

Several questions on one picture share the picture's tokens: these pass through the
decoder once. The answers alone leave a decoder on a plateau for long, on which it looks
anywhere; so one head of a layer is told where to look, for words that name what a picture
shows, and one for words that are read off it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.kv.cache import KVCache, Mask
from mlx_smolvlm.model.text import TextModel

ASKED_LAYER, ANSWERED_LAYER = 2, 4  # whose first head is told where to look


@dataclass(frozen=True)
class Pointers:
    """Where tokens of rows should attend.

    Attributes:
        places: int32 (S,), flat places in (rows, row length).
        targets: bool (S, L), the tokens of the beginning to look at.
    """

    places: np.ndarray
    targets: np.ndarray


class SharedPrefix(KVCache):
    """Keys and values of C prefixes, each shared by R rows.

    Attributes:
        repeats: R; 0 while the beginnings themselves are computed.
        pointers: Where continuations should look, by layer.
        losses: One for each layer of `pointers`, once it was computed.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.repeats = 0
        self.pointers: dict[int, Pointers] = {}
        self.losses: list[mx.array] = []

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        """(B, heads, L, head_dim): what tokens find in `layer`, those of the beginnings first."""
        held = self.storage.pack(keys_values)
        before = self.buffers[layer]
        if not self.repeats:
            self.buffers[layer] = held
        elif before is not None:
            pairs = zip(before, held, strict=True)
            repeated = ([mx.repeat(old, self.repeats, axis=0), new] for old, new in pairs)
            held = tuple(mx.concatenate(pair, axis=2) for pair in repeated)
            if layer in self.pointers:
                loss = pointer_loss(queries[:, 0], held[0][:, 0], self.pointers[layer])
                self.losses.append(loss)
        return self.storage.attend(queries, held, mask)


def pointer_loss(queries: mx.array, keys: mx.array, pointers: Pointers) -> mx.array:
    """Return the mean of -log of the attention that `queries` (B, M, d) give to the targets.

    Args:
        keys: (B, L + M, d), those of the beginnings and of the rows themselves.
    """
    b, length, width = queries.shape
    first = keys.shape[1] - length
    scores = (queries * width**-0.5) @ keys.swapaxes(1, 2)  # (B, M, L + M)
    flat = scores.reshape(b * length, -1)[mx.array(pointers.places)]
    own = pointers.places[:, None] % length  # a token sees the row up to itself
    at = np.arange(keys.shape[1])[None]
    lowest = mx.finfo(flat.dtype).min
    seen = mx.where(mx.array(at <= first + own), flat, lowest)
    there = mx.where(mx.array(pointers.targets), flat[:, :first], lowest)
    return (mx.logsumexp(seen, -1) - mx.logsumexp(there, -1)).mean()


def layer_states(
    text_model: TextModel, inputs_embeds: mx.array, cache: SharedPrefix
) -> list[mx.array]:
    """Return the hidden states (B, L, D) after each layer, the last one normalized."""
    b, length, _ = inputs_embeds.shape
    turned = [cache.offset] * text_model.rotary_rows + [0] * text_model.value_rows
    positions = mx.array(turned * b)
    states, x = [], inputs_embeds
    for layer in text_model.layers:
        x = layer(x, positions, cache)
        states.append(x)
    cache.offset += length
    states[-1] = text_model.norm(x)
    return states
