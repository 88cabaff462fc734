"""Results of an evaluation on disk: a line each, so that a stopped one can go on.

The first line states what the answers depend on. Each result is on disk before the next line
of the dataset is asked; a last line that was not written whole is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import DatasetError, shorten
from mlx_smolvlm.files import lock_descriptor, open_regular
from mlx_smolvlm.records import read_record
from mlx_smolvlm.train.dataset import LARGEST_FILE

KIND = "mlx-smolvlm evaluation"
VERSION = 1
_MARK = json.dumps({"kind": KIND})[:-1].encode()  # what a results file begins with
_NAMES = {"model": "another checkpoint", "data": "another dataset"}


@dataclass(frozen=True)
class Result:
    """The answer to a line of a dataset.

    Attributes:
        file: The dataset's file, as the report calls it.
        line: Its number, from 1.
        task: What it counts under.
        metric: How it was judged.
        question: The text of the last question.
        media: Pictures, then videos, as paths from the file's folder.
        expected: The accepted answers.
        answer: What the model answered.
        score: How right that is, 0 to 1.
        finish_reason: Why the answer ended, as in `Reply`; None if none was generated.
        prompt_tokens: Tokens of the prompt.
        generation_tokens: Tokens of the answer.
        error: Why the line could not be asked; None if it could.
    """

    file: str
    line: int
    task: str
    metric: str
    question: str
    media: tuple[str, ...]
    expected: tuple[str, ...]
    answer: str
    score: float
    finish_reason: str | None
    prompt_tokens: int
    generation_tokens: int
    error: str | None

    @property
    def key(self) -> tuple[str, int]:
        """File and line."""
        return self.file, self.line


class ResultsFile:
    """A results file that is open and locked; `found` are the results in it, by file and line."""

    def __init__(self, path: Path, header: Mapping[str, Any], restart: bool) -> None:
        """The file at `path`, made if it is not there.

        Args:
            path: A file.
            header: What the results depend on, by part: each has a digest, or counts whole.
            restart: Forget the results that are there.

        Raises:
            DatasetError: It is no results file or damaged, another run writes to it, or it was
                written for another `header`.
        """
        self._path = path
        try:
            self._fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise DatasetError(f"the results file {path}: {error.strerror}") from None
        try:
            self.found = self._read(header, restart)
        except BaseException:
            self.close()
            raise

    def append(self, result: Result) -> None:
        """Write `result`, for good."""
        self._write({**asdict(result)})

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _read(self, header: Mapping[str, Any], restart: bool) -> dict[tuple[str, int], Result]:
        """What is in the file, once it begins with `header` and ends with a whole line."""
        if os.fstat(self._fd).st_size > LARGEST_FILE:
            raise DatasetError(
                f"{self._path} is no regular file of at most {LARGEST_FILE:,} bytes; choose "
                "another (--results)"
            )
        try:
            lock_descriptor(self._fd)
        except OSError:
            raise DatasetError(f"another run is writing to {self._path}; wait for it") from None
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        if not (data.startswith(_MARK) or _MARK.startswith(data)):
            raise DatasetError(
                f"{self._path} is no results file of mlx-smolvlm; choose another (--results)"
            )
        first, *lines = data.split(b"\n")
        if restart or not lines:
            os.ftruncate(self._fd, 0)
            self._write({"kind": KIND, "version": VERSION, **header})
            return {}
        self._check(first, header)
        os.ftruncate(self._fd, len(data) - len(lines[-1]))
        results = [self._result(line, number) for number, line in enumerate(lines[:-1], 2)]
        return {result.key: result for result in results}

    def _check(self, line: bytes, header: Mapping[str, Any]) -> None:
        """Refuse results that depend on something else than `header`."""
        stated = self._values(line, 1)
        advice = "choose another file (--results), or begin anew (--restart)"
        if stated.get("version") != VERSION:
            raise DatasetError(f"{self._path} is of another version of mlx-smolvlm; {advice}")
        for part, wanted in header.items():
            there = stated.get(part)
            if part in _NAMES:
                there = there.get("digest") if isinstance(there, dict) else there
                if there != wanted["digest"]:
                    raise DatasetError(f"{self._path} holds results of {_NAMES[part]}; {advice}")
            elif part == "settings" and there != wanted:
                changed = _changes(there, wanted)
                raise DatasetError(f"{self._path} holds results of {changed}; {advice}")

    def _result(self, line: bytes, number: int) -> Result:
        """The result that `line` states."""
        try:
            result = read_record(Result, self._values(line, number))
        except ValueError:
            raise self._damaged(number) from None
        if result.line < 1 or not 0 <= result.score <= 1:
            raise self._damaged(number)
        return result

    def _values(self, line: bytes, number: int) -> dict[str, Any]:
        """The JSON object in `line`."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise self._damaged(number)
        return values

    def _damaged(self, number: int) -> DatasetError:
        return DatasetError(
            f"{self._path}:{number} is damaged; remove the line, or begin anew (--restart)"
        )

    def _write(self, values: Mapping[str, Any]) -> None:
        """Append a line of JSON, and see it to the disk."""
        # Names of files may have bytes that are no text, which Python holds as lone surrogates.
        text = json.dumps(values, ensure_ascii=False)
        left = text.encode(errors="backslashreplace") + b"\n"
        while left:
            left = left[os.write(self._fd, left) :]
        os.fsync(self._fd)


def _changes(there: Any, wanted: Mapping[str, Any]) -> str:
    """Which settings differ, in words."""
    if not isinstance(there, dict):
        return "unknown settings"
    names = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
    return ", ".join(
        f"{name:.40} {_short(there.get(name))}, not {_short(wanted.get(name))}"
        for name in names[:5]
    )


def _short(value: Any) -> str:
    """A setting as a message shows it."""
    return value[:40] if isinstance(value, str) else shorten(value)
