"""Answers to several prompts that begin alike, generated together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.loop import PREFILL_CHUNK, prefill
from mlx_smolvlm.generate.sampling import RowSampler, Sampling, make_row_sampler
from mlx_smolvlm.generate.stream import Answer, AnswerStream, PreparedPrompt, Reply, prepare_answer
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.text import Placement
from mlx_smolvlm.reuse.content import CachedState, count_common

CONTEXTS = 2  # the cache of rows that go together holds at most so many times the context
MAX_ROWS = 64  # and their logits are at most so many rows
BEGINNING = -1  # owner of the tokens that every row sees


class RowDecoder:
    """RowDecoder behind what `cache` holds, which is the beginning of each."""

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
        return self._model.head(self.compute_hidden_states(suffixes)[mx.array(ends)])

    def compute_hidden_states(self, suffixes: Sequence[np.ndarray]) -> mx.array:
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
        hidden_states: mx.array = text_model(embeds, self._cache, self._place(rows))[0]
        return hidden_states

    def _place(self, rows: np.ndarray) -> Placement:
        """Where the next tokens stand, which belong to `rows` (L,) and are counted here."""
        same = rows[:, None] == rows
        positions = self._lengths[rows] + np.tril(same, -1).sum(axis=1)
        sees = (self._owners == BEGINNING) | (self._owners == rows[:, None])
        mask = mx.array(np.concatenate([sees, np.tril(same)], axis=1))
        self._owners = np.concatenate([self._owners, rows])
        np.add.at(self._lengths, rows, 1)
        return Placement(positions, mask)


def count_shared_tokens(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all `sequences` begin with; each has at least one more."""
    shared = min(count_common(sequences[0], sequence) for sequence in sequences)
    return min(shared, *(sequence.size - 1 for sequence in sequences))


def split_into_groups(columns: Sequence[int], shared: int, context: int) -> Iterator[range]:
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


GROWTH = 256  # tokens that an answer is expected to take; one that takes more may have to move


def check_prompts(prompts: Sequence[str]) -> Sequence[str]:
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
    cache = make_prefix_cache(engine, first, rows[0].answer.reply)
    for row in rows[1:]:
        row.answer.reply.cached_tokens = shared
    sampler, waiting = make_row_sampler(sampling), list(rows)
    while waiting:
        number = len(next(split_into_groups([row.soon for row in waiting], shared, context)))
        group, waiting = waiting[:number], waiting[number:]
        cache.trim(shared)
        decoding = GroupDecoder(group, RowDecoder(engine.model, cache, number), sampler)
        waiting = decoding.run(CONTEXTS * context) + waiting
    return [row.answer.reply for row in rows]


def make_prefix_cache(engine: Engine, beginning: Prompt, reply: Reply) -> KVCache:
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
    steps = prepare_answer(engine, beginning, reply)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            ready: PreparedPrompt = end.value
            break
    prefill(engine.model, ready.inputs_embeds, ready.cache)
    mx.eval(ready.cache.arrays)
    engine.memory.keep_state(CachedState(ready.content, ready.cache.fork()), ready.content, False)
    return ready.cache


@dataclass(frozen=True)
class AnswerRow:
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


class GroupDecoder:
    """Answers of one group on their way through the decoder, a token of each at a time."""

    def __init__(self, group: Sequence[AnswerRow], rows: RowDecoder, sampler: RowSampler) -> None:
        self._group, self._rows, self._sampler = group, rows, sampler
        self._counts = np.array([row.count for row in group])  # of tokens drawn
        self._limits = np.array([row.limit for row in group])

    def run(self, columns: int) -> list[AnswerRow]:
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
            open_ = np.flatnonzero([not self._group[n].answer.is_ended for n in live.tolist()])
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
        if row.answer.is_ended or row.count == row.limit:
            row.answer.finish()
