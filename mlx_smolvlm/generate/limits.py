"""What to tell a user whose prompt exceeds the model's context, or the cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import PromptError, SmolVLMWarning
from mlx_smolvlm.kv.bounded import RECENT, SINKS
from mlx_smolvlm.media.encode import Footage, Medium, Picture
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.reuse.content import Content

ROOM = 8  # an eighth of the context is left for the answer


def too_long(builder: PromptBuilder, length: int, media: Sequence[Medium]) -> str:
    """An error's message: what takes how many tokens, and what would fit."""
    context = builder.config.text.max_position_embeddings
    pictures = [one for one in media if isinstance(one, Picture)]
    footage = [one for one in media if isinstance(one, Footage)]
    shares = []
    if pictures:
        tokens = sum(builder.tokens_of(picture.grid) for picture in pictures)
        shares.append(f"{len(pictures)} pictures: {tokens:,}")
    if footage:
        tokens = sum(_clip_tokens(builder, one) for one in footage)
        frames = sum(one.num_tiles for one in footage)
        shares.append(f"{frames} frames of {len(footage)} videos: {tokens:,}")
    taken = f" ({'; '.join(shares)})" if shares else ""
    return (
        f"the prompt takes {length:,} tokens{taken} and the model's context is {context:,}; "
        f"{_advice(builder, length, pictures, footage)}"
    )


def _advice(
    builder: PromptBuilder, length: int, pictures: list[Picture], footage: list[Footage]
) -> str:
    """What the user can do."""
    if not footage:
        return "use detail 'low' or fewer pictures" if pictures else "shorten the text"
    context = builder.config.text.max_position_embeddings
    frames = sum(one.num_tiles for one in footage)
    taken = sum(_clip_tokens(builder, one) for one in footage)
    fit = int((context - context // ROOM - (length - taken)) // (taken / frames))
    if fit < len(footage):
        return "ask about fewer or smaller pictures and videos, or shorten the text"
    times = [one.times.timestamps_s for one in footage]
    shown_s = sum(time[-1] - time[0] for time in times) * frames / max(1, frames - len(times))
    fps = fit / shown_s
    rates = [one.clip.rate for one in footage if one.clip is not None]
    part_s = fit / max(rates, default=frames / shown_s)
    return (
        f"{fit} frames would fit: an fps of {_down(fps)}, a max_frames of {fit // len(footage)}, "
        f"or parts of {_down(part_s)} s, one after the other (--chunk)"
    )


def _down(value: float) -> str:
    """`value` cut to two significant digits, so that it is not above what fits."""
    digits = 1
    while value < 10:
        value, digits = value * 10, digits * 10
    return f"{int(value) / (digits):g}"


def _clip_tokens(builder: PromptBuilder, footage: Footage) -> int:
    """Tokens that a video takes in the prompt."""
    return builder.tokens_of_clip(footage.times)


def pinned_tokens(content: Content, config: Config, max_kv_tokens: int) -> np.ndarray:
    """Positions of the tokens of `content` that a cache of `max_kv_tokens` never drops.

    They are the first message, unless it fills more than half of the cache, and every picture
    and video.

    Raises:
        PromptError: They do not fit.
    """
    ids = content.ids
    ends = np.flatnonzero(np.isin(ids, config.eos_token_ids))
    first = int(ends[0]) + 1 if ends.size else 0
    parts = [np.arange(first if first <= max_kv_tokens // 2 else 0)]
    for span in content.spans:  # with the tokens that open and close it
        parts.append(np.arange(max(0, span.start - 2), min(span.stop + 1, ids.size)))
    pins: np.ndarray = np.unique(np.concatenate([np.arange(SINKS), *parts]))
    if pins.size > max_kv_tokens - RECENT:
        raise PromptError(
            f"the pictures and videos and what begins the prompt take {pins.size:,} tokens, and "
            f"max_kv_tokens is {max_kv_tokens:,}; let it be {pins.size + RECENT:,} or more, or "
            "use detail 'low', fewer pictures or fewer frames"
        )
    if ids.size > max_kv_tokens:
        warnings.warn(
            f"the prompt is longer than max_kv_tokens, {max_kv_tokens:,}: its oldest text is "
            "forgotten, but for its first message",
            SmolVLMWarning,
            stacklevel=4,
        )
    return pins
