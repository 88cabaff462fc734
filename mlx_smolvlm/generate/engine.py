"""The engine: model, prompt builder, memory and encoder, with which all answers are generated."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import ContextError, PromptError, SmolVLMWarning
from mlx_smolvlm.generate.grammar import Constrainer
from mlx_smolvlm.generate.memory_guard import NO_NAMES, MemoryGuard
from mlx_smolvlm.generate.memory_plan import Work
from mlx_smolvlm.kv.bounded import RECENT, SINKS
from mlx_smolvlm.kv.cache import NO_PINS, KVCache
from mlx_smolvlm.kv.options import DEFAULT_OPTIONS, CacheOptions
from mlx_smolvlm.media.encode import (
    TILE_BATCH,
    Footage,
    Medium,
    Picture,
    encode,
    join_embeds,
    order_media,
)
from mlx_smolvlm.model.model import Model, compile_encoder
from mlx_smolvlm.prompt.messages import Message, Request, VideoSource
from mlx_smolvlm.reuse.content import CachedState, Content, make_content
from mlx_smolvlm.reuse.memory import make_memory
from mlx_smolvlm.runtime import check_process

if TYPE_CHECKING:
    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.media.video import ClipPart
    from mlx_smolvlm.prompt.builder import PromptBuilder

ANSWER_SHARE = 8  # advice and summaries leave an eighth of the context for the answer


@dataclass(frozen=True)
class Prompt:
    """The input of one answer.

    Attributes:
        input_ids: Token ids (L,).
        media: The pictures and videos of its image placeholders, in order.
        state: The cached state of the conversation that the prompt belongs to, if any.
        is_turn: Whether a conversation keeps the state afterwards.
        pins: Positions of tokens that a bounded cache never drops.
    """

    input_ids: np.ndarray
    media: tuple[Medium, ...]
    state: CachedState | None = None
    is_turn: bool = False
    pins: np.ndarray = field(default_factory=lambda: NO_PINS)

    def limit_tokens(self, context: int, max_tokens: int) -> int:
        """Return the maximum length of the answer: `max_tokens`, or less if the context is full."""
        return min(max_tokens, context - self.input_ids.size)


class Engine:
    """A loaded checkpoint and everything that is needed to generate answers.

    Attributes:
        path: Folder of the checkpoint.
        adapter: Folder of the LoRA adapter; None without one.
        guard: Checks that answers fit into memory; None checks nothing.
        memory: Cached states of earlier prompts, and features of encoded media.
        encoder: The compiled function from tiles (N, H, W, 3) to `image_embeds` (N, I, D).
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        model: Model,
        prompt_builder: PromptBuilder,
        cache_options: CacheOptions = DEFAULT_OPTIONS,
        adapter: Path | None = None,
        guard: MemoryGuard | None = None,
    ) -> None:
        self.path, self.config, self.model = path, config, model
        self.prompt_builder, self.cache_options, self.adapter = (
            prompt_builder,
            cache_options,
            adapter,
        )
        self.guard = guard
        self.memory = make_memory(cache_options, path, config, adapter)
        self.encoder = compile_encoder(model)
        self._has_warned_of_videos = False

    @cached_property
    def constrainer(self) -> Constrainer:
        """Makes constraints for schemas and regular expressions; created on first use.

        Raises:
            ConstraintError: llguidance is not installed.
        """
        return Constrainer(self.prompt_builder)

    @cached_property
    def checkpoint_digest(self) -> str:
        """Digest of all files of the checkpoint and its adapter, remembered in the cache."""
        from mlx_smolvlm.reuse.disk import digest_checkpoint, find_memo

        return digest_checkpoint(self.path, find_memo(), self.adapter)

    @property
    def tile_batch(self) -> int:
        """Most tiles per call of the encoder."""
        return TILE_BATCH if self.guard is None else self.guard.setup.tile_batch

    def check_memory(
        self,
        prompt: Prompt,
        max_tokens: int,
        rows: int = 1,
        fixed: frozenset[str] = NO_NAMES,
    ) -> None:
        """Check that an answer fits into memory; drop work of earlier prompts to make it fit.

        Args:
            prompt: The prompt of the answer.
            max_tokens: Most tokens after the prompt, in all answers that are computed together.
            rows: Number of tokens whose logits are computed together.
            fixed: Arguments that a refusal must not name, as in `MemoryTerms`.

        Raises:
            MemoryLimitError: It does not fit.
        """
        if self.guard is None:
            return
        work = describe_work(prompt, max_tokens, rows)
        self.guard.check_answer(self.prompt_builder, prompt.media, work, fixed)
        self.model.prefill_chunk = self.guard.setup.prefill_chunk
        spare = self.guard.count_spare(work)
        if spare is not None:
            self.memory.shrink(spare)

    def fits_memory(self, prompt: Prompt, max_tokens: int, rows: int) -> bool:
        """Whether an answer keeps to the limit of memory; drop earlier work to make it fit.

        Arguments are as in `check_memory`. Without a limit, everything fits.
        """
        work = describe_work(prompt, max_tokens, rows)
        spare = None if self.guard is None else self.guard.count_spare(work)
        if spare is not None and spare >= 0:
            self.memory.shrink(spare)
        return spare is None or spare >= 0

    @property
    def context_size(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        return self.config.text.max_position_embeddings

    def open_media(self, request: Request, detail: Detail) -> tuple[Medium, ...]:
        """Open the media of `request`, in order. Frames of videos are chosen, but not decoded yet.

        Raises:
            MediaError: A picture or video cannot be opened.
        """
        if not request.images and not request.videos:
            return ()  # without importing Pillow
        from mlx_smolvlm.media.picture import open_image
        from mlx_smolvlm.media.tiles import compute_grid

        images = [open_image(source) for source in request.images]
        pictures = [
            Picture(one, compute_grid(one.size, self.config, detail), detail) for one in images
        ]
        if not request.videos:
            return tuple(pictures)
        from mlx_smolvlm.media.video import open_video

        self._warn_of_videos()
        clips = [open_video(source, self.config) for source in request.videos]
        return order_media(request.messages, pictures, [Footage(clip, clip) for clip in clips])

    def open_parts(self, video: VideoSource, seconds: float) -> Iterator[ClipPart]:
        """Open `video` in parts of `seconds`.

        Raises:
            ValueError: `seconds` is not above 0.
            MediaError: The video cannot be read.
        """
        from mlx_smolvlm.media.video import open_parts

        self._warn_of_videos()
        return open_parts(video, self.config, seconds)

    def make_prompt(
        self,
        messages: list[Message],
        media: Sequence[Medium],
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Turn messages without sources into `input_ids`.

        Args:
            messages: The messages.
            media: Pictures and videos in the order of their items.
            add_generation_prompt: Whether the prompt ends with the start of an answer.

        Raises:
            ContextError: The prompt is longer than the context.
            PromptError: The messages are malformed.
        """
        input_ids = self._input_ids(messages, media, add_generation_prompt)
        if input_ids.size >= self.context_size:
            raise ContextError(describe_overflow(self.prompt_builder, input_ids.size, media))
        prompt = Prompt(input_ids, tuple(media))
        limit = self.cache_options.max_kv_tokens
        if limit is None:
            return prompt
        return replace(
            prompt, pins=find_pinned_tokens(self.describe_content(prompt), self.config, limit)
        )

    def count_tokens(
        self, messages: list[Message], media: Sequence[Medium], add_generation_prompt: bool = True
    ) -> int:
        """Return the number of tokens of a prompt of any length; arguments as in `make_prompt`."""
        return self._input_ids(messages, media, add_generation_prompt).size

    def describe_content(self, prompt: Prompt) -> Content:
        """Return the content of `prompt`, for comparison with earlier prompts."""
        config = self.config
        return make_content(
            prompt.input_ids, prompt.media, config.image_token_id, config.image_seq_len
        )

    def encode(self, media: Sequence[Medium]) -> mx.array | None:
        """Return the `image_embeds` (N, I, D) of `media`, in order; None without media."""
        check_process()
        for _ in encode(media, self.encoder, self.config, self.tile_batch):
            pass
        return join_embeds(media)

    def make_cache(self) -> KVCache:
        """Return an empty cache, as `cache_options` describes it."""
        return self.model.make_cache(self.cache_options)

    def make_unbounded_cache(self) -> KVCache:
        """Return an empty cache that keeps every token, whatever `max_kv_tokens` is."""
        return self.model.make_cache(replace(self.cache_options, max_kv_tokens=None))

    def _input_ids(
        self, messages: list[Message], media: Sequence[Medium], add_generation_prompt: bool
    ) -> np.ndarray:
        grids = [one.grid for one in media if isinstance(one, Picture)]
        times = [one.times for one in media if isinstance(one, Footage)]
        return self.prompt_builder.build(messages, grids, add_generation_prompt, times)

    def _warn_of_videos(self) -> None:
        """Warn once if the checkpoint was not trained on videos."""
        if self.config.video is None and not self._has_warned_of_videos:
            self._has_warned_of_videos = True
            warnings.warn(
                f"{self.config.name} was not trained on videos; its answers about them are "
                "poor (SmolVLM2 was)",
                SmolVLMWarning,
                stacklevel=4,
            )


def describe_work(prompt: Prompt, max_tokens: int, rows: int = 1) -> Work:
    """Return what an answer to `prompt` consists of; arguments as in `Engine.check_memory`."""
    todo = [one for one in prompt.media if one.image_embeds is None]
    images = [one.image for one in todo if isinstance(one, Picture) and one.image is not None]
    tiles = sum(one.num_tiles for one in todo)
    return Work(
        tiles=tiles,
        encoded_tiles=sum(one.num_tiles for one in prompt.media) - tiles,
        pixels=sum(image.width * image.height for image in images),
        tokens=prompt.input_ids.size,
        max_tokens=max_tokens,
        rows=rows,
        has_video=any(isinstance(one, Footage) for one in todo),
    )


def describe_overflow(builder: PromptBuilder, length: int, media: Sequence[Medium]) -> str:
    """Return an error message: how many tokens each medium takes, and what would fit."""
    context = builder.config.text.max_position_embeddings
    pictures = [one for one in media if isinstance(one, Picture)]
    footage = [one for one in media if isinstance(one, Footage)]
    shares = []
    if pictures:
        tokens = sum(builder.count_image_tokens(picture.grid) for picture in pictures)
        shares.append(f"{len(pictures)} pictures: {tokens:,}")
    if footage:
        tokens = sum(builder.count_clip_tokens(one.times) for one in footage)
        frames = sum(one.num_tiles for one in footage)
        shares.append(f"{frames} frames of {len(footage)} videos: {tokens:,}")
    taken = f" ({'; '.join(shares)})" if shares else ""
    return (
        f"the prompt takes {length:,} tokens{taken} and the model's context is {context:,}; "
        f"{_advise(builder, length, pictures, footage)}"
    )


def _advise(
    builder: PromptBuilder, length: int, pictures: list[Picture], footage: list[Footage]
) -> str:
    """Return what the user can do about a prompt of `length` tokens."""
    if not footage:
        return "use detail 'low' or fewer pictures" if pictures else "shorten the text"
    context = builder.config.text.max_position_embeddings
    frames = sum(one.num_tiles for one in footage)
    taken = sum(builder.count_clip_tokens(one.times) for one in footage)
    fit = int((context - context // ANSWER_SHARE - (length - taken)) // (taken / frames))
    if fit < len(footage):
        return "ask about fewer or smaller pictures and videos, or shorten the text"
    times = [one.times.timestamps_s for one in footage]
    shown_s = sum(time[-1] - time[0] for time in times) * frames / max(1, frames - len(times))
    fps = fit / shown_s
    rates = [one.clip.rate for one in footage if one.clip is not None]
    part_s = fit / max(rates, default=frames / shown_s)
    return (
        f"{fit} frames would fit: an fps of {_round_down(fps)}, "
        f"a max_frames of {fit // len(footage)}, "
        f"or parts of {_round_down(part_s)} s, one after the other (--chunk)"
    )


def _round_down(value: float) -> str:
    """Format `value` rounded down to two significant digits or an integer."""
    digits = 1
    while value < 10:
        value, digits = value * 10, digits * 10
    return f"{int(value) / digits:g}"


def find_pinned_tokens(content: Content, config: Config, max_kv_tokens: int) -> np.ndarray:
    """Return the positions of the tokens of `content` that a bounded cache never drops.

    These are the tokens of the first message, unless it fills more than half of the cache, and
    those of all pictures and videos.

    Args:
        content: The content of a prompt.
        config: The configuration of the checkpoint.
        max_kv_tokens: The size of the cache, in tokens.

    Returns:
        Sorted positions, integers.

    Raises:
        PromptError: They do not fit into the cache.
    """
    ids = content.ids
    ends = np.flatnonzero(np.isin(ids, config.eos_token_ids))
    first = int(ends[0]) + 1 if ends.size else 0
    parts = [np.arange(first if first <= max_kv_tokens // 2 else 0)]
    for span in content.spans:  # including the tokens before and after it
        parts.append(np.arange(max(0, span.start - 2), min(span.stop + 1, ids.size)))
    pins: np.ndarray = np.unique(np.concatenate([np.arange(SINKS), *parts]))
    if pins.size > max_kv_tokens - RECENT:
        raise PromptError(
            f"the pictures, the videos and the start of the prompt take {pins.size:,} tokens, and "
            f"max_kv_tokens is {max_kv_tokens:,}; set it to {pins.size + RECENT:,} or more, or "
            "use detail 'low', fewer pictures or fewer frames"
        )
    if ids.size > max_kv_tokens:
        warnings.warn(
            f"the prompt is longer than max_kv_tokens, {max_kv_tokens:,}: the oldest "
            "text after the first message is dropped",
            SmolVLMWarning,
            stacklevel=4,
        )
    return pins
