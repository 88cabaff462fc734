"""What the results of an evaluation add up to, by task."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
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
    """A results file that is open and locked; `results` are the results in it, by file and line."""

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
            self.results = self._read(header, restart)
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
        results = [self._parse_result(line, number) for number, line in enumerate(lines[:-1], 2)]
        return {result.key: result for result in results}

    def _check(self, line: bytes, header: Mapping[str, Any]) -> None:
        """Refuse results that depend on something else than `header`."""
        stated = self._parse_line(line, 1)
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
                changed = _describe_changes(there, wanted)
                raise DatasetError(f"{self._path} holds results of {changed}; {advice}")

    def _parse_result(self, line: bytes, number: int) -> Result:
        """The result that `line` states."""
        try:
            result = read_record(Result, self._parse_line(line, number))
        except ValueError:
            raise self._damage_error(number) from None
        if result.line < 1 or not 0 <= result.score <= 1:
            raise self._damage_error(number)
        return result

    def _parse_line(self, line: bytes, number: int) -> dict[str, Any]:
        """The JSON object in `line`."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise self._damage_error(number)
        return values

    def _damage_error(self, number: int) -> DatasetError:
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


def _describe_changes(there: Any, wanted: Mapping[str, Any]) -> str:
    """Which settings differ, in words."""
    if not isinstance(there, dict):
        return "unknown settings"
    names = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
    return ", ".join(
        f"{name:.40} {_format_value(there.get(name))}, not {_format_value(wanted.get(name))}"
        for name in names[:5]
    )


def _format_value(value: Any) -> str:
    """A setting as a message shows it."""
    return value[:40] if isinstance(value, str) else shorten(value)


Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
OVERALL, MIXED = "all", "mixed"


@dataclass(frozen=True)
class TaskScore:
    """The lines of one task that are judged by one metric.

    Attributes:
        task: Its name.
        metric: By which they are judged.
        n: Lines.
        right: The sum of their scores; with most metrics, the number of right answers.
        bad: Lines that could not be asked; they count as wrong.
        cut: Answers that were as long as they may be, and so perhaps longer.
    """

    task: str
    metric: str
    n: int
    right: float
    bad: int
    cut: int

    @property
    def share(self) -> float:
        """The mean score, 0 to 1."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share."""
        return wilson_interval(self.right, self.n)

    def to_dict(self) -> dict[str, Any]:
        """All fields, share and interval, ready for JSON."""
        return {
            "task": self.task,
            "metric": self.metric,
            "n": self.n,
            "right": self.right,
            "share": self.share,
            "interval": list(self.interval),
            "bad": self.bad,
            "cut": self.cut,
        }


@dataclass(frozen=True)
class Report:
    """What an evaluation found out.

    Attributes:
        model: Name, source, digest and precision of the checkpoint.
        data: Files of the dataset, their digest, and which lines were chosen.
        settings: What else the answers depend on.
        versions: Of this package and of MLX.
        tasks: By name of task, then metric.
        overall: Over all lines; each counts the same.
        total: Lines that were chosen; more than `overall.n` if the evaluation was stopped.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    tasks: tuple[TaskScore, ...]
    overall: TaskScore
    total: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {
            "model": dict(self.model),
            "data": dict(self.data),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "tasks": [task.to_dict() for task in self.tasks],
            "overall": self.overall.to_dict(),
            "total": self.total,
        }


def score_tasks(results: Sequence[Result]) -> tuple[tuple[TaskScore, ...], TaskScore]:
    """Scores by task and metric, and over all `results`, of which there is one or more."""
    kinds = sorted({(one.task, one.metric) for one in results})
    tasks = tuple(
        _sum_scores(
            task, metric, [one for one in results if (one.task, one.metric) == (task, metric)]
        )
        for task, metric in kinds
    )
    metrics = {metric for _, metric in kinds}
    return tasks, _sum_scores(OVERALL, metrics.pop() if len(metrics) == 1 else MIXED, results)


def _sum_scores(task: str, metric: str, results: Sequence[Result]) -> TaskScore:
    """The score of `results`."""
    return TaskScore(
        task=task,
        metric=metric,
        n=len(results),
        right=math.fsum(one.score for one in results),
        bad=sum(one.error is not None for one in results),
        cut=sum(one.finish_reason == "length" for one in results),
    )


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `n`, without continuity correction.

    With scores between 0 and 1 it is rather too wide, since their variance is at most that
    of right and wrong with the same mean.

    Source: E. B. Wilson, https://doi.org/10.1080/01621459.1927.10502953.
    """
    share, z2 = right / n, Z_95**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
