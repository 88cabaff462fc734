"""An answer: its text as it is generated, and what it cost."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from mlx_smolvlm.errors import SmolVLMError, SmolVLMWarning
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.json_schema import parse_answer, to_jsonable
from mlx_smolvlm.generate.loop import StopText, generate_constrained_tokens, generate_tokens
from mlx_smolvlm.generate.sampling import Sampling, make_sampler
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.media.encode import Footage, Picture, Progress, encode, join_embeds
from mlx_smolvlm.reuse.content import CachedState, Content
from mlx_smolvlm.runtime import check_process


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it appears.

    `token_id` is the token that completed `text`; None for text that was held back to the
    end of the answer: a stop text might have followed, or the rest of a character.
    """

    text: str
    token_id: int | None


@dataclass
class Reply:
    """An answer with what it cost.

    `finish_reason` is "stop" (the model ended it, or a stop text was met),
    "length" (`max_tokens` or the context is used up) or "interrupted".
    `image_tiles` are of pictures, `video_frames` of videos; `encoded_tiles` is how many of
    both went through the encoder now. `cached_tokens` is how many of `prompt_tokens` were
    there already, from what was asked before.
    `time_to_first_token_s` counts from the call, so it includes the pictures;
    `prompt_tps` counts the decoder's part alone, without those tokens. `peak_memory_gb` is the
    most that MLX held, in 10**9 bytes. `parsed` is the value of an answer held to a schema, an
    instance if that is a pydantic model; None without a schema, or if the answer was cut.
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
    parsed: Any = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "parsed": to_jsonable(self.parsed)}


class PreparedPrompt(NamedTuple):
    """What the loop starts from: the prompt's content, the embeddings of what is new in it, and
    the cache of what is not."""

    content: Content
    inputs_embeds: mx.array
    cache: KVCache


class Answer:
    """An answer under way: token ids go in, text comes out; `reply` is the answer so far.

    The clock of the first token runs from here. `is_ended` says that no token may follow. The
    text is shown without its `lead`; None stands for any white space.

    Some characters take several tokens. Their text is shown once they are whole; what is left
    of one when the answer ends is U+FFFD, as the tokenizer decodes it.
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
        self._undecoded: list[int] = []  # the last token ids, whose text is not whole yet
        self._started = self._begun = self._first = time.perf_counter()
        self._prefilled = 0

    @property
    def is_cut(self) -> bool:
        """Whether a stop text ended it."""
        return self._stop_text.is_stopped

    def begin(self, prefilled: int) -> None:
        """The media are encoded and the decoder begins with so many tokens."""
        self._begun, self._prefilled = time.perf_counter(), prefilled

    def add(self, token_id: int) -> str:
        """The text that may be shown now that `token_id` has come."""
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
        """What of the text so far may be shown now; a stop text in it ends the answer."""
        text = self._stop_text.feed(text)
        if self._stop_text.is_stopped:
            self._end("stop")
        return self._show(text)

    def finish(self, reason: Literal["stop", "length"] = "length") -> str:
        """The text that was held back, once no more tokens come; `reason` says why they do not."""
        if not self.is_ended:
            self._end(reason)
        tokenizer = self._engine.prompt_builder.tokenizer
        text = self._feed(tokenizer.decode(self._undecoded, skip_special_tokens=False))
        return text + self._show(self._stop_text.flush())

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.is_ended, self.reply.finish_reason = True, reason

    def _show(self, text: str) -> str:
        """`text` joined to the reply, without the space after "Assistant:"."""
        if self._lead:
            text, self._lead = text[len(self._lead) :], self._lead[len(text) :]
        elif self._lead is None and not self.reply.text:
            text = text.lstrip()
        self.reply.text += text
        return text

    def _tick(self) -> None:
        """A token has come: set the times and the memory of the reply."""
        now, reply = time.perf_counter(), self.reply
        if not reply.token_ids:
            self._first = now
            reply.time_to_first_token_s = now - self._started
            reply.prompt_tps = self._prefilled / (now - self._begun)
        else:
            reply.generation_tps = len(reply.token_ids) / (now - self._first)
        reply.peak_memory_gb = mx.get_peak_memory() / 1e9


