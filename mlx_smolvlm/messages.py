"""What a user asks, as messages for the prompt and the sources of their media."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_smolvlm.errors import PromptError

Message = dict[str, Any]
ImageSource = Any  # path, URL, data URI, bytes, PIL image or numpy array: see image.open_image
VideoSource = Any  # a Video, or what one can be made of: see video.Video


@dataclass
class Request:
    """Messages without sources, and the sources of their image and video items, in order."""

    messages: list[Message]
    images: list[ImageSource] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)

    def asking(self, prompt: str) -> list[Message]:
        """The messages of a request with a question as text, with `prompt` in its place."""
        *before, user = self.messages
        content = [*user["content"][:-1], {"type": "text", "text": prompt}]
        return [*before, {**user, "content": content}]


def read_request(
    prompt: str | Sequence[Message],
    images: Iterable[ImageSource],
    videos: Iterable[VideoSource],
    system: str | None,
) -> Request:
    """The request that a user's arguments make; with a question as text, media come before it.

    Raises:
        PromptError: The messages have more or fewer media items than there are media.
    """
    pictures, clips = _as_list(images), _as_list(videos)
    if isinstance(prompt, str):
        items = [{"type": "image"} for _ in pictures] + [{"type": "video"} for _ in clips]
        user = {"role": "user", "content": [*items, {"type": "text", "text": prompt}]}
        return Request([*system_message(system), user], pictures, clips)
    request = Request(system_message(system))
    for message in prompt:
        content = message.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            for kind, rest, sources in (
                ("image", pictures, request.images),
                ("video", clips, request.videos),
            ):
                if part.get("type") == kind:
                    sources.append(_source(part, kind, rest))
        plain = [{k: v for k, v in part.items() if k not in ("image", "video")} for part in parts]
        request.messages.append({"role": message.get("role"), "content": plain})
    for kind, rest in (("image", pictures), ("video", clips)):
        if rest:
            raise PromptError(f"{len(rest)} {NOUNS[kind]} have no {kind} item in the messages")
    return request


NOUNS = {"image": "pictures", "video": "videos"}


def _source(part: Message, kind: str, rest: list[Any]) -> Any:
    """The source of an item: its own, or the next that was given beside the messages."""
    if kind in part:
        return part[kind]
    if not rest:
        raise PromptError(f"the messages have more {kind} items than there are {NOUNS[kind]}")
    return rest.pop(0)


def system_message(system: str | None) -> list[Message]:
    """The messages that a conversation with this system message begins with."""
    content = [{"type": "text", "text": system}]
    return [] if system is None else [{"role": "system", "content": content}]


def _as_list(sources: Iterable[Any]) -> list[Any]:
    """`sources` as a list; a single one is met with a list of one."""
    if isinstance(sources, (list, tuple)):
        return list(sources)
    return list(sources) if isinstance(sources, Iterator) else [sources]
