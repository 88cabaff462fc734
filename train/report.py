"""What the results of an evaluation add up to, by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_smolvlm.train.results import Result

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
        return wilson(self.right, self.n)

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


def scores_of(results: Sequence[Result]) -> tuple[tuple[TaskScore, ...], TaskScore]:
    """Scores by task and metric, and over all `results`, of which there is one or more."""
    kinds = sorted({(one.task, one.metric) for one in results})
    tasks = tuple(
        _summed(task, metric, [one for one in results if (one.task, one.metric) == (task, metric)])
        for task, metric in kinds
    )
    metrics = {metric for _, metric in kinds}
    return tasks, _summed(OVERALL, metrics.pop() if len(metrics) == 1 else MIXED, results)


def _summed(task: str, metric: str, results: Sequence[Result]) -> TaskScore:
    """The score of `results`."""
    return TaskScore(
        task=task,
        metric=metric,
        n=len(results),
        right=math.fsum(one.score for one in results),
        bad=sum(one.error is not None for one in results),
        cut=sum(one.finish_reason == "length" for one in results),
    )


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `n`, without continuity correction.

    With scores between 0 and 1 it is rather too wide, since their variance is at most that
    of right and wrong with the same mean.

    Source: E. B. Wilson, https://doi.org/10.1080/01621459.1927.10502953.
    """
    share, z2 = right / n, Z_95**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
