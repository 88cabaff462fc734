"""A checkpoint's chat template, and the messages that it is given.

Templates come with checkpoints from anywhere: they run in a sandbox (see `sandbox.py`) and
see nothing but strings, lists and dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_smolvlm.errors import CheckpointError, PromptError, format_error

Message = Mapping[str, Any]

ROLES = ("user", "assistant", "system")

_PROBE = "probe"


class ChatTemplate:
    """The text of a conversation, as a checkpoint wants it.

    `takes_images` says whether the template reads content as a list of items; one that
    does not reads a text.
    """

    def __init__(self, source: str) -> None:
        from mlx_smolvlm.prompt.sandbox import BoundedEnvironment

        try:
            self._template = BoundedEnvironment().read(source)
        except Exception as error:
            raise CheckpointError(
                f"the chat template cannot be read: {format_error(error)}"
            ) from None
        self.takes_images = self._probe()

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The text of `messages`, which `normalize_message` has made.

        Raises:
            PromptError: The template refuses them.
        """
        if not self.takes_images:
            messages = [
                {**message, "content": _join_texts(message["content"])} for message in messages
            ]
        try:
            return self._run(messages, add_generation_prompt)
        except Exception as error:  # a template runs any expression
            raise PromptError(
                f"the chat template refuses the messages: {format_error(error)}"
            ) from None

    def find_answer_lead(self) -> str:
        """White space between the heading of an answer and the answer: that after "Assistant:"."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": _PROBE}]}
            for role in ("user", "assistant")
        ]
        try:
            heading, whole = self.render(messages[:1], True), self.render(messages, False)
        except PromptError:
            return ""
        lead, found, _ = whole.removeprefix(heading).partition(_PROBE)
        return lead if found and whole.startswith(heading) and not lead.strip() else ""

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from mlx_smolvlm.prompt.sandbox import render

        values = {"messages": messages, "tools": None, "documents": None}
        text = render(self._template, {**values, "add_generation_prompt": add_generation_prompt})
        text.encode()  # a template can write what is no character: '\ud800'
        return text

    def _probe(self) -> bool:
        """Whether content is a list of items; a template for text fails on one or prints it."""
        from mlx_smolvlm.prompt.sandbox import LimitError

        failure: Exception | None = None
        items = [{"type": "text", "text": _PROBE}]
        for content, takes_images in ((items, True), (_PROBE, False)):
            try:
                text = self._run([{"role": "user", "content": content}], True)
            except LimitError as error:  # the other content would cost as much
                raise CheckpointError(f"the chat template was {error}") from None
            except Exception as error:  # a template runs any expression
                failure = error
                continue
            if _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text:
                return takes_images
        reason = f": {format_error(failure)}" if failure else ", it leaves the text out"
        raise CheckpointError(f"the chat template cannot render a plain question{reason}")


def normalize_message(message: Message, number: int) -> dict[str, Any]:
    """`message` rebuilt from plain values, its content a list of items."""
    where = f"message {number}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(
            f"{where} must be an object with 'role' and 'content', not {message!r:.100}"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(
            f"{where} has the role {role!r:.60}; it must be one of {', '.join(ROLES)}"
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise PromptError(f"{where} ({role}) has no content; give it a text or an image")
    return {"role": str(role), "content": [_normalize_item(item, where) for item in content]}


def _normalize_item(item: Any, where: str) -> dict[str, str]:
    """A content item rebuilt from plain values."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in ("image", "video"):
        return {"type": str(kind)}
    if kind != "text":
        raise PromptError(
            f"{where} has content of type {kind!r:.60}; it must be 'text', 'image' or 'video'"
        )
    text = item.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where} has a text item whose text is {text!r:.100}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} has a character that is not valid Unicode at position {error.start}; "
            "its source may not be UTF-8"
        ) from None
    return {"type": "text", "text": str(text)}


def _join_texts(items: list[dict[str, str]]) -> str:
    """The text of items without images."""
    return "".join(item["text"] for item in items)


def find_unused_character(messages: list[dict[str, Any]]) -> str:
    """A private-use character that no message holds."""
    texts = [
        item["text"]
        for message in messages
        for item in message["content"]
        if item["type"] == "text" and not item["text"].isascii()
    ]
    used = set("".join(texts))
    return next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)


def mark_special_tokens(
    messages: list[dict[str, Any]], mark: str, special: list[str]
) -> list[dict[str, Any]]:
    """`messages` with `mark` inside every special token that a text spells, and around texts.

    The marks around a text keep two texts from spelling a token together. They are set
    inside of leading and trailing white space, which templates may strip.
    """
    longest_first = sorted((re.escape(text) for text in special), key=len, reverse=True)
    starts = re.compile(f"(?=(?:{'|'.join(longest_first) or '(?!)'}))(.)", re.DOTALL)

    def guard(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        inner = starts.sub(rf"\1{mark}", core)
        return f"{text[:start]}{mark}{inner}{mark}{text[start + len(core) :]}"

    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": guard(item["text"])} if item["type"] == "text" else item
                for item in message["content"]
            ],
        }
        for message in messages
    ]
