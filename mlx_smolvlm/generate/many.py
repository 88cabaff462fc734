"""Generates answers to several prompts with a shared prefix together.

A row is a sequence that continues the shared prefix. All rows share one cache, which holds the
prefix once, followed by the tokens of the rows in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.loop import prefill, run_to_end
from mlx_smolvlm.generate.sampling import RowSampler, Sampling, make_row_sampler
from mlx_smolvlm.generate.stream import Answer, AnswerStream, Reply, prepare_answer
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model.model import PREFILL_CHUNK, Model
from mlx_smolvlm.model.text import Placement
from mlx_smolvlm.reuse.content import CachedState, count_common

CONTEXTS = 2  # size of the cache of a group of rows, as a multiple of the context
TOTAL = frozenset({"max_tokens"})  # no advice names it: all answers are counted together
MAX_ROWS = 64  # rows of a group; bounds the logits
GROWTH = 256  # tokens reserved for an answer; a longer one may have to move to another group
SHARED = -1  # owner of the tokens that every row attends to


class RowDecoder:
    """Decodes `count` rows that continue the tokens in `cache`."""

    def __init__(self, model: Model, cache: KVCache, count: int) -> None:
        self._model, self._cache = model, cache
        self._owners = np.full(cache.offset, SHARED)
        self._lengths = np.full(count, cache.offset)

    @property
    def columns(self) -> int:
        """Number of tokens in the cache: those of the prefix and of all rows."""
        return self._owners.size

    def prefill(self, suffixes: Sequence[np.ndarray]) -> mx.array:
        """Feed one suffix per row and return the `logits` (B, vocabulary) after each."""
        ends = np.cumsum([suffix.size for suffix in suffixes]) - 1
        return self._model.head(self.compute_hidden_states(suffixes)[mx.array(ends)])

    def compute_hidden_states(self, suffixes: Sequence[np.ndarray]) -> mx.array:
        """Feed one suffix per row and return the hidden states (L, D), concatenated."""
        token_ids = np.concatenate(suffixes)
        rows = np.repeat(np.arange(len(suffixes)), [suffix.size for suffix in suffixes])
        states = []
        for start in range(0, token_ids.size, PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            states.append(self._forward(mx.array(token_ids[part]), rows[part]))
            mx.eval(states[-1], self._cache.arrays)
        return mx.concatenate(states)

    def step(self, token_ids: mx.array, rows: np.ndarray) -> mx.array:
        """Feed one token per row of `rows` (L,) and return the `logits` (L, vocabulary)."""
        return self._model.head(self._forward(token_ids, rows))

    def _forward(self, token_ids: mx.array, rows: np.ndarray) -> mx.array:
        """Feed `token_ids` (L,), which belong to `rows` (L,), and return hidden states (L, D)."""
        text_model = self._model.text_model
        embeds: mx.array = text_model.embed_tokens(token_ids)[None]  # (1, L, D)
        hidden_states: mx.array = text_model(embeds, self._cache, self._place(rows))[0]
        return hidden_states

    def _place(self, rows: np.ndarray) -> Placement:
        """Append tokens that belong to `rows` (L,); return their positions and their mask."""
        same = rows[:, None] == rows
        positions = self._lengths[rows] + np.tril(same, -1).sum(axis=1)
        sees = (self._owners == SHARED) | (self._owners == rows[:, None])
        mask = mx.array(np.concatenate([sees, np.tril(same)], axis=1))
        self._owners = np.concatenate([self._owners, rows])
        np.add.at(self._lengths, rows, 1)
        return Placement(positions, mask)


def count_shared_tokens(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the longest common prefix that is shorter than each sequence."""
    shared = min(count_common(sequences[0], sequence) for sequence in sequences)
    return min(shared, *(sequence.size - 1 for sequence in sequences))


def split_into_groups(columns: Sequence[int], shared: int, context: int) -> Iterator[range]:
    """Yield groups of consecutive rows that are decoded together.

    The prefix and the rows of a group take at most `CONTEXTS * context` tokens of the cache,
    each of which has 2 * kv_heads * head_dim * layers numbers.

    Args:
        columns: Number of tokens reserved for each row, without the prefix.
        shared: Number of tokens of the prefix. With those of any one row at most `context`.
        context: The model's context size, in tokens.
    """
    start, used = 0, shared
    for number, more in enumerate(columns):
        if used + more > CONTEXTS * context or number - start == MAX_ROWS:
            yield range(start, number)
            start, used = number, shared
        used += more
    if columns:
        yield range(start, len(columns))


def check_prompts(prompts: Sequence[str]) -> Sequence[str]:
    """Return `prompts` if they are several texts.

    Raises:
        PromptError: `prompts` is a single text, or an item is not a text.
    """
    if isinstance(prompts, str):
        raise PromptError(f"prompts is one text, {prompts!r:.100}; give a list of them, or use ask")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {number} is {prompt!r:.100}; it must be a text")
    return prompts


