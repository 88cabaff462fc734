"""The results of an evaluation: single answers, scores by task, and a file to resume from."""

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
_FILE_START = json.dumps({"kind": KIND})[:-1].encode()  # of every results file
_OTHERS = {"model": "another checkpoint", "data": "another dataset"}
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
OVERALL, MIXED = "all", "mixed"


@dataclass(frozen=True)
class Result:
    """The answer to a line of a dataset, and its score.

    Attributes:
        file: The name of the line's file in the report.
        line: The number of the line, from 1.
        task: The task it counts under.
        metric: The metric of the score.
        question: The text of the last user message.
        media: Pictures, then videos, as paths relative to the file's folder.
        expected: The accepted answers.
        answer: The model's answer.
        score: From 0 to 1.
        finish_reason: As in `Reply`; None if the answer was chosen or could not be generated.
        prompt_tokens: Tokens of the prompt.
        generation_tokens: Tokens of the answer.
        error: Why the line could not be asked, or None.
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
        """The file's name and the line's number."""
        return self.file, self.line


@dataclass(frozen=True)
class TaskScore:
    """The score of the lines of one task that have the same metric.

    Attributes:
        task: The name of the task.
        metric: The metric.
        n: The number of lines.
        right: The sum of their scores; with most metrics the number of right answers.
        bad: How many lines could not be asked; they count as wrong.
        cut: How many answers were cut at `max_tokens`.
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
        """The 95 % confidence interval of the share, see `wilson_interval`."""
        return wilson_interval(self.right, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, the share and the interval as JSON values."""
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
    """The scores of an evaluation, and what they were measured on.

    Attributes:
        model: Name, source, digest and precision of the checkpoint.
        data: The files, their digest, and the tasks and limit that selected lines.
        settings: The other options and the environment that answers depend on.
        versions: The versions of this package and of MLX.
        tasks: The scores, sorted by task and metric.
        overall: The score over all lines, each with the same weight.
        total: The number of selected lines; more than `overall.n` if the evaluation was stopped.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    tasks: tuple[TaskScore, ...]
    overall: TaskScore
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
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
    """Return the scores by task and metric, and over all `results`, which must not be empty."""
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
    """Return the score of `results` under the given names."""
    return TaskScore(
        task=task,
        metric=metric,
        n=len(results),
        right=math.fsum(one.score for one in results),
        bad=sum(one.error is not None for one in results),
        cut=sum(one.finish_reason == "length" for one in results),
    )


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share `right / n`, from 0 to 1.

    It has no continuity correction. For scores other than 0 and 1 it is somewhat too wide, since
    their variance is at most that of zeros and ones with the same mean.

    Source: E. B. Wilson, https://doi.org/10.1080/01621459.1927.10502953.
    """
    share, z2 = right / n, Z_95**2 / n  # z2 is z^2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


class ResultsFile:
    """An open and locked JSONL file of results, from which an evaluation can be resumed.

    Attributes:
        results: The results that were in the file, by file name and line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], restart: bool) -> None:
        """Open the file, or create it.

        Args:
            path: The file.
            header: What the results depend on: "model" and "data", compared by their "digest",
                "settings", compared as a whole, and "versions", not compared.
            restart: Delete the results in the file.

        Raises:
            DatasetError: It is not a results file or damaged, another process has it open, or
                its results are for another `header`.
        """
        self._path = path
        try:
            self._fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise DatasetError(f"cannot open the results file {path}: {error.strerror}") from None
        try:
            self.results = self._read(header, restart)
        except BaseException:
            self.close()
            raise

    def append(self, result: Result) -> None:
        """Append `result` and wait until it is on the disk."""
        self._write({**asdict(result)})

    def close(self) -> None:
        """Close and unlock the file."""
        os.close(self._fd)

    def _read(self, header: Mapping[str, Any], restart: bool) -> dict[tuple[str, int], Result]:
        """Read the results; write the header to a new file, and cut an incomplete last line."""
        if os.fstat(self._fd).st_size > LARGEST_FILE:
            raise DatasetError(
                f"{self._path} is larger than {LARGEST_FILE:,} bytes; choose another file "
                "with --results"
            )
        try:
            lock_descriptor(self._fd)
        except OSError:
            raise DatasetError(f"another run is writing to {self._path}; wait for it") from None
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        if not (data.startswith(_FILE_START) or _FILE_START.startswith(data)):
            raise DatasetError(
                f"{self._path} is not a results file of mlx-smolvlm; choose another with --results"
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
        """Refuse results whose header, in `line`, does not match `header`."""
        old_header = self._parse_line(line, 1)
        advice = "choose another file with --results, or start over with --restart"
        if old_header.get("version") != VERSION:
            raise DatasetError(f"{self._path} is of another version of mlx-smolvlm; {advice}")
        for part, new in header.items():
            old = old_header.get(part)
            if part in _OTHERS:
                old = old.get("digest") if isinstance(old, dict) else old
                if old != new["digest"]:
                    raise DatasetError(f"{self._path} has results of {_OTHERS[part]}; {advice}")
            elif part == "settings" and old != new:
                changes = _describe_changes(old, new)
                raise DatasetError(f"{self._path} has results of {changes}; {advice}")

    def _parse_result(self, line: bytes, number: int) -> Result:
        """Parse line `number` of the file as a result."""
        try:
            result = read_record(Result, self._parse_line(line, number))
        except ValueError:
            raise self._damage_error(number) from None
        if result.line < 1 or not 0 <= result.score <= 1:
            raise self._damage_error(number)
        return result

    def _parse_line(self, line: bytes, number: int) -> dict[str, Any]:
        """Parse line `number` of the file as a JSON object."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise self._damage_error(number)
        return values

    def _damage_error(self, number: int) -> DatasetError:
        return DatasetError(
            f"{self._path}:{number} is damaged; remove the line, or start over with --restart"
        )

    def _write(self, values: Mapping[str, Any]) -> None:
        """Append `values` as a line of JSON, and wait until it is on the disk."""
        # File names may hold bytes that are not UTF-8; Python keeps them as lone surrogates.
        text = json.dumps(values, ensure_ascii=False)
        left = text.encode(errors="backslashreplace") + b"\n"
        while left:
            left = left[os.write(self._fd, left) :]
        os.fsync(self._fd)


def _describe_changes(old: Any, new: Mapping[str, Any]) -> str:
    """Return the settings that differ, as text."""
    if not isinstance(old, dict):
        return "unknown settings"
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name:.40} {_format_value(old.get(name))}, not {_format_value(new.get(name))}"
        for name in names[:5]
    )


def _format_value(value: Any) -> str:
    """Return a setting as text for a message."""
    return value[:40] if isinstance(value, str) else shorten(value)
