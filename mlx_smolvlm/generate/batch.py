"""Generates answers to independent prompts together, one token of each per step.

Answers join and leave between steps, each with its own media, sampling and statistics. How, and
why so: docs/decisions/batch.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.batched_answer import BatchedAnswer, PrefilledPrompt
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.generate.stream import Chunk
from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.kv.cache import round_up
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.text import Placement
from mlx_smolvlm.runtime import take_lock

MAX_ROWS = 8  # answers generated together, by default
CONTEXTS = 2  # size of the cache, as a multiple of the context, by default


@dataclass(frozen=True)
class Update:
    """What a step brought for one answer.

    Attributes:
        answer: The answer.
        chunk: New text; None for an end without any.
        is_over: Whether this is the last update of the answer.
    """

    answer: BatchedAnswer
    chunk: Chunk | None
    is_over: bool


class AnswerBatch:
    """Answers that are generated together. Each gets the tokens that it would get alone.

    `add` and `cancel` may be called by any thread, `step` and `close` by one at a time.

    Args:
        engine: The engine.
        max_rows: Largest number of answers to generate together.
        max_tokens: Largest number of tokens in the cache, with the padding of shorter rows;
            at least a context. None means two contexts.
    """

    def __init__(
        self, engine: Engine, *, max_rows: int = MAX_ROWS, max_tokens: int | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows!r}; it must be 1 or above")
        context = engine.context_size
        if max_tokens is not None and max_tokens < context:
            raise ValueError(
                f"max_tokens is {max_tokens!r}; it must be {context:,} or above, so that an answer "
                "of the length of the model's context fits"
            )
        self.max_rows = max_rows
        self._max_tokens = max(max_tokens or CONTEXTS * context, round_up(context))
        self._engine = engine
        self._waiting: deque[BatchedAnswer] = deque()
        self._preparing: tuple[BatchedAnswer, Generator[None, None, PrefilledPrompt]] | None = None
        self._rows: list[BatchedAnswer] = []
        self._cache = BatchedKVCache(
            len(engine.model.text_model.layers), engine.cache_options.make_storage()
        )
        self._drawn = mx.zeros(0, mx.uint32)  # next token ids of the rows, (B,)
        self._updates: list[Update] = []
        self._lock = threading.Lock()

    @property
    def num_answers(self) -> int:
        """Number of answers that are not over: those that wait, are prepared or generated."""
        return len(self._waiting) + (self._preparing is not None) + len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Number of answers whose preparation has not begun."""
        return len(self._waiting)

    def add(self, prompt: Prompt, sampling: Sampling) -> BatchedAnswer:
        """Let an answer wait for its turn, and return it.

        Raises:
            ConstraintError: The answer has a schema or regular expression, and llguidance is not
                installed.
        """
        answer = BatchedAnswer(self._engine, prompt, sampling)
        self._waiting.append(answer)
        return answer

    def cancel(self, answer: BatchedAnswer) -> None:
        """End `answer` at the next step, as interrupted, with its text so far."""
        answer.is_cancelled = True

    def fill(self) -> None:
        """Prepare all waiting prompts for which there is room.

        For a given list of prompts this is faster than `step` alone, which prepares them while the
        first few are generated. Ends and text are in the updates of the next step.
        """
        with self._lock_thread():
            self._drop_cancelled()
            while self._prepare():
                pass

    def step(self) -> list[Update]:
        """Prepare a little of a waiting prompt, and generate a token of each other answer.

        The answers are held up by at most one batch of tiles or one chunk of a prompt. An exception
        in the work on one prompt ends that answer, as its `error`; the others go on. After an
        exception in the work on all of them, which is raised, close the batch.

        Returns:
            New text and ends of answers.
        """
        with self._lock_thread():
            self._drop_cancelled()
            self._prepare()
            if self._rows:
                self._decode()
            updates, self._updates = self._updates, []
            return updates

    def close(self) -> None:
        """End all answers, as interrupted, and free the cache."""
        with self._lock_thread():
            for answer in [*self._waiting, *self._rows]:
                answer.is_cancelled = answer.is_over = True
            if self._preparing is not None:
                self._preparing[0].is_cancelled = self._preparing[0].is_over = True
                self._preparing[1].close()
            self._waiting.clear()
            self._rows, self._preparing, self._updates = [], None, []
            self._drawn = self._drawn[:0]
            self._cache = BatchedKVCache(len(self._cache.buffers), self._cache.storage)

    def _lock_thread(self) -> AbstractContextManager[None]:
        """Return a lock on this batch; a SmolVLMError if another thread uses it."""
        return take_lock(self._lock, "another thread runs a step of this batch")

    def _prepare(self) -> bool:
        """Do the next piece of work on a new prompt; return whether there was any to do."""
        if self._preparing is None:
            if not self._waiting or not self._fits(self._waiting[0]):
                return False
            answer = self._waiting.popleft()
            self._preparing = answer, answer.prepare()
        answer, steps = self._preparing
        try:
            next(steps)
        except StopIteration as end:
            self._preparing = None
            self._join(answer, end.value)
        except Exception as error:
            self._preparing = None
            answer.fail(error)
            self._report(answer, [])
        return True

    def _fits(self, answer: BatchedAnswer) -> bool:
        """Whether there is room for `answer` beside the present ones."""
        rows = [*self._rows, answer]
        tokens = len(rows) * max(round_up(row.reserved_tokens) for row in rows)
        is_allowed = len(rows) <= self.max_rows and self._can_hold(tokens, rows)
        return is_allowed or len(rows) == 1

    def _can_hold(self, tokens: int, rows: list[BatchedAnswer]) -> bool:
        """Whether `tokens` keep to the limit of the cache, and to that of memory if there is one.

        Work of earlier prompts is dropped to make them fit.
        """
        if tokens > self._max_tokens:
            return False
        return self._engine.fits_memory(rows[-1].prompt, tokens, len(rows))

    def _join(self, answer: BatchedAnswer, ready: PrefilledPrompt) -> None:
        """Make a prepared answer the last row, and draw its first token."""
        if answer.has_nothing_to_add:  # an empty text matches the regular expression alone
            self._report(answer, answer.complete())
            return
        try:
            token_id = answer.draw(ready.logits, 0)
        except Exception as error:
            answer.fail(error)
            self._report(answer, [])
            return
        self._cache.add(ready.cache)
        self._rows.append(answer)
        self._drawn = mx.concatenate([self._drawn, token_id.astype(mx.uint32)])

    def _decode(self) -> None:
        """Give each answer its next token, and begin to compute the ones after."""
        self._make_room()
        # Unless a token decides what comes next, the device is already busy while it is read.
        is_early = not any(row.must_wait for row in self._rows)
        drawn = self._drawn
        if is_early:
            self._drawn = self._draw_next(drawn, ahead=1)
        for row, token_id in zip(self._rows, np.array(drawn).tolist(), strict=True):
            self._report(row, self._take(row, token_id))
        self._remove([number for number, row in enumerate(self._rows) if row.is_over])
        if not is_early and self._rows:
            self._drawn = self._draw_next(self._drawn, ahead=0)

    def _take(self, row: BatchedAnswer, token_id: int) -> list[Chunk]:
        """Append a token to `row`, unless it has failed, and return the new text."""
        try:
            return [] if row.is_over else row.take(token_id)
        except Exception as error:
            row.fail(error)
            return []

    def _draw_next(self, token_ids: mx.array, ahead: int) -> mx.array:
        """Feed `token_ids` (B,), and return the token ids (B,) drawn after them."""
        logits = step_rows(self._engine.model, self._cache, token_ids)
        if all(row.is_plain for row in self._rows):
            drawn = mx.argmax(logits, axis=-1)
        else:
            drawn = mx.concatenate(
                [self._draw(row, logits[n], ahead) for n, row in enumerate(self._rows)]
            )
        mx.async_eval(drawn)
        return drawn

    def _draw(self, row: BatchedAnswer, logits: mx.array, ahead: int) -> mx.array:
        """Return the next token id (1,) of `row`; if that fails, any, and the answer ends."""
        try:
            return row.draw(logits, ahead).astype(mx.uint32)
        except Exception as error:
            row.fail(error)
            return mx.zeros(1, mx.uint32)

    def _report(self, answer: BatchedAnswer, chunks: list[Chunk]) -> None:
        """Add updates about new text of `answer` and its end."""
        updates = [Update(answer, chunk, False) for chunk in chunks]
        if answer.is_over:
            last = chunks[-1] if chunks else None
            updates[-1:] = [Update(answer, last, True)]
        self._updates += updates

    def _remove(self, numbers: list[int]) -> None:
        """Remove rows whose answers are over, and remember their keys and values."""
        order = list(range(len(self._rows)))
        for number in reversed(numbers):
            row = self._rows[number]
            if row.error is None and row.keeps_state:
                row.keep_state(self._cache.copy_row(number))
            self._cache.remove(number)
            self._rows[number], order[number] = self._rows[-1], order[-1]  # as the cache does
            del self._rows[-1], order[-1]
        if numbers:
            self._drawn = self._drawn[mx.array(order, mx.uint32)]

    def _make_room(self) -> None:
        """Let the answers that came last wait again, if the cache would become too large."""
        rows = self._rows
        while len(rows) > 1:
            tokens = len(rows) * round_up(self._cache.longest + 1)
            if tokens <= self._cache.capacity or self._can_hold(tokens, rows):
                return
            self._waiting.appendleft(rows.pop())
            self._cache.remove(len(rows))
            self._drawn = self._drawn[: len(rows)]

    def _drop_cancelled(self) -> None:
        """End the answers that were cancelled since the last step."""
        waiting = list(self._waiting)  # at once, since other threads may add to it
        cancelled = [answer for answer in waiting if answer.is_cancelled]
        for answer in cancelled:
            self._waiting.remove(answer)
        if self._preparing is not None and self._preparing[0].is_cancelled:
            self._preparing[1].close()
            cancelled.append(self._preparing[0])
            self._preparing = None
        numbers = [number for number, row in enumerate(self._rows) if row.is_cancelled]
        cancelled += [self._rows[number] for number in numbers]
        for answer in cancelled:
            answer.is_over = True
            self._report(answer, [])
        self._remove(numbers)


def step_rows(model: Model, cache: BatchedKVCache, token_ids: mx.array) -> mx.array:
    """Feed one token of each row, `token_ids` (B,), and return the `logits` (B, vocabulary)."""
    cache.reserve()
    placement = Placement(cache.lengths, cache.make_mask())
    embeds: mx.array = model.text_model.embed_tokens(token_ids)[None]  # (1, B, D)
    return model.head(model.text_model(embeds, cache, placement)[0])