def answer_all(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
    """Return the replies to `prompts`, which all have the same media.

    The shared prefix is prefilled once, and the answers are generated together. If the prefix
    does not include all media, or the answers have a schema or a regular expression, the prompts
    are answered one after the other; the media are still encoded once.
    """
    if not prompts:
        return []
    shared = count_shared_tokens([prompt.input_ids for prompt in prompts])
    image_token_id = engine.config.image_token_id
    outside = any((prompt.input_ids[shared:] == image_token_id).any() for prompt in prompts)
    if outside or sampling.is_constrained:
        return [AnswerStream(engine, prompt, sampling).finish() for prompt in prompts]
    context = engine.context_size
    rows = [
        AnswerRow(
            Answer(engine, prompt, sampling.stop),
            prompt.input_ids[shared:],
            prompt.limit_tokens(context, sampling.max_tokens),
        )
        for prompt in prompts
    ]
    first = replace(prompts[0], input_ids=prompts[0].input_ids[:shared])
    more = sum(row.suffix.size + row.limit for row in rows)
    engine.check_memory(first, min(more, CONTEXTS * context), min(len(rows), MAX_ROWS), TOTAL)
    cache = make_prefix_cache(engine, first, rows[0].answer.reply)
    for row in rows[1:]:
        row.answer.reply.cached_tokens = shared
    sampler, waiting = make_row_sampler(sampling), list(rows)
    while waiting:
        number = len(
            next(split_into_groups([row.reserved_tokens for row in waiting], shared, context))
        )
        group, waiting = waiting[:number], waiting[number:]
        cache.trim(shared)
        decoding = GroupDecoder(group, RowDecoder(engine.model, cache, number), sampler)
        waiting = decoding.run(CONTEXTS * context) + waiting
    return [row.answer.reply for row in rows]


def make_prefix_cache(engine: Engine, prefix: Prompt, reply: Reply) -> KVCache:
    """Return a cache of the tokens of `prefix`, and remember it for later prompts.

    The cache keeps every token, since rows need a mask, which a bounded cache does not support.

    Args:
        engine: The engine.
        prefix: The prefix of several prompts, with all their media.
        reply: Its `encoded_tiles` and `cached_tokens` are set.
    """
    cache = engine.make_unbounded_cache()
    if not prefix.input_ids.size:
        return cache
    is_bounded = engine.cache_options.max_kv_tokens is not None
    ready = run_to_end(prepare_answer(engine, prefix, reply, cache if is_bounded else None))
    prefill(engine.model, ready.inputs_embeds, ready.cache)
    mx.eval(ready.cache.arrays)
    if not is_bounded:
        state = CachedState(ready.content, ready.cache.fork())
        engine.memory.keep_state(state, ready.content, False)
    return ready.cache


@dataclass(frozen=True)
class AnswerRow:
    """An answer that is generated together with others.

    Attributes:
        answer: The answer so far.
        suffix: Token ids of its prompt after the shared prefix.
        limit: Its maximum number of tokens.
    """

    answer: Answer
    suffix: np.ndarray
    limit: int

    @property
    def token_ids(self) -> np.ndarray:
        """Token ids after the shared prefix, including those of the answer so far."""
        return np.append(self.suffix, np.array(self.answer.reply.token_ids, self.suffix.dtype))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.answer.reply.token_ids)

    @property
    def reserved_tokens(self) -> int:
        """Number of tokens reserved in the cache, without the shared prefix."""
        return self.suffix.size + min(self.limit, self.num_tokens + GROWTH)


class GroupDecoder:
    """Generates the answers of a group, one token of each per step."""

    def __init__(self, group: Sequence[AnswerRow], rows: RowDecoder, sampler: RowSampler) -> None:
        self._group, self._rows, self._sampler = group, rows, sampler
        self._counts = np.array([row.num_tokens for row in group])  # tokens sampled
        self._limits = np.array([row.limit for row in group])

    def run(self, columns: int) -> list[AnswerRow]:
        """Generate until all answers have ended or the cache is full.

        While the host handles the tokens, the device already computes the next ones. Those of
        answers that have just ended are discarded.

        Args:
            columns: Maximum number of tokens in the cache.

        Returns:
            The answers that had not ended when the cache was full. They continue in another
            group, where their tokens so far are part of the suffix.
        """
        suffixes = [row.token_ids for row in self._group]
        prefilled = sum(suffix.size for suffix in suffixes)
        for row in self._group:
            if row.num_tokens == 0:
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
            open_ = np.flatnonzero([not self._group[n].answer.is_ended for n in live.tolist()])
            if full or not open_.size:
                return [self._group[number] for number in live[open_].tolist()]
            live, drawn = live[open_], following[mx.array(open_)]

    def _draw(self, logits: mx.array, live: np.ndarray) -> mx.array:
        """Start to sample the next token ids (L,) of the answers `live`, and count them."""
        token_ids = self._sampler(logits, self._counts[live])
        mx.async_eval(token_ids)
        self._counts[live] += 1
        return token_ids

    def _add(self, number: int, token_id: int) -> None:
        """Append a token to an answer, and end the answer at its limit."""
        row = self._group[number]
        row.answer.add(token_id)
        if row.answer.is_ended or row.num_tokens == row.limit:
            row.answer.finish()
