"""An answer: its text as it is generated, and what it cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.errors import SmolVLMWarning
from mlx_smolvlm.generate import StopText, tokens
from mlx_smolvlm.media import Footage, Medium, Picture, Progress, encode, joined
from mlx_smolvlm.reuse import Content, State
from mlx_smolvlm.sampling import Sampling, make_sampler

if TYPE_CHECKING:
    from mlx_smolvlm.smolvlm import SmolVLM


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it appears.

    `token_id` is the token that completed `text`; None for text that was held
    back in case a stop text followed.
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
    `prompt_tps` counts the decoder's part alone, without those tokens. `peak_memory_gb` is the most
    that MLX held, in 10**9 bytes.
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

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prompt:
    """What an answer needs.

    Attributes:
        input_ids: (L,).
        media: What its placeholders stand for, in order.
        state: What a conversation holds already.
        is_turn: Whether a conversation keeps the state afterwards.
    """

    input_ids: np.ndarray
    media: tuple[Medium, ...]
    state: State | None = None
    is_turn: bool = False


class Ready(NamedTuple):
    """What the loop starts from: the prompt's content, the embeddings of what is new in it, and
    the cache of what is not."""

    content: Content
    inputs_embeds: mx.array
    cache: KVCache


class AnswerStream(Iterator[Chunk]):
    """Yields an answer's chunks; `reply` is the answer so far.

    Pictures and videos are encoded when the first chunk is asked for, or by `prepare`.
    After Ctrl-C, or when the caller stops early, `reply` holds what was said until then.
    `state` is a conversation's own, before the answer and then after it.
    """

    def __init__(self, vlm: SmolVLM, prompt: Prompt, sampling: Sampling) -> None:
        tiles = [(isinstance(one, Picture), one.num_tiles) for one in prompt.media]
        self.reply = Reply(
            prompt_tokens=prompt.input_ids.size,
            image_tiles=sum(count for is_picture, count in tiles if is_picture),
            video_frames=sum(count for is_picture, count in tiles if not is_picture),
        )
        self.state = prompt.state
        self._vlm, self._prompt, self._sampling = vlm, prompt, sampling
        self._started = time.perf_counter()
        self._preparation = self._prepare()
        self._chunks = self._generate()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stop the answer here."""
        self._preparation.close()
        self._chunks.close()

    def finished(self) -> Reply:
        """The whole answer, once it has been generated."""
        for _ in self:
            pass
        return self.reply

    def prepare(self) -> Iterator[Progress]:
        """Decode and encode pictures and videos step by step, to show how far that is.

        Who does not go to its end leaves the rest to the first chunk.
        """
        return self._preparation

    def _prepare(self) -> Generator[Progress, None, None]:
        """Find out what is there already, and encode the media that are not."""
        mx.reset_peak_memory()
        vlm, media = self._vlm, self._prompt.media
        content = vlm.content_of(self._prompt)
        state, start = vlm.memory.recall(content, self.state)
        todo = [one for one, span in zip(media, content.spans, strict=True) if span.stop > start]
        vlm.memory.lend_features(todo)
        for step in encode(todo, vlm.encoder, vlm.config):
            self.reply.encoded_tiles = step.encoded
            yield step
        vlm.memory.keep_features(todo)
        for medium in todo:
            if isinstance(medium, Footage) and medium.clip is not None:
                for note in medium.clip.notes:
                    warnings.warn(note, SmolVLMWarning, stacklevel=2)
        embeds = vlm.model.embed(self._prompt.input_ids[start:], joined(todo))
        self.reply.cached_tokens = start
        cache = vlm.model.make_cache() if state is None else state.cache
        cache.trim(start)
        self._ready = Ready(content, embeds, cache)

    def _generate(self) -> Generator[Chunk, None, None]:
        """The chunks, with `reply` kept up to date before each."""
        text = StopText(self._sampling.stop)
        for token_id, piece in self._decode():
            shown = text.feed(piece)
            if not self.reply.text:
                shown = shown.lstrip()  # the space after "Assistant:"
            self.reply.text += shown
            if text.stopped:
                self.reply.finish_reason = "stop"
            if shown:
                yield Chunk(shown, token_id)
            if text.stopped:
                return
        rest = text.flush()
        if rest:
            self.reply.text += rest
            yield Chunk(rest, None)

    def _decode(self) -> Iterator[tuple[int, str]]:
        """Token ids with the text that each completes, up to the end of the answer."""
        from tokenizers.decoders import DecodeStream

        vlm, reply = self._vlm, self.reply
        decoder, tokenizer = DecodeStream(skip_special_tokens=False), vlm.prompt_builder.tokenizer
        for token_id in self._token_ids():
            reply.token_ids.append(token_id)
            reply.generation_tokens += 1
            if token_id in vlm.config.eos_token_ids:
                reply.finish_reason = "stop"
                return
            if token_id not in vlm.hidden_token_ids:
                yield token_id, decoder.step(tokenizer, token_id) or ""
        reply.finish_reason = "length"

    def _token_ids(self) -> Iterator[int]:
        """Token ids of the answer, with the clocks of `reply`."""
        vlm, prompt, reply = self._vlm, self._prompt, self.reply
        for _ in self._preparation:
            pass
        encoded = time.perf_counter()
        content, embeds, cache = self._ready
        room = vlm.config.text.max_position_embeddings - prompt.input_ids.size
        limit = min(self._sampling.max_tokens, room)
        sampler, first = make_sampler(self._sampling), 0.0
        try:
            for count, token_id in enumerate(tokens(vlm.model, embeds, cache, sampler, limit)):
                now = time.perf_counter()
                if count == 0:
                    first = now
                    reply.time_to_first_token_s = first - self._started
                    reply.prompt_tps = embeds.shape[1] / (first - encoded)
                else:
                    reply.generation_tps = count / (now - first)
                reply.peak_memory_gb = mx.get_peak_memory() / 1e9
                yield token_id
        finally:
            self.state = State(content.followed_by(reply.token_ids), cache)
            vlm.memory.remember(self.state, content, prompt.is_turn)
