"""Examples as token ids, and which of them are to be predicted.

The ids are those that `SmolVLM.ask` would prefill: the same builder makes both. Targets are
the tokens of every answer, its end included, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_smolvlm.errors import DatasetError, SmolVLMError
from mlx_smolvlm.image import Detail, grid_of
from mlx_smolvlm.media import Footage, Medium, Picture
from mlx_smolvlm.messages import Request
from mlx_smolvlm.picture import upright_size
from mlx_smolvlm.prompt import PromptBuilder
from mlx_smolvlm.smolvlm import SmolVLM
from mlx_smolvlm.train.dataset import Example, Message
from mlx_smolvlm.video import Video


@dataclass(frozen=True)
class Sight:
    """How media are looked at: `detail` of pictures, frames of videos (None: as trained)."""

    detail: Detail = "high"
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class Row:
    """Token ids int32 (L,), and whether each is to be predicted, bool (L,)."""

    ids: np.ndarray
    is_target: np.ndarray


def row_of(builder: PromptBuilder, example: Example, media: tuple[Medium, ...]) -> Row:
    """The tokens of `example`, whose opened media are `media`.

    Raises:
        DatasetError: The chat template refuses the messages, or writes an answer in another
            way than it begins one.
    """
    try:
        return _row(builder, list(example.messages), media)
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None


def _row(builder: PromptBuilder, messages: list[Message], media: tuple[Medium, ...]) -> Row:
    ids = _build(builder, messages, media, False)
    is_target = np.zeros(ids.size, bool)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _build(builder, messages[:number], media, True)
        start = prompt.size
        ends = np.flatnonzero(np.isin(ids[start:], builder.config.eos_token_ids))
        if not np.array_equal(ids[:start], prompt) or ends.size == 0:
            raise DatasetError(
                f"the chat template does not write message {number + 1} as an answer to the "
                "messages before it; this checkpoint cannot be trained on it"
            )
        is_target[start : start + int(ends[0]) + 1] = True
    return Row(ids, is_target)


def _build(
    builder: PromptBuilder, messages: list[Message], media: tuple[Medium, ...], asks: bool
) -> np.ndarray:
    """Ids of `messages`, with as many of `media` as they have items."""
    items = [item["type"] for message in messages for item in message["content"]]
    shown = media[: items.count("image") + items.count("video")]
    grids = [one.grid for one in shown if isinstance(one, Picture)]
    times = [one.times for one in shown if isinstance(one, Footage)]
    return builder.build(messages, grids, asks, times)


def opened(vlm: SmolVLM, example: Example, sight: Sight) -> tuple[Medium, ...]:
    """The media of `example`, pictures decoded.

    Raises:
        DatasetError: One cannot be read.
    """
    request = Request(list(example.messages), list(example.images), _videos(example, sight))
    try:
        return vlm.engine.open_media(request, sight.detail)
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None


def sized(vlm: SmolVLM, example: Example, sight: Sight) -> tuple[Medium, ...]:
    """The media of `example` without their pixels; errors as `opened`."""
    try:
        pictures = []
        for path in example.images:
            grid = grid_of(upright_size(path), vlm.config, sight.detail)
            pictures.append(Picture(None, grid, sight.detail, str(path)))
        if not example.videos:
            return tuple(pictures)
        request = Request(list(example.messages), [], _videos(example, sight))
        request.messages = [
            {**m, "content": [item for item in m["content"] if item["type"] != "image"]}
            for m in request.messages
        ]
        media = vlm.engine.open_media(request, sight.detail)
        footage = [one for one in media if isinstance(one, Footage)]
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None
    from mlx_smolvlm.media import in_order

    return in_order(example.messages, pictures, footage)


def _videos(example: Example, sight: Sight) -> list[Video]:
    """The videos of `example`, to be sampled as `sight` says."""
    return [Video(one, fps=sight.fps, max_frames=sight.max_frames) for one in example.videos]
