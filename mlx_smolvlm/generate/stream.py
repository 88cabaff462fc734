"""Generates one answer as a stream of text, with statistics."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from mlx_smolvlm.errors import SmolVLMWarning
from mlx_smolvlm.generate.draft import Drafter, make_drafter
from mlx_smolvlm.generate.draft_loop import (
    generate_drafted_constrained_tokens,
    generate_drafted_tokens,
)
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.json_schema import parse_answer, to_jsonable
from mlx_smolvlm.generate.loop import StopText, generate_constrained_tokens, generate_tokens
from mlx_smolvlm.generate.sampling import Sampling, make_sampler
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.media.encode import Footage, Picture, Progress, encode, join_embeds
from mlx_smolvlm.reuse.content import CachedState, Content
from mlx_smolvlm.runtime import check_process, take_lock


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: The text.
        token_id: The token that completed `text`. None for text that was held back until the end
            of the answer, as the possible beginning of a stop text or of a character.
    """

    text: str
    token_id: int | None


@dataclass
class Reply:
    """An answer and its statistics.

    Attributes:
        text: The text of the answer.
        token_ids: Its tokens, including an end token.
        finish_reason: "stop" (an end token or a stop text ended the answer, or it completes a
            schema or regular expression), "length" (`max_tokens` or the end of the context was
            reached) or "interrupted".
        prompt_tokens: Number of tokens of the prompt.
        image_tiles: Number of tiles of its pictures.
        video_frames: Number of frames of its videos.
        encoded_tiles: Number of tiles and frames that the vision encoder encoded for this answer.
        cached_tokens: Number of prompt tokens whose keys and values were reused.
        generation_tokens: Number of tokens of the answer.
        prompt_tps: Speed of the prefill in tokens per second, without reused tokens.
        generation_tps: Speed of the generation in tokens per second.
        time_to_first_token_s: Seconds from the call to the first token, media included.
        peak_memory_gb: Peak of the memory that MLX allocated, in 10**9 bytes.
        drafted_tokens: Number of tokens of the answer that were guessed; see `Sampling.draft`.
        accepted_tokens: Number of those that were right, each of which saved a forward pass.
        parsed: The value of an answer with a schema, an instance if that is a pydantic model.
            None without a schema, or if the answer is incomplete. `finish_reason` says why it is:
            "length", "interrupted", or "stop" if a stop text ended it.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "interrupted"] = "interrupted"
    prompt_tokens: int = 0
    image_tiles: int = 0
    video_frames: int = 0
    encoded_tiles: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    time_to_first_token_s: float = 0.0
    peak_memory_gb: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    parsed: Any = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values for JSON."""
        return {**asdict(self), "parsed": to_jsonable(self.parsed)}


class PreparedPrompt(NamedTuple):
    """A prompt that is ready for prefill.

    Attributes:
        content: The content of the prompt.
        inputs_embeds: Embeddings of the tokens that are not in the cache, (1, L, D).
        cache: Keys and values of the tokens before them.
    """

    content: Content
    inputs_embeds: mx.array
    cache: KVCache


