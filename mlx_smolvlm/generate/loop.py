"""The one loop: prefill the prompt, then a token at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.sampling import Sampler
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model.model import Model

PREFILL_CHUNK = 512  # tokens; bounds the memory of a long prompt


def prefill(model: Model, inputs_embeds: mx.array, cache: KVCache) -> mx.array:
    """`logits` (vocabulary,) after the last of `inputs_embeds` (1, L, D).

    The prompt goes through the decoder in chunks, and the output head sees its
    last position only.
    """
    length = inputs_embeds.shape[1]
    start = 0
    while length - start > PREFILL_CHUNK:
        model.text_model(inputs_embeds[:, start : start + PREFILL_CHUNK], cache)
        mx.eval(cache.arrays)
        start += PREFILL_CHUNK
    hidden_states = model.text_model(inputs_embeds[:, start:], cache)
    return model.head(hidden_states[0, -1])


def generate_tokens(
    model: Model, inputs_embeds: mx.array, cache: KVCache, sampler: Sampler, max_tokens: int
) -> Generator[int, None, None]:
    """Yields up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D).

    While the caller handles a token, the device already computes the next one. So
    the cache may hold one token more than was taken.
    """
    token_id = sampler(prefill(model, inputs_embeds, cache))
    mx.async_eval(token_id)
    for _ in range(max_tokens - 1):
        following = sampler(model.step(token_id, cache))
        mx.async_eval(following)
        yield _read_token_id(token_id)
        token_id = following
    yield _read_token_id(token_id)


def generate_constrained_tokens(
    model: Model,
    inputs_embeds: mx.array,
    cache: KVCache,
    sampler: Sampler,
    constraint: Constraint,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Yields up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D) and are allowed.

    Tokens that have no alternative go through the decoder together, the first ones with the
    prompt. What may come next is found out while the device computes how likely it is. The
    cache may hold forced tokens beyond those that were taken.
    """
    pending = constraint.take_forced(max_tokens)
    if pending:
        inputs_embeds = mx.concatenate([inputs_embeds, model.embed(np.array(pending))], axis=1)
    logits = prefill(model, inputs_embeds, cache)
    mx.async_eval(logits)
    left = max_tokens - len(pending)
    while left and not constraint.is_complete:
        allowed = constraint.compute_mask()
        token_id = _read_token_id(sampler(mx.where(allowed, logits, -mx.inf)))
        constraint.take(token_id)
        new = [token_id, *constraint.take_forced(left - 1)]
        left -= len(new)
        if left and not constraint.is_complete:
            logits = prefill(model, model.embed(np.array(new)), cache)
            mx.async_eval(logits)
        yield from (*pending, *new)
        pending = []
    mx.eval(logits)
    yield from pending


def _read_token_id(token_id: mx.array) -> int:
    """The number in `token_id` (1,), once the device has it."""
    value = token_id.item()
    assert isinstance(value, int)
    return value


class StopText:
    """Text passed on up to the first of some stop texts.

    What may be the beginning of a stop text is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.pending = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """What of the text so far may be shown now."""
        self.pending += text
        found = [place for stop in self.stops if (place := self.pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self.pending = self.pending[: min(found)], ""
            return shown
        keep = max((self._find_overlap(stop) for stop in self.stops), default=0)
        cut = len(self.pending) - keep
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        shown, self.pending = self.pending, ""
        return shown

    def _find_overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self.pending))
        return next((n for n in range(longest, 0, -1) if self.pending.endswith(stop[:n])), 0)
