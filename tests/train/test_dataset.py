"""Datasets: what a line means, and what is said of one that means nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_smolvlm.errors import DatasetError
from mlx_smolvlm.train.dataset import read_dataset

TEXT = {"type": "text", "text": "What is it?"}


def dataset(folder: Path, *lines: Any, name: str = "train.jsonl") -> Path:
    """`folder` with a dataset of `lines` and the files a.png, b.png and c.mp4."""
    for media in ("a.png", "b.png", "c.mp4"):
        (folder / media).write_bytes(b"")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def test_a_question_in_short(tmp_path: Path) -> None:
    line = {"image": "a.png", "question": "What is it?", "answer": "A cat.", "task": "animals"}
    (example,) = read_dataset(dataset(tmp_path, line))
    assert example.messages == (
        {"role": "user", "content": [{"type": "image"}, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    )
    assert example.prompt == [example.messages[0]]
    assert example.images == (tmp_path / "a.png",)
    assert (example.answers, example.task, example.line) == (("A cat.",), "animals", 1)
    assert (example.metric, example.choices, example.videos) == (None, (), ())
    assert example.where == f"{tmp_path / 'train.jsonl'}:1"


def test_messages_with_media_where_their_items_stand(tmp_path: Path) -> None:
    line = {
        "messages": [
            {"role": "user", "content": [TEXT, {"type": "video"}, {"type": "image"}]},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [{"type": "image"}, TEXT]},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": ["a.png", "b.png"],
        "videos": ["c.mp4"],
        "system": "Be brief.",
    }
    (example,) = read_dataset(dataset(tmp_path, "", line))
    kinds = [[item["type"] for item in m["content"]] for m in example.messages]
    expected = [["text"], ["text", "video", "image"], ["text"], ["image", "text"], ["text"]]
    assert kinds == expected
    assert example.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert example.videos == (tmp_path / "c.mp4",)
    assert (example.line, example.answers) == (2, ("A cat.",))


def test_media_without_items_come_first(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    line = {"messages": said, "images": ["a.png", "b.png"], "videos": ["c.mp4"]}
    (example,) = read_dataset(dataset(tmp_path, line))
    kinds = [item["type"] for item in example.messages[0]["content"]]
    assert kinds == ["image", "image", "video", "text"]


def test_answers_are_what_is_accepted(tmp_path: Path) -> None:
    line = {
        "question": "?",
        "answers": ["Yes.", "yes"],
        "metric": "exact",
        "choices": ["Yes.", "No."],
    }
    (example,) = read_dataset(dataset(tmp_path, line, name="valid.jsonl"), "valid")
    assert example.messages[-1]["content"] == [{"type": "text", "text": "Yes."}]
    assert example.answers == ("Yes.", "yes")
    assert (example.metric, example.choices) == ("exact", ("Yes.", "No."))


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
BAD: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ([1], "must be a JSON object"),
    ({"prompt": "?"}, "unknown key 'prompt'"),
    ({"answer": "!"}, "neither messages nor a question"),
    ({"question": "?"}, "it has no answer: end with an assistant's"),
    ({"question": 3, "answer": "!"}, "question must be a text"),
    ({"question": "?", "answer": " "}, "answer must be a text"),
    ({"question": "?", "answers": []}, "answers is empty"),
    ({"question": "?", "answers": [3]}, "answers must be a list of texts"),
    ({"question": "?", "answer": "!", "choices": ["a"]}, "choices must have two"),
    ({"question": "?", "answer": "!", "choices": ["a", "!", "a"]}, "choices has 'a' twice"),
    ({"question": "?", "answer": "!", "choices": ["!", "\n"]}, "choices has an empty text"),
    ({"image": "none.png", "question": "?", "answer": "!"}, "no file 'none.png'"),
    ({"image": "a.png", "images": ["a.png"], "question": "?"}, "both image and images"),
    ({"messages": [USER, ANSWER], "question": "?"}, "both messages and question"),
    ({"messages": []}, "one or more messages"),
    ({"messages": [USER]}, "it has no answer: end with an assistant's"),
    ({"messages": [ANSWER]}, "message 1 is an answer"),
    ({"messages": [USER, ANSWER, ANSWER]}, "message 3 is an answer"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 is an empty"),
    ({"messages": [USER, {"role": "bot", "content": "!"}]}, "message 2 has the role 'bot'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "1 image items, but images has 0",
    ),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": ""}]},
            ],
            "images": ["a.png"],
        },
        "message 2 is an answer with a picture",
    ),
    (
        {"messages": [{"role": "system", "content": "."}, USER, ANSWER], "system": "."},
        "both system",
    ),
    ({"question": "\ud800", "answer": "!"}, "not valid Unicode"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_named(line: Any, reason: str, tmp_path: Path) -> None:
    good = {"question": "?", "answer": "!"}
    with pytest.raises(DatasetError, match=r"train\.jsonl:2: .*" + reason.replace("(", r"\(")):
        read_dataset(dataset(tmp_path, good, line))


def test_a_file_that_is_absent_empty_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train\.jsonl cannot be read"):
        read_dataset(tmp_path)
    with pytest.raises(DatasetError, match="is empty"):
        read_dataset(dataset(tmp_path, ""))
    (tmp_path / "train.jsonl").write_bytes(b"\xff")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_dataset(tmp_path / "train.jsonl")
