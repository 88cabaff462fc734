"""What to tell a user whose prompt exceeds the model's context."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_smolvlm.media import Footage, Medium, Picture
from mlx_smolvlm.prompt import PromptBuilder

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
    fps, part_s = fit / shown_s, shown_s * fit / frames
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
