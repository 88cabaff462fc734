"""How a video stands in a prompt: an introduction, and a line with its time for each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.timeline import FrameTimes, clock, stamp

if TYPE_CHECKING:
    from mlx_smolvlm.image import Grid


def with_frames(
    messages: list[dict[str, Any]], grids: Sequence[Grid], clips: Sequence[FrameTimes]
) -> tuple[list[dict[str, Any]], list[Grid]]:
    """`messages` with texts and images in place of videos, and the grids of all images.

    Source: transformers 5.23, SmolVLMProcessor.replace_video_token. It renders a template of
    its own for videos; the checkpoint's, given these items, writes the same.

    Raises:
        PromptError: There are more or fewer videos than `clips`.
    """
    videos = sum(item["type"] == "video" for m in messages for item in m["content"])
    if videos != len(clips):
        raise PromptError(f"the messages have {videos} videos and {len(clips)} clips are given")
    if not clips:
        return messages, list(grids)
    from mlx_smolvlm.image import Grid

    rest, later, placed = list(grids), list(clips), list[Grid]()
    result = []
    for message in messages:
        content: list[dict[str, str]] = []
        for item in message["content"]:
            if item["type"] == "video":
                clip = later.pop(0)
                content += _items(clip)
                placed += [Grid(0, 0)] * len(clip.timestamps_s)
            else:
                content.append(item)
                if item["type"] == "image" and rest:
                    placed.append(rest.pop(0))
        result.append({**message, "content": content})
    return result, placed + rest


def _items(clip: FrameTimes) -> list[dict[str, str]]:
    """The texts and images that stand for `clip`."""
    from num2words import num2words

    text = (
        f"You are provided the following series of {num2words(len(clip.timestamps_s))} frames "
        f"from a {clock(clip.duration_s)} [H:MM:SS] video.\n"
    )
    items = []
    for seconds in clip.timestamps_s:
        items += [
            {"type": "text", "text": f"{text}\nFrame from {stamp(seconds)}:"},
            {"type": "image"},
        ]
        text = ""
    return [*items, {"type": "text", "text": "\n\n"}]