class Answer:
    """Turns the tokens of an answer into text, and keeps its statistics.

    The time to the first token is measured from the creation of this object. A character of
    several tokens is shown when it is complete. An incomplete one at the end of the answer becomes
    U+FFFD, as the tokenizer decodes it.

    Args:
        engine: The engine.
        prompt: The prompt of the answer.
        stop: Texts that end the answer.
        lead: Text to remove from the start of the answer; None removes any white space.

    Attributes:
        reply: The answer so far.
        is_ended: Whether the answer has ended, so that no token may follow.
    """

    def __init__(
        self, engine: Engine, prompt: Prompt, stop: Sequence[str], lead: str | None = None
    ) -> None:
        from tokenizers.decoders import DecodeStream

        tiles = [(isinstance(one, Picture), one.num_tiles) for one in prompt.media]
        self.reply = Reply(
            prompt_tokens=prompt.input_ids.size,
            image_tiles=sum(count for is_picture, count in tiles if is_picture),
            video_frames=sum(count for is_picture, count in tiles if not is_picture),
        )
        self.is_ended = False
        self._engine, self._stop_text, self._lead = engine, StopText(stop), lead
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._undecoded: list[int] = []  # token ids of an incomplete character
        self._start_s = self._prefill_start_s = self._first_token_s = time.perf_counter()
        self._prefilled = 0

    @property
    def is_cut(self) -> bool:
        """Whether a stop text ended the answer."""
        return self._stop_text.is_stopped

    def begin(self, prefilled: int) -> None:
        """Start the clock of the prefill, in which `prefilled` tokens go through the decoder."""
        self._prefill_start_s, self._prefilled = time.perf_counter(), prefilled

    def end_prefill(self) -> None:
        """Stop the clock of the prefill, if the first token comes later than its end."""
        self.reply.prompt_tps = self._prefilled / (time.perf_counter() - self._prefill_start_s)

    def add(self, token_id: int) -> str:
        """Append a token, and return the text that may be shown now."""
        engine, reply = self._engine, self.reply
        self._tick()
        reply.token_ids.append(token_id)
        reply.generation_tokens += 1
        if token_id in engine.config.eos_token_ids:
            self._end("stop")
            return ""
        if token_id in engine.prompt_builder.framing_token_ids:
            return ""
        self._undecoded.append(token_id)
        text = self._decoder.step(engine.prompt_builder.tokenizer, token_id)
        if text is None:
            return ""
        self._undecoded = []
        return self._feed(text)

    def _feed(self, text: str) -> str:
        """Append text, and return the text that may be shown now; a stop text ends the answer."""
        text = self._stop_text.feed(text)
        if self._stop_text.is_stopped:
            self._end("stop")
        return self._show(text)

    def finish(self, reason: Literal["stop", "length"] = "length") -> str:
        """End the answer for `reason`, if it has not ended, and return the text held back."""
        if not self.is_ended:
            self._end(reason)
        tokenizer = self._engine.prompt_builder.tokenizer
        text = self._feed(tokenizer.decode(self._undecoded, skip_special_tokens=False))
        return text + self._show(self._stop_text.flush())

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.is_ended, self.reply.finish_reason = True, reason

    def _show(self, text: str) -> str:
        """Append `text` to the reply and return it, without the white space before the answer."""
        if self._lead:
            text, self._lead = text[len(self._lead) :], self._lead[len(text) :]
        elif self._lead is None and not self.reply.text:
            text = text.lstrip()
        self.reply.text += text
        return text

    def _tick(self) -> None:
        """Update the times and the memory of the reply at a new token."""
        now, reply = time.perf_counter(), self.reply
        if not reply.token_ids:
            self._first_token_s = now
            reply.time_to_first_token_s = now - self._start_s
            if not reply.prompt_tps:
                self.end_prefill()
        else:
            reply.generation_tps = len(reply.token_ids) / (now - self._first_token_s)
        reply.peak_memory_gb = mx.get_peak_memory() / 1e9


def prepare_answer(
    engine: Engine, prompt: Prompt, reply: Reply, empty: KVCache | None = None
) -> Generator[Progress, None, PreparedPrompt]:
    """Look up a cached state for `prompt`, and encode its new media step by step.

    Args:
        engine: The engine.
        prompt: The prompt.
        reply: Its `encoded_tiles` and `cached_tokens` are set.
        empty: A cache to begin with instead of a cached state.

    Yields:
        The progress of the encoding.

    Returns:
        The prompt, ready for prefill.
    """
    check_process()
    mx.reset_peak_memory()
    content = engine.describe_content(prompt)
    state, start = None, 0
    if empty is None:
        state, start = engine.memory.find_state(content, prompt.pins, prompt.state)
    spans = zip(prompt.media, content.spans, strict=True)
    todo = [medium for medium, span in spans if span.stop > start]
    engine.memory.fill_features(todo)
    with closing(encode(todo, engine.encoder, engine.config, engine.tile_batch)) as steps:
        for step in steps:
            reply.encoded_tiles = step.encoded
            yield step
    engine.memory.keep_features(todo)
    for medium in todo:
        if isinstance(medium, Footage) and medium.clip is not None:
            for note in medium.clip.notes:
                warnings.warn(note, SmolVLMWarning, stacklevel=2)
    embeds = engine.model.embed(prompt.input_ids[start:], join_embeds(todo))
    reply.cached_tokens = start
    cache = (empty or engine.make_cache()) if state is None else state.cache
    cache.trim(start)
    cache.pin(prompt.pins)
    return PreparedPrompt(content, embeds, cache)


