"""Reads datasets: JSONL files of conversations about pictures and videos.

A line is a conversation, or a question with its answer as a short form. docs/fine-tuning.md
describes the format. All lines are checked when the file is read, before a model is loaded.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import DatasetError, PromptError, shorten
from mlx_smolvlm.files import expand_path, read_file
from mlx_smolvlm.prompt.template import normalize_message

Message = dict[str, Any]

LARGEST_FILE = 2**30  # bytes, without the media
MEDIA = {"image": "images", "video": "videos"}
SHORT = ("image", "video", "question", "answer")
KEYS = ("messages", *SHORT, *MEDIA.values(), "system", "task", "answers", "metric", "choices")


@dataclass(frozen=True)
class Example:
    """A line of a dataset.

    Attributes:
        messages: Messages as for `SmolVLM.ask`: the content is a list of items, and media items
            have no source. The last message is an assistant's.
        images: The file of each image item, in order.
        videos: The file of each video item, in order.
        task: The task that an evaluation counts the line under; None if the line names none.
        line: The number of the line in `file`, from 1.
        file: The JSONL file.
        answers: The accepted answers; by default the text of the last message.
        metric: The name of the metric for answers; None if the line names none.
        choices: The texts to choose an answer from; empty if the answer is free.
    """

    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    task: str | None
    line: int
    file: Path
    answers: tuple[str, ...]
    metric: str | None
    choices: tuple[str, ...]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer."""
        return list(self.messages[:-1])

    @property
    def where(self) -> str:
        """File and line as "FILE:LINE", for error messages."""
        return f"{self.file}:{self.line}"


def read_dataset(path: str | Path, split: str = "train") -> list[Example]:
    """Read the examples of a dataset, in the order of its lines.

    Args:
        path: A JSONL file, or a folder that has one. Paths of media are relative to the file's
            folder.
        split: The name of the file in a folder, without .jsonl: "train", "valid" or any other.

    Raises:
        DatasetError: There is no such file, it is empty, or a line does not follow the format in
            docs/fine-tuning.md. The message names file, line and reason.
    """
    file = expand_path(path, DatasetError)
    if os.path.isdir(file):  # Path.is_dir raises where a name is too long
        file = file / f"{split}.jsonl"
    examples = list(_read_examples(file))
    if not examples:
        raise DatasetError(f"{file} is empty; write one example on each line")
    return examples


def _read_examples(file: Path) -> Iterator[Example]:
    """Yield the example of each line of `file` that is not blank."""
    try:
        text = read_file(file, LARGEST_FILE).decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _parse_example(line, number, file)
        except (DatasetError, PromptError) as error:
            raise DatasetError(f"{file}:{number}: {error}") from None
        except RecursionError:
            raise DatasetError(f"{file}:{number}: it is nested too deeply") from None


