"""One answer of a batch: its preparation, and its tokens one by one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.loop import prefill_in_steps
from mlx_smolvlm.generate.sampling import Sampling, make_row_sampler
from mlx_smolvlm.generate.stream import (
    Answer,
    Chunk,
    PreparedPrompt,
    Reply,
    complete_answer,
    prepare_answer,
)
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.media.encode import Picture, Progress
from mlx_smolvlm.reuse.content import CachedState, Content

GROWTH = 256  # tokens reserved for an answer; a longer one may have to wait and be computed again


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt whose keys and values are computed.

    Attributes:
        logits: Those of the next token, (vocabulary,).
        cache: Keys and values of all tokens, to be copied before others use it.
    """

    logits: mx.array
    cache: KVCache


class BatchedAnswer:
    """An answer that is generated together with others, made by `AnswerBatch.add`.

    Attributes:
        prompt: The prompt. Its pictures are freed when they are encoded, except in a conversation.
        reply: The answer so far.
        state: As that of an `AnswerStream`: of a conversation, or of the answer when it is over.
        error: The exception that ended the answer, or None.
        is_over: Whether the answer has ended, was cancelled or has failed.
        is_cancelled: Set by `AnswerBatch.cancel`.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
        self._limit = prompt.limit_tokens(engine.context_size, sampling.max_tokens)
        engine.check_memory(prompt, self._limit)
        self._engine, self.prompt, self._sampling = engine, prompt, sampling
        self._constraint = engine.constrainer(sampling) if sampling.is_constrained else None
        lead = None if self._constraint is None else self._constraint.lead
        self._answer = Answer(engine, prompt, sampling.stop, lead)
        self._sampler = make_row_sampler(sampling)
        self._forced: list[int] = []  # next tokens, which have no alternative
        self._draws = 0  # tokens of the answer that were sampled
        self._content: Content | None = None
        self.reply, self.state = self._answer.reply, prompt.state
        self.error: Exception | None = None
        self.is_over = self.is_cancelled = False

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, whatever the tokens before it."""
        return self._constraint is None and not self._sampling.temperature

    @property
    def must_wait(self) -> bool:
        """Whether the next step may begin only after the host has read the present token."""
        is_last = len(self.reply.token_ids) + 1 == self._limit
        return self._constraint is not None or is_last

    @property
    def reserved_tokens(self) -> int:
        """Number of tokens reserved in the cache, those of the prompt included."""
        count = len(self.reply.token_ids)
        return self.prompt.input_ids.size + min(self._limit, count + GROWTH)

    def prepare(self) -> Generator[None, None, PrefilledPrompt]:
        """Encode the media and prefill the prompt; yield after each batch of tiles and chunk.

        If the answer has begun before, its tokens so far become part of the prompt.
        """
        engine, token_ids = self._engine, self.reply.token_ids
        ids = np.append(self.prompt.input_ids, np.array(token_ids, np.int32))
        # A fork, so that the conversation's state stays true if this answer is cancelled.
        state = None if self.prompt.state is None else self.prompt.state.fork()
        prompt = replace(self.prompt, input_ids=ids, pins=self.prompt.pins[:0], state=state)
        is_first = self._content is None
        empty = None
        if engine.cache_options.max_kv_tokens is not None:
            prompt, empty = replace(prompt, state=None), engine.make_unbounded_cache()
        steps = prepare_answer(engine, prompt, self.reply if is_first else Reply(), empty)
        with closing(steps):
            content, embeds, cache = yield from _encode_by_batch(steps)
        if is_first:
            self._content = content
            self._answer.begin(embeds.shape[1])
            if self._constraint is not None:
                self._forced = self._constraint.take_forced(self._limit)
        if not prompt.is_turn:
            _free_pictures(prompt)
        logits = yield from prefill_in_steps(engine.model, embeds, cache)
        mx.eval(logits, cache.arrays)
        if is_first:
            self._answer.end_prefill()
        if empty is None and engine.cache_options.folder is None:  # a folder gets whole answers
            state = CachedState(content, cache.fork())
            engine.memory.keep_state(state, content, self.prompt.is_turn)
        return PrefilledPrompt(logits, cache)

    def draw(self, logits: mx.array, ahead: int) -> mx.array:
        """Return the next token id (1,), given `logits` (vocabulary,).

        Args:
            logits: (vocabulary,).
            ahead: Number of tokens drawn before that `take` has not got yet.
        """
        if self._forced:
            return mx.array(self._forced[:1])
        if self._constraint is not None:
            logits = mx.where(self._constraint.compute_mask(), logits, -mx.inf)
        return self._sampler(logits[None], np.array([self._draws + ahead]))

    def take(self, token_id: int) -> list[Chunk]:
        """Append a token, and return the chunks of text that it completes; it may be the last."""
        if self._forced:
            del self._forced[0]
        else:
            self._draws += 1
            if self._constraint is not None:
                self._constraint.take(token_id)
        text = self._answer.add(token_id)
        chunks = [Chunk(text, token_id)] if text else []
        left = self._limit - len(self.reply.token_ids)
        if self._constraint is not None and not self._forced and not self._answer.is_ended:
            self._forced = self._constraint.take_forced(left)
        if self._answer.is_ended or not left or self.has_nothing_to_add:
            chunks += self.complete()
        return chunks

    @property
    def has_nothing_to_add(self) -> bool:
        """Whether the schema or regular expression is complete."""
        return self._constraint is not None and self._constraint.is_complete and not self._forced

    def complete(self) -> list[Chunk]:
        """End the answer, and return the text that was held back."""
        self.is_over = True
        text = complete_answer(self._answer, self._constraint, self._sampling)
        return [Chunk(text, None)] if text else []

    def fail(self, error: Exception) -> None:
        """End the answer because of `error`."""
        self.error, self.is_over = error, True

    def keep_state(self, cache: KVCache) -> None:
        """Remember the keys and values of prompt and answer for later prompts."""
        assert self._content is not None
        self.state = CachedState(self._content.with_tokens(self.reply.token_ids), cache)
        self._engine.memory.keep_state(self.state, self._content, self.prompt.is_turn)

    @property
    def keeps_state(self) -> bool:
        """Whether anything would use the keys and values of the answer after it."""
        options = self._engine.cache_options
        is_bounded = options.max_kv_tokens is not None
        return not is_bounded and bool(
            self.prompt.is_turn or options.memory_bytes or options.folder
        )


def _free_pictures(prompt: Prompt) -> None:
    """Forget the pixels of pictures whose embeddings are known."""
    for medium in prompt.media:
        if isinstance(medium, Picture) and medium.image_embeds is not None:
            medium.forget_image()


def _encode_by_batch(
    steps: Generator[Progress, None, PreparedPrompt],
) -> Generator[None, None, PreparedPrompt]:
    """Run `steps`, and yield after each batch of tiles."""
    encoded = 0
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            ready: PreparedPrompt = end.value
            return ready
        if progress.encoded > encoded:
            encoded = progress.encoded
            yield
