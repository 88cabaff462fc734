"""Answers to several prompts that begin alike, generated together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_smolvlm.answer import Answer, AnswerStream, Ready, Reply, preparing
from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.content import State
from mlx_smolvlm.engine import Engine, Prompt
from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate import prefill
from mlx_smolvlm.packing import CONTEXTS, Rows, beginning, groups
from mlx_smolvlm.sampling import RowSampler, Sampling, make_row_sampler

GROWTH = 256  # tokens that an answer is expected to take; one that takes more may have to move


def checked_prompts(prompts: Sequence[str]) -> Sequence[str]:
    """`prompts`, each of which is a text.

    Raises:
        PromptError: They are one text, or one of them is none.
    """
    if isinstance(prompts, str):
        raise PromptError(f"prompts is one text, {prompts!r:.100}; give a list of them, or use ask")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {number} is {prompt!r:.100}; it must be a text")
    return prompts


def answer_all(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
    """Replies to `prompts`, which all have the same media.

    What they begin with goes through the decoder once, the rest of them together. The
    media belong to the beginning; if a chat template puts them elsewhere, or the answers are
    held to a schema, the prompts are answered one by one, with the media encoded once.
    """
    if not prompts:
        return []
    shared = beginning([prompt.input_ids for prompt in prompts])
    image_token_id = engine.config.image_token_id
    outside = any((prompt.input_ids[shared:] == image_token_id).any() for prompt in prompts)
    if outside or sampling.is_constrained:
        return [AnswerStream(engine, prompt, sampling).finished() for prompt in prompts]
    context = engine.context_size
    rows = [
        Row(
            Answer(engine, prompt, sampling.stop),
            prompt.input_ids[shared:],
            prompt.room(context, sampling.max_tokens),
        )
        for prompt in prompts
    ]
    first = replace(prompts[0], input_ids=prompts[0].input_ids[:shared])
    cache = held(engine, first, rows[0].answer.reply)
    for row in rows[1:]:
        row.answer.reply.cached_tokens = shared
    sampler, waiting = make_row_sampler(sampling), list(rows)
    while waiting:
        number = len(next(groups([row.soon for row in waiting], shared, context)))
        group, waiting = waiting[:number], waiting[number:]
        cache.trim(shared)
        decoding = Decoding(group, Rows(engine.model, cache, number), sampler)
        waiting = decoding.run(CONTEXTS * context) + waiting
    return [row.answer.reply for row in rows]


def held(engine: Engine, beginning: Prompt, reply: Reply) -> KVCache:
    """A cache of `beginning`, which is remembered; `reply` is told what was there already.

    It holds every token: rows side by side need a mask, which a bounded cache does not take.
    """
    unbounded = replace(engine.cache_options, max_kv_tokens=None)
    cache = engine.model.make_cache(unbounded)
    if not beginning.input_ids.size:
        return cache
    if unbounded != engine.cache_options:
        reply.encoded_tiles = sum(m.num_tiles for m in beginning.media if m.image_embeds is None)
        embeds = engine.model.embed(beginning.input_ids, engine.encode(beginning.media))
        prefill(engine.model, embeds, cache)
        mx.eval(cache.arrays)
        return cache
    steps = preparing(engine, beginning, reply)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            ready: Ready = end.value
            break
    prefill(engine.model, ready.inputs_embeds, ready.cache)
    mx.eval(ready.cache.arrays)
    engine.memory.remember(State(ready.content, ready.cache.fork()), ready.content, False)
    return ready.cache


@dataclass(frozen=True)
class Row:
    """One of the answers: its prompt behind the beginning, and its tokens at most."""

    answer: Answer
    suffix: np.ndarray
    limit: int

    @property
    def token_ids(self) -> np.ndarray:
        """What follows the beginning so far, the answer's tokens included."""
        return np.append(self.suffix, np.array(self.answer.reply.token_ids, self.suffix.dtype))

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return len(self.answer.reply.token_ids)

    @property
    def soon(self) -> int:
        """Tokens behind the beginning that it is given room for."""
        return self.suffix.size + min(self.limit, self.count + GROWTH)


class Decoding:
    """Answers of one group on their way through the decoder, a token of each at a time."""

    def __init__(self, group: Sequence[Row], rows: Rows, sampler: RowSampler) -> None:
        self._group, self._rows, self._sampler = group, rows, sampler
        self._counts = np.array([row.count for row in group])  # of tokens drawn
        self._limits = np.array([row.limit for row in group])

    def run(self, columns: int) -> list[Row]:
        """Bring the answers to their ends.

        While the host handles the tokens, the device already computes the next ones; those
        of answers that have just ended are not used.

        Args:
            columns: Tokens that the cache may hold.

        Returns:
            What has not ended when the cache is full. It goes on in another group, as if
            its tokens so far had been asked.
        """
        suffixes = [row.token_ids for row in self._group]
        prefilled = sum(suffix.size for suffix in suffixes)
        for row in self._group:
            if row.count == 0:
                row.answer.begin(prefilled)
        live = np.arange(len(suffixes))
        drawn = self._draw(self._rows.prefill(suffixes), live)
        while True:
            going = np.flatnonzero(self._counts[live] < self._limits[live])
            full = self._rows.columns + going.size > columns
            following = drawn
            if going.size and not full:
                logits = self._rows.step(drawn[mx.array(going)], live[going])
                following = self._draw(logits, live[going])
            for number, token_id in zip(live.tolist(), np.array(drawn).tolist(), strict=True):
                self._add(number, token_id)
            live = live[going]
            open_ = np.flatnonzero([not self._group[n].answer.ended for n in live.tolist()])
            if full or not open_.size:
                return [self._group[number] for number in live[open_].tolist()]
            live, drawn = live[open_], following[mx.array(open_)]

    def _draw(self, logits: mx.array, live: np.ndarray) -> mx.array:
        """The next token ids (L,) of the answers `live`, on their way."""
        token_ids = self._sampler(logits, self._counts[live])
        mx.async_eval(token_ids)
        self._counts[live] += 1
        return token_ids

    def _add(self, number: int, token_id: int) -> None:
        """Join a token to an answer, and end that at its limit."""
        row = self._group[number]
        row.answer.add(token_id)
        if row.answer.ended or row.count == row.limit:
            row.answer.finish()