def _parse_example(line: str, number: int, file: Path) -> Example:
    """Parse line `number` of `file`."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DatasetError(f"it must be a JSON object, not a {type(values).__name__}")
    for key in values:
        if key not in KEYS:
            raise DatasetError(f"unknown key {shorten(key)}; the keys are {', '.join(KEYS)}")
    answers, choices = _get_texts(values, "answers"), _get_texts(values, "choices")
    media = {kind: _find_media(values, kind, file.parent) for kind in MEDIA}
    counts = {kind: len(paths) for kind, paths in media.items()}
    messages = _build_messages(values, answers, counts)
    for kind, count in counts.items():
        items = sum(item["type"] == kind for one in messages for item in one["content"])
        if items != count:
            raise DatasetError(
                f"the messages have {items} {kind} items, but {MEDIA[kind]} has {count} files"
            )
    if "choices" in values:
        _check_choices(choices)
    return Example(
        messages=tuple(messages),
        images=media["image"],
        videos=media["video"],
        task=_get_text(values, "task"),
        line=number,
        file=file,
        answers=answers or (_join_text(messages[-1]),),
        metric=_get_text(values, "metric"),
        choices=choices,
    )


def _check_choices(choices: tuple[str, ...]) -> None:
    """Refuse choices that `SmolVLM.choose` cannot choose between."""
    if len(set(choices)) < 2:
        raise DatasetError("choices must have two or more different texts")
    for choice, count in Counter(choices).items():
        if not choice.strip():
            raise DatasetError("choices has an empty text")
        if count > 1:
            raise DatasetError(f"choices has {shorten(choice)} twice; give each text once")


def _build_messages(
    values: dict[str, Any], answers: tuple[str, ...], counts: dict[str, int]
) -> list[Message]:
    """Build the messages of a line, with its media items and the last answer."""
    if "messages" in values:
        short = [key for key in SHORT if key in values]
        if short:
            raise DatasetError(f"it has both messages and {short[0]}; keep one of them")
        messages = _check_messages(values["messages"])
    else:
        if _get_text(values, "question") is None:
            raise DatasetError("it has neither messages nor a question")
        messages = [_make_message("user", values["question"])]
        if _get_text(values, "answer") is not None:
            messages.append(_make_message("assistant", values["answer"]))
    if messages[-1]["role"] != "assistant":
        if not answers:
            raise DatasetError("it has no answer: end with an assistant's message, or add answers")
        messages.append(_make_message("assistant", answers[0]))
    system = _get_text(values, "system")
    if system is not None:
        if messages[0]["role"] == "system":
            raise DatasetError("it has both system and a system message; keep one of them")
        messages.insert(0, _make_message("system", system))
    _check_answers(messages)
    _place_media(messages, counts)
    return messages


def _check_messages(value: Any) -> list[Message]:
    """Check the messages of a line and copy them."""
    if not isinstance(value, list) or not value:
        raise DatasetError("messages must be a list of one or more messages")
    return [normalize_message(message, number) for number, message in enumerate(value, 1)]


def _make_message(role: str, text: str) -> Message:
    """Return a message with one text."""
    return normalize_message({"role": role, "content": text}, 1)


def _check_answers(messages: list[Message]) -> None:
    """Refuse an answer that is empty, has media, or does not follow a user's message."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        if any(item["type"] != "text" for item in message["content"]):
            raise DatasetError(
                f"message {number} is an answer with a picture or video; use text only"
            )
        if not _join_text(message).strip():
            raise DatasetError(f"message {number} is an empty answer")
        if number == 1 or messages[number - 2]["role"] != "user":
            raise DatasetError(
                f"message {number} is an answer, but does not follow a user's message"
            )


def _place_media(messages: list[Message], counts: dict[str, int]) -> None:
    """Put media items before the text of the first user's message if no message has any."""
    if any(item["type"] in MEDIA for message in messages for item in message["content"]):
        return
    first = next(message for message in messages if message["role"] == "user")
    items = [{"type": kind} for kind, count in counts.items() for _ in range(count)]
    first["content"] = [*items, *first["content"]]


def _join_text(message: Message) -> str:
    """Return the text of a message without media."""
    return "".join(item["text"] for item in message["content"])


def _find_media(values: dict[str, Any], kind: str, folder: Path) -> tuple[Path, ...]:
    """Return the files of the media of one kind."""
    many = MEDIA[kind]
    if kind in values and many in values:
        raise DatasetError(f"it has both {kind} and {many}; keep one of them")
    names = _get_texts(values, many)
    if kind in values:
        names = (_get_text(values, kind) or "",)
    return tuple(_find_file(name, folder) for name in names)


def _find_file(name: str, folder: Path) -> Path:
    """Return the path of the file `name`, which may be relative to `folder`."""
    try:
        path = folder / expand_path(name)
    except OSError as error:
        raise DatasetError(f"{name!r:.200}: {error.strerror}") from None
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise DatasetError(f"there is no file {name!r:.200} in {folder}")
    return path


def _get_text(values: dict[str, Any], key: str) -> str | None:
    """Return the text under `key`, or None if there is no such key."""
    value = values.get(key)
    if key in values and (not isinstance(value, str) or not value.strip()):
        raise DatasetError(f"{key} must be a text and not empty; it is {shorten(value)}")
    return None if value is None else _check_text(value, key)


def _get_texts(values: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts under `key`; empty if there is no such key."""
    value = values.get(key, [])
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise DatasetError(
            f"{key} must be a list of texts that are not empty; it is {shorten(value)}"
        )
    if key == "answers" and key in values and not value:
        raise DatasetError("answers is empty; give at least one text, or leave it out")
    return tuple(_check_text(one, key) for one in value)


def _check_text(text: str, key: str) -> str:
    """Return `text` if it can be encoded as UTF-8; it may have lone surrogates from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{key} has a character that is not valid Unicode at position {error.start}"
        ) from None
    return text