def prepare_answer(
    engine: Engine, prompt: Prompt, reply: Reply
) -> Generator[Progress, None, PreparedPrompt]:
    """Finds out what is there already, and encodes the media that are not, step by step.

    `reply` is told how much that was.
    """
    check_process()
    mx.reset_peak_memory()
    content = engine.describe_content(prompt)
    state, start = engine.memory.find_state(content, prompt.pins, prompt.state)
    spans = zip(prompt.media, content.spans, strict=True)
    todo = [medium for medium, span in spans if span.stop > start]
    engine.memory.fill_features(todo)
    with closing(encode(todo, engine.encoder, engine.config)) as steps:
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
    cache = engine.make_cache() if state is None else state.cache
    cache.trim(start)
    cache.pin(prompt.pins)
    return PreparedPrompt(content, embeds, cache)


class AnswerStream(Iterator[Chunk]):
    """Yields an answer's chunks; `reply` is the answer so far.

    Pictures and videos are encoded when the first chunk is asked for, or by `prepare`.
    After Ctrl-C, or when the caller stops early, `reply` holds what was said until then.
    `state` is a conversation's own, before the answer and then after it.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
        self._constraint = engine.constrainer(sampling) if sampling.is_constrained else None
        lead = None if self._constraint is None else self._constraint.lead
        self._answer = Answer(engine, prompt, sampling.stop, lead)
        self.reply, self.state = self._answer.reply, prompt.state
        self._engine, self._prompt, self._sampling = engine, prompt, sampling
        self._preparation = self._prepare()
        self._token_ids: Generator[int, None, None] | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def __next__(self) -> Chunk:
        """The next piece; no layer lies between this and the loop over tokens."""
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
            if text := self._complete():
                return Chunk(text, None)
            raise StopIteration

    def close(self) -> None:
        """Stop the answer here."""
        with self._lock_thread():
            self._end()

    @contextmanager
    def _lock_thread(self) -> Iterator[None]:
        """Refuse to do two things at once; one after another, threads may take turns.

        Raises:
            SmolVLMError: Another thread is in here.
        """
        if not self._lock.acquire(blocking=False):
            raise SmolVLMError(
                "this answer is being generated in another thread; wait until that is done, or "
                "use a stream or a conversation of its own in each thread"
            )
        try:
            yield
        finally:
            self._lock.release()

    def finish(self) -> Reply:
        """The whole answer, once it has been generated."""
        try:
            for _ in self:
                pass
        finally:
            self.close()
        return self.reply

    def prepare(self) -> Iterator[Progress]:
        """Decode and encode pictures and videos step by step, to show how far that is.

        Who does not go to its end leaves the rest to the first chunk.
        """
        while True:
            with self._lock_thread():
                step = next(self._preparation, None)
            if step is None:
                return
            yield step

    def _prepare(self) -> Generator[Progress, None, None]:
        self._ready = yield from prepare_answer(self._engine, self._prompt, self.reply)

    def _start(self) -> Generator[int, None, None]:
        """Prepare what is left to prepare, and start to generate token ids."""
        for _ in self._preparation:
            pass
        _, embeds, cache = self._ready
        self._answer.begin(embeds.shape[1])
        model, sampler = self._engine.model, make_sampler(self._sampling)
        limit = self._prompt.limit_tokens(self._engine.context_size, self._sampling.max_tokens)
        if self._constraint is None:
            return generate_tokens(model, embeds, cache, sampler, limit)
        return generate_constrained_tokens(model, embeds, cache, sampler, self._constraint, limit)

    def _end(self) -> None:
        """Generate no more; what has been computed is remembered."""
        if self._is_over:
            return
        self._is_over = True
        self._preparation.close()
        if self._token_ids is not None:
            self._token_ids.close()
            content, _, cache = self._ready
            self.state = CachedState(content.with_tokens(self.reply.token_ids), cache)
            self._engine.memory.keep_state(self.state, content, self._prompt.is_turn)

    def _complete(self) -> str:
        """Set why the answer ended, and its value; the text that was held back until now."""
        answer, constraint = self._answer, self._constraint
        whole = constraint is not None and constraint.is_complete and not answer.is_cut
        text = answer.finish("stop" if whole else "length")
        if whole:
            self.reply.parsed = parse_answer(self.reply.text, self._sampling.schema)
        return text
