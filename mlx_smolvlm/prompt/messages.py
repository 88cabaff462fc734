"""Reads a user's prompt and media into messages and the sources of their media."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_smolvlm.errors import PromptError

Message = dict[str, Any]
ImageSource = Any  # path, URL, data URI, bytes, PIL image, array or figure: see picture.open_image
VideoSource = Any  # a Video, or the source of one: see video.Video


@dataclass
class Request:
    """Messages and their media.

    Attributes:
        messages: Messages whose items have no sources.
        images: Sources of the image items, in order.
        videos: Sources of the video items, in order.
    """

    messages: list[Message]
    images: list[ImageSource] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)

    def replace_question(self, prompt: str) -> list[Message]:
        """Return the messages with `prompt` in place of the question, for a request from a text."""
        *before, user = self.messages
        content = [*user["content"][:-1], {"type": "text", "text": prompt}]
        return [*before, {**user, "content": content}]


def read_request(
    prompt: str | Sequence[Message],
    images: ImageSource | Iterable[ImageSource],
    videos: VideoSource | Iterable[VideoSource],
    system: str | None,
) -> Request:
    """Make a request of a user's arguments.

    Args:
        prompt: A question, which comes after all media; or a list of messages, whose items
            may have sources. Items without one take the next of `images` or `videos`.
        images: One source or several.
        videos: One source or several.
        system: A system message; None for none.

    Raises:
        PromptError: The prompt or a message is malformed, or the numbers of media and of media
            items differ.
    """
    pictures, clips = _list_sources(images), _list_sources(videos)
    if isinstance(prompt, str):
        items = [{"type": "image"} for _ in pictures] + [{"type": "video"} for _ in clips]
        user = {"role": "user", "content": [*items, {"type": "text", "text": prompt}]}
        return Request([*make_system_messages(system), user], pictures, clips)
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
        raise PromptError(f"the prompt is {prompt!r:.100}; give a question or a list of messages")
    request = Request(make_system_messages(system))
    for number, message in enumerate(prompt, 1):
        plain: list[Message] = []
        for item, source in _read_items(message, f"message {number}"):
            plain.append(item)
            kind = item["type"]
            if kind == "image":
                request.images.append(
                    _take_next_source(kind, pictures) if source is None else source
                )
            elif kind == "video":
                request.videos.append(_take_next_source(kind, clips) if source is None else source)
        request.messages.append({"role": message["role"], "content": plain})
    for kind, rest in (("image", pictures), ("video", clips)):
        if rest:
            raise PromptError(f"{len(rest)} {NOUNS[kind]} have no {kind} item in the messages")
    return request


NOUNS = {"image": "pictures", "video": "videos"}

# Item types of OpenAI's APIs, and their names in chat templates.
_KINDS = {
    **{"text": "text", "input_text": "text", "output_text": "text"},
    **{"image": "image", "image_url": "image", "input_image": "image"},
    **{"video": "video", "video_url": "video", "input_video": "video"},
}


def _read_items(message: Any, where: str) -> Iterator[tuple[Message, Any]]:
    """Yield each content item of `message` without its source, and its source or None.

    Raises:
        PromptError: The message or one of its items is malformed.
    """
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(
            f"{where} must be an object with 'role' and 'content', not {message!r:.100}"
        )
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(
            f"{where} has the content {content!r:.100}; give a text or a list of items"
        )
    for item in content:
        if not isinstance(item, Mapping) or "type" not in item:
            raise PromptError(f"{where} has the item {item!r:.100}; give an object with a 'type'")
        item_type = item["type"]
        kind = _KINDS.get(item_type) if isinstance(item_type, str) else None
        if kind is None:
            raise PromptError(
                f"{where} has content of type {item_type!r:.100}; "
                "it must be 'text', 'image' or 'video'"
            )
        if kind == "text":
            yield {"type": "text", "text": item.get("text")}, None
        else:
            yield {"type": kind}, _read_source(item, kind, where)


def _read_source(item: Mapping[str, Any], kind: str, where: str) -> Any:
    """Return the source in an image or video item, or None if it has none."""
    names = [name for name in (kind, f"{kind}_url", "url") if item.get(name) is not None]
    if not names:
        return None
    source = item[names[0]]
    if isinstance(source, Mapping):
        source = source.get("url")
        if not isinstance(source, str):
            raise PromptError(f"{where} has a {names[0]} without a 'url'; give a path or a URL")
    return source


def _take_next_source(kind: str, rest: list[Any]) -> Any:
    """Remove and return the next source that was passed next to the messages."""
    if not rest:
        raise PromptError(f"the messages have more {kind} items than there are {NOUNS[kind]}")
    return rest.pop(0)


def make_system_messages(system: str | None) -> list[Message]:
    """Return a list of the system message, or an empty list without one."""
    content = [{"type": "text", "text": system}]
    return [] if system is None else [{"role": "system", "content": content}]


def _list_sources(sources: Any) -> list[Any]:
    """Return one source or several as a list; None is an empty list.

    A text, bytes, a path or an array (anything with a shape) is a single source, although most
    of them are iterable.
    """
    if sources is None:
        return []
    is_single = isinstance(sources, str | bytes | bytearray | memoryview | Mapping)
    if is_single or hasattr(sources, "shape") or not isinstance(sources, Iterable):
        return [sources]
    return list(sources)
