"""What every answer is generated with: model, prompt builder, memory and encoder."""

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
from mlx_smolvlm.errors import ContextError, SmolVLMWarning
from mlx_smolvlm.generate.grammar import Constrainer
from mlx_smolvlm.generate.limits import pinned_tokens, too_long
from mlx_smolvlm.kv.cache import NONE, KVCache
from mlx_smolvlm.kv.options import PLAIN, CacheOptions
from mlx_smolvlm.media.encode import Footage, Medium, Picture, encode, in_order, joined
from mlx_smolvlm.model.model import Model, compile_encoder
from mlx_smolvlm.process import check_process
from mlx_smolvlm.prompt.messages import Message, Request, VideoSource
from mlx_smolvlm.reuse.content import Content, State, content_of
from mlx_smolvlm.reuse.memory import make_memory

if TYPE_CHECKING:
    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.media.video import ClipPart
    from mlx_smolvlm.prompt.builder import PromptBuilder


@dataclass(frozen=True)
class Prompt:
    """The input of one answer.

    Attributes:
        input_ids: (L,).
        media: The pictures and videos that its placeholders stand for, in order.
        state: The cached state of the conversation that the prompt belongs to, if any.
        is_turn: Whether a conversation keeps the state afterwards.
        pins: Positions of tokens that a bounded cache never drops.
    """

    input_ids: np.ndarray
    media: tuple[Medium, ...]
    state: State | None = None
    is_turn: bool = False
    pins: np.ndarray = field(default_factory=lambda: NONE)

    def room(self, context: int, max_tokens: int) -> int:
        """Number of tokens that its answer may take: `max_tokens`, or what the context leaves."""
        return min(max_tokens, context - self.input_ids.size)


class Engine:
    """A loaded checkpoint with all that answers are generated with.

    Attributes:
        path: Folder of the checkpoint.
        adapter: Folder of the LoRA adapter; None without one.
        memory: Cached states of earlier prompts, and features of encoded media.
        encoder: The compiled function from tiles (N, H, W, 3) to `image_embeds` (N, I, D).
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        model: Model,
        prompt_builder: PromptBuilder,
        cache_options: CacheOptions = PLAIN,
        adapter: Path | None = None,
    ) -> None:
        self.path, self.config, self.model = path, config, model
        self.prompt_builder, self.cache_options, self.adapter = (
            prompt_builder,
            cache_options,
            adapter,
        )
        self.memory = make_memory(cache_options, path, config, adapter)
        self.encoder = compile_encoder(model)
        self._has_warned_of_videos = False

    @cached_property
    def constrainer(self) -> Constrainer:
        """Makes the constraints that hold answers to schemas; made when first used.

        Raises:
            ConstraintError: llguidance is not installed.
        """
        return Constrainer(self.prompt_builder)

    @cached_property
    def checkpoint_digest(self) -> str:
        """Digest of the files of the checkpoint and of its adapter; reads them all."""
        from mlx_smolvlm.reuse.disk import checkpoint_digest

        return checkpoint_digest(self.path, adapter=self.adapter)

    @property
    def context_size(self) -> int:
        """The most tokens that a prompt and its answer may take."""
        return self.config.text.max_position_embeddings

    def open_media(self, request: Request, detail: Detail) -> tuple[Medium, ...]:
        """Open the media of `request`, in order; videos are sampled, and not decoded yet.

        Raises:
            MediaError: A picture or video cannot be opened.
        """
        from mlx_smolvlm.media.tiles import grid_of, open_image

        images = [open_image(source) for source in request.images]
        pictures = [Picture(one, grid_of(one.size, self.config, detail), detail) for one in images]
        if not request.videos:
            return tuple(pictures)
        from mlx_smolvlm.media.video import open_video

        self._warn_of_videos()
        clips = [open_video(source, self.config) for source in request.videos]
        return in_order(request.messages, pictures, [Footage(clip, clip) for clip in clips])

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
            media: Pictures and videos in the order of their items; those that are encoded
                already are not encoded again.
            add_generation_prompt: Whether the prompt ends with the start of an answer.

        Raises:
            ContextError: The prompt is longer than the context.
            PromptError: The messages are malformed.
        """
        input_ids = self._input_ids(messages, media, add_generation_prompt)
        if input_ids.size >= self.context_size:
            raise ContextError(too_long(self.prompt_builder, input_ids.size, media))
        prompt = Prompt(input_ids, tuple(media))
        limit = self.cache_options.max_kv_tokens
        if limit is None:
            return prompt
        return replace(prompt, pins=pinned_tokens(self.content_of(prompt), self.config, limit))

    def count_tokens(
        self, messages: list[Message], media: Sequence[Medium], add_generation_prompt: bool = True
    ) -> int:
        """Number of tokens of a prompt, however long; arguments as in `make_prompt`."""
        return self._input_ids(messages, media, add_generation_prompt).size

    def content_of(self, prompt: Prompt) -> Content:
        """The meaning of the tokens of `prompt`, to compare them with earlier ones."""
        config = self.config
        return content_of(
            prompt.input_ids, prompt.media, config.image_token_id, config.image_seq_len
        )

    def encode(self, media: Sequence[Medium]) -> mx.array | None:
        """`image_embeds` (N, I, D) of `media`, in order; None without any."""
        check_process()
        for _ in encode(media, self.encoder, self.config):
            pass
        return joined(media)

    def make_cache(self) -> KVCache:
        """An empty cache, as `cache_options` describes it."""
        return self.model.make_cache(self.cache_options)

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
                f"{self.config.source} was not trained on videos; its answers about them are "
                "poor (SmolVLM2 was)",
                SmolVLMWarning,
                stacklevel=4,
            )
