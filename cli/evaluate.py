"""`mlx-smolvlm eval`: accuracy of a checkpoint on datasets, by task."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.chat import INTERRUPTED, load_model
from mlx_smolvlm.cli.options import Detail, as_text, check_bits
from mlx_smolvlm.cli.render import Bar, say, table, warn, write, write_json
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.quoting import escape_controls

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions
    from mlx_smolvlm.train.cases import EvaluationOptions
    from mlx_smolvlm.train.evaluation import Evaluation
    from mlx_smolvlm.train.report import Report, TaskScore
    from mlx_smolvlm.train.results import Result

HEADINGS = ("task", "metric", "right", "share", "95 % interval")


@dataclass(frozen=True)
class EvaluateRequest:
    """What `eval` was asked for; a `results` of None is a file named after model and data."""

    model: str
    data: tuple[str, ...]
    options: EvaluationOptions
    adapter: Path | None
    bits: int | None
    cache: CacheOptions
    offline: bool
    results: Path | None
    restart: bool
    show_errors: int
    json: bool
    markdown: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.json and self.markdown:
            raise typer.BadParameter("it does not go with --markdown", param_hint="--json")

    @property
    def results_file(self) -> Path:
        """Where the results go."""
        if self.results is not None:
            return expand_path(self.results)
        adapters = [] if self.adapter is None else [str(self.adapter)]
        paths = (Path(name).resolve() for name in (self.model, *adapters, *self.data))
        parts = (path.stem if path.suffix == ".jsonl" else path.name for path in paths)
        return Path(
            "-".join(["eval", *(re.sub(r"[^\w.@-]+", "-", one) for one in parts)]) + ".jsonl"
        )


def make_evaluation_options(
    *,
    metric: str | None,
    tasks: str | None,
    limit: int | None,
    max_tokens: int,
    detail: Detail,
    skip_bad: bool,
) -> EvaluationOptions:
    """What to ask and how; `EvaluationOptions` itself owns the ranges.

    Raises:
        typer.BadParameter: It names the option and its range.
    """
    from mlx_smolvlm.train.cases import EvaluationOptions

    names = "" if tasks is None else as_text("--tasks", tasks)
    try:
        return EvaluationOptions(
            metric=metric,  # type: ignore[arg-type]  # it checks it
            tasks=tuple(name for name in map(str.strip, names.split(",")) if name),
            limit=limit,
            max_tokens=max_tokens,
            detail=detail,
            skip_bad=skip_bad,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise typer.BadParameter(rest, param_hint=f"--{name.replace('_', '-')}") from None


def evaluate(request: EvaluateRequest) -> int:
    """Put the accuracies on stdout; the exit status.

    What is cheap to check comes first: every line of the datasets, then the model.
    """
    from mlx_smolvlm.train.evaluation import Evaluation, read_cases

    dataset = read_cases(request.data, request.options)
    vlm = load_model(request)
    evaluation = Evaluation(vlm, dataset, request.options)
    try:
        run(evaluation, request)
    except KeyboardInterrupt:
        done = len(evaluation.results)
        say(f"stopped after {done} of {evaluation.total} lines; the same command goes on")
        return INTERRUPTED
    report = evaluation.report()
    if request.json:
        write_json(report.to_dict())
    else:
        write(markdown(report) if request.markdown else plain(report))
    show_notes(report)
    show_errors(evaluation.results, request.show_errors)
    return 0


def run(evaluation: Evaluation, request: EvaluateRequest) -> None:
    """Ask all lines, with a bar on stderr."""
    path = request.results_file
    say(f"results: {path}", dim=True)
    with contextlib.closing(Bar()) as bar:
        right = 0.0
        for count, result in enumerate(evaluation.run(path, request.restart), 1):
            right += result.score
            share = f"{100 * right / count:.1f} % of {count} right"
            done = len(evaluation.results)
            bar.draw(done, evaluation.total, f"{done} of {evaluation.total} lines, {share}")


def show_notes(report: Report) -> None:
    """Say on stderr what a reader of the figures should know."""
    if bad := report.overall.bad:
        warn(f"{_lines(bad)} could not be asked and count as wrong; the results say why")
    if cut := report.overall.cut:
        limit = report.settings["max_tokens"]
        warn(f"{_lines(cut)} got an answer cut at {limit} tokens; see --max-tokens")


def show_errors(results: Sequence[Result], most: int) -> None:
    """Put the first `most` lines that are not right on stderr, and what was answered."""
    for result in [one for one in results if one.score < 1][:most]:
        media = f" {', '.join(result.media)}" if result.media else ""
        say(f"{result.file}:{result.line} ({result.task}, {result.metric}){media}")
        say(f"  question: {_flat(result.question)}")
        say(f"  expected: {' | '.join(map(_flat, result.expected))}")
        got = f"  got:      {_flat(result.answer)}"
        say(got if result.error is None else f"  error:    {_flat(result.error)}")


def plain(report: Report) -> str:
    """The accuracies as a table for a terminal."""
    return table([HEADINGS, *map(_cells, _rows(report))])


def markdown(report: Report) -> str:
    """The accuracies as a table for a model card, and what they are of."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, _rows(report))]
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    model, data, settings = report.model, report.data, report.settings
    digests = f"checkpoint {model['digest'][:12]}, data {data['digest'][:12]}"
    chosen = "" if data["limit"] is None else f" (the first {data['limit']} of each task)"
    return (
        "\n".join(lines)
        + f"\n\n{_escaped(model['source'])} on {_escaped(', '.join(data['files']))}{chosen}: "
        + f"detail {settings['detail']}, at most {settings['max_tokens']} tokens, greedy, "
        + f"{settings['dtype']}; {digests}; mlx-smolvlm {report.versions['mlx-smolvlm']}.\n"
    )


def _rows(report: Report) -> list[TaskScore]:
    """The tasks, and all of them together if there are several."""
    return [*report.tasks, *([report.overall] if len(report.tasks) > 1 else [])]


def _cells(task: TaskScore) -> tuple[str, ...]:
    """A row of the table."""
    low, high = task.interval
    right = f"{task.right:.0f}" if task.right.is_integer() else f"{task.right:.1f}"
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    return task.task, task.metric, f"{right} of {task.n}", f"{100 * task.share:.1f} %", interval


def _escaped(text: str) -> str:
    """`text` as it shows in a cell of a Markdown table."""
    return re.sub(r"([\\|`*_<\[])", r"\\\1", _flat(escape_controls(text)))


def _flat(text: str) -> str:
    """`text` in one line."""
    return " ".join(text.split())


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"
