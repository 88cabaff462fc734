"""The generation loops: prefill the prompt, then generate token after token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.sampling import Sampler
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model.model import Model

Value = TypeVar("Value")


def prefill(model: Model, inputs_embeds: mx.array, cache: KVCache) -> mx.array:
    """Feed `inputs_embeds` (1, L, D) and return the `logits` (vocabulary,) of the next token."""
    return run_to_end(prefill_in_steps(model, inputs_embeds, cache))


def run_to_end(steps: Generator[object, None, Value]) -> Value:
    """Run the generator `steps` to its end, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Value = end.value
            return result


def prefill_in_steps(
    model: Model, inputs_embeds: mx.array, cache: KVCache
) -> Generator[None, None, mx.array]:
    """As `prefill`, but yield after each chunk that others follow.

    The prompt goes through the decoder in chunks; only its last position goes through the
    output head.
    """
    length = inputs_embeds.shape[1]
    start = 0
    while length - start > model.prefill_chunk:
        model.text_model(inputs_embeds[:, start : start + model.prefill_chunk], cache)
        mx.eval(cache.arrays)
        start += model.prefill_chunk
        yield
    hidden_states = model.text_model(inputs_embeds[:, start:], cache)
    return model.head(hidden_states[0, -1])


def generate_tokens(
    model: Model, inputs_embeds: mx.array, cache: KVCache, sampler: Sampler, max_tokens: int
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D).

    While the caller handles a token, the device already computes the next one. So the cache may
    hold one token more than was yielded.
    """
    token_id = sampler(prefill(model, inputs_embeds, cache))
    mx.async_eval(token_id)
    for _ in range(max_tokens - 1):
        following = sampler(model.step(token_id, cache))
        mx.async_eval(following)
        yield read_token_id(token_id)
        token_id = following
    yield read_token_id(token_id)


def generate_constrained_tokens(
    model: Model,
    inputs_embeds: mx.array,
    cache: KVCache,
    sampler: Sampler,
    constraint: Constraint,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D) and are allowed.

    Forced tokens, which have no alternative, go through the decoder together; those that begin
    the answer go with the prompt. The mask of allowed tokens is computed while the device
    computes the logits. The cache may hold forced tokens beyond those that were yielded.
    """
    pending = constraint.take_forced(max_tokens)
    if pending:
        inputs_embeds = mx.concatenate([inputs_embeds, model.embed(np.array(pending))], axis=1)
    logits = prefill(model, inputs_embeds, cache)
    mx.async_eval(logits)
    left = max_tokens - len(pending)
    while left and not constraint.is_complete:
        allowed = constraint.compute_mask()
        token_id = read_token_id(sampler(mx.where(allowed, logits, -mx.inf)))
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


def read_token_id(token_id: mx.array) -> int:
    """Wait for `token_id` (1,) and return it as an integer."""
    value = token_id.item()
    assert isinstance(value, int)
    return value


class StopText:
    """Cuts an answer at the first of several stop texts.

    Text that may be the beginning of a stop text is held back until that is decided.

    Attributes:
        stops: The stop texts.
        pending: Text that is held back.
        is_stopped: Whether a stop text has occurred.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.pending = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Append `text`, and return the text that may be shown now."""
        self.pending += text
        starts = [start for stop in self.stops if (start := self.pending.find(stop)) >= 0]
        if starts:
            self.is_stopped = True
            output, self.pending = self.pending[: min(starts)], ""
            return output
        overlap = max((self._find_overlap(stop) for stop in self.stops), default=0)
        cut = len(self.pending) - overlap
        output, self.pending = self.pending[:cut], self.pending[cut:]
        return output

    def flush(self) -> str:
        """Return the text that is held back, at the end of the answer."""
        output, self.pending = self.pending, ""
        return output

    def _find_overlap(self, stop: str) -> int:
        """Return the length of the longest suffix of `pending` that begins `stop`."""
        longest = min(len(stop) - 1, len(self.pending))
        return next((n for n in range(longest, 0, -1) if self.pending.endswith(stop[:n])), 0)
