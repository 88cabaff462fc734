"""A checkpoint's chat template, and checks of the messages that it renders.

Templates come from untrusted checkpoints. They run in a sandbox (see `sandbox.py`) and are given
strings, lists and dictionaries only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_smolvlm.errors import CheckpointError, PromptError, format_error

ROLES = ("user", "assistant", "system")

_PROBE = "probe"


class ChatTemplate:
    """Renders a conversation in the format of a checkpoint.

    Attributes:
        takes_images: Whether the template reads the content of a message as a list of items.
            Otherwise it reads a text.
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
        """Return the text of `messages`, which must come from `normalize_message`.

        Raises:
            PromptError: The template refuses the messages.
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
        """Return the white space between the heading of an answer, "Assistant:", and the answer."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": _PROBE}]}
            for role in ("user", "assistant")
        ]
        try:
            heading, whole = self.render(messages[:1], True), self.render(messages, False)
        except PromptError:
            return ""
        lead, probe, _ = whole.removeprefix(heading).partition(_PROBE)
        return lead if probe and whole.startswith(heading) and not lead.strip() else ""

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from mlx_smolvlm.prompt.sandbox import render

        values = {"messages": messages, "tools": None, "documents": None}
        text = render(self._template, {**values, "add_generation_prompt": add_generation_prompt})
        text.encode()  # fails if the template writes a lone surrogate, such as '\ud800'
        return text

    def _probe(self) -> bool:
        """Whether content is a list of items: a template for text fails on a list or prints it."""
        from mlx_smolvlm.prompt.sandbox import LimitError

        failure: Exception | None = None
        items = [{"type": "text", "text": _PROBE}]
        for content, takes_images in ((items, True), (_PROBE, False)):
            try:
                text = self._run([{"role": "user", "content": content}], True)
            except LimitError as error:  # another attempt would take as long
                raise CheckpointError(f"the chat template was {error}") from None
            except Exception as error:  # a template runs any expression
                failure = error
                continue
            if _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text:
                return takes_images
        reason = f": {format_error(failure)}" if failure else ": it leaves the text out"
        raise CheckpointError(f"the chat template cannot render a plain question{reason}")


def normalize_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a checked copy of `message`, made of plain values, whose content is a list of items.

    Args:
        message: A message.
        number: Its number in error messages, from 1.

    Raises:
        PromptError: The message is malformed.
    """
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
        raise PromptError(f"{where} ({role}) has no content; give a text or an image")
    return {"role": str(role), "content": [_normalize_item(item, where) for item in content]}


def _normalize_item(item: Any, where: str) -> dict[str, str]:
    """Return a checked copy of a content item, made of plain values."""
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
    """Return the text of `items`, which must all be texts."""
    return "".join(item["text"] for item in items)


def find_unused_character(messages: list[dict[str, Any]]) -> str:
    """Return a private-use character that occurs in no message."""
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
    """Insert `mark` into every special token in the texts of `messages`, and around each text.

    The marks around a text prevent two adjacent texts from forming a special token. They are
    placed after leading and before trailing white space, since templates may strip that.

    Args:
        messages: Messages from `normalize_message`.
        mark: A character that occurs in no message.
        special: The special tokens.

    Returns:
        New messages.
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
