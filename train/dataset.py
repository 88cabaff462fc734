"""Datasets: JSONL files of conversations, with the pictures and videos that they are about.

A line is a conversation, or in short a question and its answer; docs/training.md describes the
format. What is wrong with a line is said here, before any work is done.
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

LARGEST_FILE = 2**30  # bytes of lines; media are files of their own
MEDIA = {"image": "images", "video": "videos"}
SHORT = ("image", "video", "question", "answer")
KEYS = ("messages", *SHORT, *MEDIA.values(), "system", "task", "answers", "metric", "choices")


@dataclass(frozen=True)
class Example:
    """A line of a dataset.

    Attributes:
        messages: As `SmolVLM.ask` takes them, content a list of items, media items without a
            source; the last one is an assistant's.
        images: One for each image item, in order.
        videos: One for each video item, in order.
        task: What to count it under; None if the line does not say.
        line: Its number in `file`, from 1.
        file: Where it stands.
        answers: What is accepted as an answer; by default the text of the last message.
        metric: How an answer is to be judged; None leaves it to the reader.
        choices: What an answer is to be chosen from; empty if it is free.
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
        """The messages that the last answer is an answer to."""
        return list(self.messages[:-1])

    @property
    def where(self) -> str:
        """File and line, for messages of errors."""
        return f"{self.file}:{self.line}"


def read_dataset(path: str | Path, split: str = "train") -> list[Example]:
    """The examples in the file `path`, or in `split`.jsonl of the folder `path`, in order.

    Args:
        path: A folder, or a JSONL file; media are looked for beside the file.
        split: Which file of a folder: "train", "valid" or any other name.

    Raises:
        DatasetError: There is no such file, it holds no example, or a line is not as
            docs/training.md says; it names file, line and reason.
    """
    file = expand_path(path, DatasetError)
    if os.path.isdir(file):  # Path.is_dir raises where a name is too long
        file = file / f"{split}.jsonl"
    examples = list(_read_examples(file))
    if not examples:
        raise DatasetError(f"{file} has no lines; give it one example a line")
    return examples


def _read_examples(file: Path) -> Iterator[Example]:
    """The examples of the lines of `file`; empty lines are passed over."""
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
    """The example that `line` states."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DatasetError(f"it must be a JSON object, not a {type(values).__name__}")
    for key in values:
        if key not in KEYS:
            raise DatasetError(f"the key {shorten(key)} is not known; known are {', '.join(KEYS)}")
    answers, choices = _get_texts(values, "answers"), _get_texts(values, "choices")
    media = {kind: _find_media(values, kind, file.parent) for kind in MEDIA}
    counts = {kind: len(paths) for kind, paths in media.items()}
    messages = _build_messages(values, answers, counts)
    for kind, count in counts.items():
        items = sum(item["type"] == kind for one in messages for item in one["content"])
        if items != count:
            raise DatasetError(f"the messages have {items} {kind} items, and {MEDIA[kind]} {count}")
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
    """Refuse choices between which `SmolVLM.choose` cannot choose."""
    if len(set(choices)) < 2:
        raise DatasetError("choices needs two different texts or more")
    for choice, count in Counter(choices).items():
        if not choice.strip():
            raise DatasetError("choices has a text that is empty")
        if count > 1:
            raise DatasetError(f"choices has {shorten(choice)} twice; give each text once")


def _build_messages(
    values: dict[str, Any], answers: tuple[str, ...], counts: dict[str, int]
) -> list[Message]:
    """The messages of a line, media items and the last answer included."""
    if "messages" in values:
        short = [key for key in SHORT if key in values]
        if short:
            raise DatasetError(f"it has both messages and {short[0]}; give one of the two")
        messages = _check_messages(values["messages"])
    else:
        if _get_text(values, "question") is None:
            raise DatasetError("it has neither messages nor a question")
        messages = [_make_message("user", values["question"])]
        if _get_text(values, "answer") is not None:
            messages.append(_make_message("assistant", values["answer"]))
    if messages[-1]["role"] != "assistant":
        if not answers:
            raise DatasetError("the last message must be an assistant's, or there must be answers")
        messages.append(_make_message("assistant", answers[0]))
    system = _get_text(values, "system")
    if system is not None:
        if messages[0]["role"] == "system":
            raise DatasetError("it has system, and a system message as well; give one of the two")
        messages.insert(0, _make_message("system", system))
    _check_answers(messages)
    _place_media(messages, counts)
    return messages


def _check_messages(value: Any) -> list[Message]:
    """Messages rebuilt from plain values."""
    if not isinstance(value, list) or not value:
        raise DatasetError("messages must be a list of one or more messages")
    return [normalize_message(message, number) for number, message in enumerate(value, 1)]


def _make_message(role: str, text: str) -> Message:
    """A message of one text."""
    return normalize_message({"role": role, "content": text}, 1)


def _check_answers(messages: list[Message]) -> None:
    """Refuse an answer that is empty, not text, or to nothing."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        if any(item["type"] != "text" for item in message["content"]):
            raise DatasetError(f"message {number} is an answer with a picture or video; give text")
        if not _join_text(message).strip():
            raise DatasetError(f"message {number} is an empty answer")
        if number == 1 or messages[number - 2]["role"] != "user":
            raise DatasetError(f"message {number} is an answer, and the one before is no user's")


def _place_media(messages: list[Message], counts: dict[str, int]) -> None:
    """Put media items before the first user's text if no message has any."""
    if any(item["type"] in MEDIA for message in messages for item in message["content"]):
        return
    first = next(message for message in messages if message["role"] == "user")
    items = [{"type": kind} for kind, count in counts.items() for _ in range(count)]
    first["content"] = [*items, *first["content"]]


def _join_text(message: Message) -> str:
    """The text of a message without media."""
    return "".join(item["text"] for item in message["content"])


def _find_media(values: dict[str, Any], kind: str, folder: Path) -> tuple[Path, ...]:
    """The files of one kind that a line names."""
    many = MEDIA[kind]
    if kind in values and many in values:
        raise DatasetError(f"it has both {kind} and {many}; give one of the two")
    names = _get_texts(values, many)
    if kind in values:
        names = (_get_text(values, kind) or "",)
    return tuple(_find_file(name, folder) for name in names)


def _find_file(name: str, folder: Path) -> Path:
    """The file `name` of a line, looked for in `folder` if it is no whole path."""
    try:
        path = folder / expand_path(name)
    except OSError as error:
        raise DatasetError(f"{name!r:.200}: {error.strerror}") from None
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise DatasetError(f"there is no file {name!r:.200} in {folder}")
    return path


def _get_text(values: dict[str, Any], key: str) -> str | None:
    """The text under `key`; None if there is none."""
    value = values.get(key)
    if key in values and (not isinstance(value, str) or not value.strip()):
        raise DatasetError(f"{key} must be a text that is not empty, not {shorten(value)}")
    return None if value is None else _check_text(value, key)


def _get_texts(values: dict[str, Any], key: str) -> tuple[str, ...]:
    """The texts under `key`; none if there is no such key."""
    value = values.get(key, [])
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise DatasetError(f"{key} must be a list of texts, not {shorten(value)}")
    if key == "answers" and key in values and not value:
        raise DatasetError("answers has no text")
    return tuple(_check_text(one, key) for one in value)


def _check_text(text: str, key: str) -> str:
    """`text`, which stands under `key`, if every character of it can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{key} has a character that is not valid Unicode at position {error.start}"
        ) from None
    return text
