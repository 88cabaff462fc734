"""Which lines of datasets an evaluation asks, and how each is judged."""

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

SPLITS = ("test", "valid")  # of a folder, the first that is there


@dataclass(frozen=True)
class EvaluationOptions:
    """What to ask, and how.

    Attributes:
        metric: For lines that name none; None takes "choices" where a line has choices, and
            "exact" elsewhere.
        tasks: Only lines of these tasks; none stands for all.
        limit: Of each task, the first so many lines.
        max_tokens: Tokens of an answer at most.
        detail: As in `SmolVLM.ask`.
        skip_bad: Count a line that cannot be asked as wrong, instead of stopping there.

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
    """A line of a dataset, what to count it under, and how to judge the answer to it.

    `file` is what the report calls the line's file.
    """

    example: Example
    file: str
    task: str
    metric: Metric

    @property
    def key(self) -> tuple[str, int]:
        """File and line."""
        return self.file, self.example.line


@dataclass(frozen=True)
class Dataset:
    """The cases to ask, in order, with the names of their files and a digest of all lines."""

    files: tuple[str, ...]
    digest: str
    cases: tuple[Case, ...]


def read_cases(paths: Sequence[str | Path], options: EvaluationOptions) -> Dataset:
    """The lines of the files `paths`, in order, and which of them to ask.

    Args:
        paths: JSONL files, or folders with a test.jsonl or else a valid.jsonl.
        options: They choose metrics and lines.

    Raises:
        DatasetError: A file or a line cannot be used, or no line is chosen.
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
    """The file at `path`, or the one in the folder there that is not for training."""
    if not os.path.isdir(path):  # Path.is_dir raises where a name is too long
        return path
    for split in SPLITS:
        if (path / f"{split}.jsonl").is_file():
            return path / f"{split}.jsonl"
    raise DatasetError(f"{path} has neither test.jsonl nor valid.jsonl; name a file in it")


def _name_files(files: Sequence[Path]) -> list[str]:
    """What to call `files`: their paths from the folder that they are all in."""
    paths = [file.resolve() for file in files]
    top = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(top).as_posix() for path in paths]


def _make_case(example: Example, file: str, default: Metric | None) -> Case:
    """How to judge `example`; one that no answer could satisfy is refused.

    Raises:
        DatasetError: It names file and line.
    """
    usual: Metric = default or ("choices" if example.choices else "exact")
    try:
        metric = usual if example.metric is None else check_metric(example.metric)
    except ValueError:
        raise DatasetError(
            f"{example.where}: the metric {shorten(example.metric)} is not known; "
            f"known are {', '.join(METRICS)}"
        ) from None
    reason = None
    if metric == "choices" and not example.choices:
        reason = "it has no choices to be judged by"
    elif metric == "choices" and not set(example.answers) & set(example.choices):
        reason = f"the answer {shorten(example.answers[0])} is none of its choices"
    elif metric == "letter" and not all(map(find_option_letter, example.answers)):
        reason = f"the answer {shorten(example.answers[0])} begins with no letter of an option"
    if reason:
        raise DatasetError(f"{example.where}: {reason}; change the line or its metric ({metric})")
    return Case(example, file, example.task or example.file.stem, metric)


def _select_cases(cases: Sequence[Case], options: EvaluationOptions) -> list[Case]:
    """The cases to ask, in order."""
    known = dict.fromkeys(case.task for case in cases)
    for task in options.tasks:
        if task not in known:
            raise DatasetError(f"there is no task {task!r}; there are {', '.join(known)}")
    chosen = []
    counts: Counter[str] = Counter()
    for case in cases:
        if options.tasks and case.task not in options.tasks:
            continue
        counts[case.task] += 1
        if options.limit is None or counts[case.task] <= options.limit:
            chosen.append(case)
    return chosen


def _compute_digest(names: Sequence[str], files: Sequence[Path], cases: Sequence[Case]) -> str:
    """Digest of names and bytes of `files`, and of names and sizes of their media.

    Media are not read: an evaluation of videos would begin with minutes of reading.
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
