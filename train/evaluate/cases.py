"""Selects the lines of datasets that an evaluation asks, and the metric of each."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.errors import DatasetError, shorten
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.train.dataset import Example, read_dataset
from mlx_smolvlm.train.evaluate.metrics import METRICS, Metric, check_metric, find_option_letter

if TYPE_CHECKING:
    from mlx_smolvlm.media.tiles import Detail

SPLITS = ("test", "valid")  # in a folder, the first file of these is evaluated


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        metric: The metric of lines that name none; None takes "choices" if the line has choices,
            else "exact".
        tasks: The tasks to evaluate; empty for all.
        limit: Lines of each task to ask, from its first; None for all.
        max_tokens: Most tokens of an answer.
        detail: As in `SmolVLM.ask`.
        skip_bad: Count a line that cannot be asked as wrong instead of raising.

    Raises:
        ValueError: A value is out of range.
    """

    metric: Metric | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int = 256
    detail: Detail = "high"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_metric(self.metric)
        for name in ("limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")


@dataclass(frozen=True)
class Case:
    """A line of a dataset to ask.

    Attributes:
        example: The line.
        file: The name of its file in the report.
        task: The task it counts under.
        metric: The metric of its answer.
    """

    example: Example
    file: str
    task: str
    metric: Metric

    @property
    def key(self) -> tuple[str, int]:
        """The file's name and the line's number."""
        return self.file, self.example.line


@dataclass(frozen=True)
class Dataset:
    """The lines to ask.

    Attributes:
        files: The names of the files in the report.
        digest: SHA-256 of all lines and of the names and sizes of their media, in hexadecimal.
        cases: The lines, in order.
    """

    files: tuple[str, ...]
    digest: str
    cases: tuple[Case, ...]


def read_cases(paths: Sequence[str | Path], options: EvaluationOptions) -> Dataset:
    """Read datasets and select the lines to ask.

    Args:
        paths: JSONL files, or folders with a test.jsonl or a valid.jsonl.
        options: `tasks` and `limit` select lines, `metric` is the default metric.

    Raises:
        DatasetError: A file or a line cannot be used, a file is given twice, or there is no such
            task.
    """
    files = [_find_file(expand_path(path, DatasetError)) for path in paths]
    read = [read_dataset(file) for file in files]
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise DatasetError(f"{twice[0]} is given twice; give each file once")
    names = _name_files(files)
    cases = [
        _make_case(example, name, options.metric)
        for name, examples in zip(names, read, strict=True)
        for example in examples
    ]
    digest = _compute_digest(names, files, cases)
    return Dataset(tuple(names), digest, tuple(_select_cases(cases, options)))


def _find_file(path: Path) -> Path:
    """Return `path`, or the file of `SPLITS` in it if it is a folder."""
    if not os.path.isdir(path):  # Path.is_dir raises where a name is too long
        return path
    for split in SPLITS:
        if (path / f"{split}.jsonl").is_file():
            return path / f"{split}.jsonl"
    raise DatasetError(f"{path} has neither test.jsonl nor valid.jsonl; give a file instead")


def _name_files(files: Sequence[Path]) -> list[str]:
    """Return the paths of `files` relative to the innermost folder that holds them all."""
    paths = [file.resolve() for file in files]
    top = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(top).as_posix() for path in paths]


def _make_case(example: Example, file: str, default: Metric | None) -> Case:
    """Select the metric of `example`.

    Raises:
        DatasetError: The metric is unknown, or gives every answer to the line a 0.
    """
    fallback: Metric = default or ("choices" if example.choices else "exact")
    try:
        metric = fallback if example.metric is None else check_metric(example.metric)
    except ValueError:
        raise DatasetError(
            f"{example.where}: unknown metric {shorten(example.metric)}; "
            f"the metrics are {', '.join(METRICS)}"
        ) from None
    reason = None
    if metric == "choices" and not example.choices:
        reason = "it has no choices"
    elif metric == "choices" and not set(example.answers) & set(example.choices):
        reason = f"the answer {shorten(example.answers[0])} is not one of its choices"
    elif metric == "letter" and not all(map(find_option_letter, example.answers)):
        reason = f"the answer {shorten(example.answers[0])} does not begin with an option letter"
    if reason:
        raise DatasetError(f"{example.where}: {reason}; change the line or its metric ({metric})")
    return Case(example, file, example.task or example.file.stem, metric)


def _select_cases(cases: Sequence[Case], options: EvaluationOptions) -> list[Case]:
    """Return the cases of the tasks and within the limit of `options`, in order."""
    known = dict.fromkeys(case.task for case in cases)
    for task in options.tasks:
        if task not in known:
            raise DatasetError(f"there is no task {task!r}; there are {', '.join(known)}")
    selected = []
    counts: Counter[str] = Counter()
    for case in cases:
        if options.tasks and case.task not in options.tasks:
            continue
        counts[case.task] += 1
        if options.limit is None or counts[case.task] <= options.limit:
            selected.append(case)
    return selected


def _compute_digest(names: Sequence[str], files: Sequence[Path], cases: Sequence[Case]) -> str:
    """Return SHA-256 of the names and bytes of `files` and the names and sizes of their media.

    Media are not read, since reading videos could take minutes.
    """
    total = hashlib.sha256()
    for name, file in zip(names, files, strict=True):
        data = file.read_bytes()
        total.update(f"{name} {len(data)}\n".encode())
        total.update(data)
    media = [path for case in cases for path in (*case.example.images, *case.example.videos)]
    for path in dict.fromkeys(media):
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
    return total.hexdigest()