def complete_answer(answer: Answer, constraint: Constraint | None, sampling: Sampling) -> str:
    """Set the finish reason and the parsed value; return the text that was held back."""
    is_whole = constraint is not None and constraint.is_complete and not answer.is_cut
    text = answer.finish("stop" if is_whole else "length")
    if is_whole:
        answer.reply.parsed = parse_answer(answer.reply.text, sampling.schema)
    return text


class AnswerStream(Iterator[Chunk]):
    """An iterator over the chunks of an answer.

    Pictures and videos are encoded before the first chunk, or by `prepare`. If Ctrl-C or the
    caller stops the answer early, `reply` has the text so far.

    Attributes:
        reply: The answer so far.
        state: The cached state of the conversation: before the answer, and after it once the
            answer has ended. None outside of a conversation, before the answer.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
        self._limit = limit = prompt.limit_tokens(engine.context_size, sampling.max_tokens)
        engine.check_memory(prompt, limit)
        self._constraint = engine.constrainer(sampling) if sampling.is_constrained else None
        lead = None if self._constraint is None else self._constraint.lead
        self._answer = Answer(engine, prompt, sampling.stop, lead)
        self.reply, self.state = self._answer.reply, prompt.state
        self._engine, self._prompt, self._sampling = engine, prompt, sampling
        self._preparation = self._prepare()
        self._token_ids: Generator[int, None, None] | None = None
        self._drafter: Drafter | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def __next__(self) -> Chunk:
        """Return the next chunk."""
        answer = self._answer
        with self._lock_thread():
            if self._is_over:
                raise StopIteration
            try:
                if self._token_ids is None:
                    self._token_ids = self._start()
                while not answer.is_ended and (token_id := next(self._token_ids, None)) is not None:
                    if text := answer.add(token_id):
                        return Chunk(text, token_id)
            except BaseException:
                self._end()
                raise
            self._end()
            if text := complete_answer(answer, self._constraint, self._sampling):
                return Chunk(text, None)
            raise StopIteration

    def close(self) -> None:
        """Stop the answer."""
        with self._lock_thread():
            self._end()

    def _lock_thread(self) -> AbstractContextManager[None]:
        """Return a lock on this stream; a SmolVLMError if another thread uses it."""
        return take_lock(
            self._lock,
            "this answer is being generated in another thread; wait until that is done, or "
            "use a separate stream or conversation in each thread",
        )

    def finish(self) -> Reply:
        """Generate the rest of the answer, and return the whole reply."""
        try:
            for _ in self:
                pass
        finally:
            self.close()
        return self.reply

    def prepare(self) -> Iterator[Progress]:
        """Decode and encode pictures and videos step by step, and yield the progress.

        If you stop early, the first chunk does the rest.
        """
        while True:
            with self._lock_thread():
                try:
                    step = next(self._preparation, None)
                except BaseException:
                    self._end()
                    raise
            if step is None:
                return
            yield step

    def _prepare(self) -> Generator[Progress, None, None]:
        self._ready = yield from prepare_answer(self._engine, self._prompt, self.reply)

    def _start(self) -> Generator[int, None, None]:
        """Finish the preparation, and return the generator of token ids."""
        for _ in self._preparation:
            pass
        _, embeds, cache = self._ready
        self._answer.begin(embeds.shape[1])
        model, sampling, constraint = self._engine.model, self._sampling, self._constraint
        limit = self._limit
        drafter = make_drafter(self._engine, self._prompt.input_ids, sampling)
        self._drafter = drafter
        if drafter is not None and constraint is None:
            return generate_drafted_tokens(model, embeds, cache, drafter, limit)
        if drafter is not None and constraint is not None:
            return generate_drafted_constrained_tokens(
                model, embeds, cache, drafter, constraint, limit
            )
        sampler = make_sampler(sampling)
        if constraint is None:
            return generate_tokens(model, embeds, cache, sampler, limit)
        return generate_constrained_tokens(model, embeds, cache, sampler, constraint, limit)

    def _end(self) -> None:
        """Stop generating, and remember the state for later prompts."""
        if self._is_over:
            return
        self._is_over = True
        self._preparation.close()
        if self._token_ids is not None:
            self._token_ids.close()
            if self._drafter is not None:
                self.reply.drafted_tokens = self._drafter.drafted
                self.reply.accepted_tokens = self._drafter.accepted
            content, _, cache = self._ready
            self.state = CachedState(content.with_tokens(self.reply.token_ids), cache)
            self._engine.memory.keep_state(self.state, content, self._prompt.is_turn)
