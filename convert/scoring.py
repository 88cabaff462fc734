"""How right two checkpoints' answers to datasets are, line by line the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.convert.comparison import TaskScore
from mlx_smolvlm.smolvlm import SmolVLM

if TYPE_CHECKING:  # datasets are read with what trains; who gives none does without
    from mlx_smolvlm.train.cases import Dataset
    from mlx_smolvlm.train.results import Result


def read_data(paths: Sequence[Path], limit: int | None) -> Dataset | None:
    """The lines of the datasets at `paths`, of each task the first `limit`; None without paths.

    Raises:
        DatasetError: A file or a line cannot be used.
    """
    if not paths:
        return None
    from mlx_smolvlm.train.cases import EvaluationOptions, read_cases

    return read_cases(list(paths), EvaluationOptions(limit=limit))


def judge(vlm: SmolVLM, data: Dataset | None, step: Callable[[str], None]) -> list[Result]:
    """The answers of `vlm` to every line of `data`, judged; `step` is called for each.

    Raises:
        MediaError: A picture or video cannot be read; it names the line.
        PromptError: A line is longer than the context; it names the line.
    """
    if data is None:
        return []
    from mlx_smolvlm.train.cases import EvaluationOptions
    from mlx_smolvlm.train.evaluation import answered

    results = []
    for number, case in enumerate(data.chosen, 1):
        step(f"line {number}")
        results.append(answered(vlm, case, EvaluationOptions()))
    return results


def task_scores(a: Sequence[Result], b: Sequence[Result]) -> tuple[TaskScore, ...]:
    """Scores of both by task and metric, from results of the same lines."""
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for one, other in zip(a, b, strict=True):
        pairs.setdefault((one.task, one.metric), []).append((one, other))
    return tuple(
        TaskScore(
            task=task,
            metric=metric,
            examples=len(found),
            reference=sum(one.score for one, _ in found) / len(found),
            other=sum(other.score for _, other in found) / len(found),
            same_answers=sum(one.answer == other.answer for one, other in found),
        )
        for (task, metric), found in sorted(pairs.items())
    )
