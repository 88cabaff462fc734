"""`mlx-smolvlm eval`: the accuracy of a checkpoint on datasets, by task."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_smolvlm.cli.args import (
    AdapterOption,
    BitsOption,
    MemoryLimitOption,
    OfflineOption,
    decode_text,
    make_cache_options,
    parse_detail,
    parse_memory_limit,
)
from mlx_smolvlm.cli.load import load_model
from mlx_smolvlm.cli.output import ProgressBar, format_table, say, warn, write, write_json
from mlx_smolvlm.cli.printer import INTERRUPTED
from mlx_smolvlm.errors import escape_controls
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions
    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.train.evaluate.cases import EvaluationOptions
    from mlx_smolvlm.train.evaluate.metrics import Metric
    from mlx_smolvlm.train.evaluate.report import Report, Result, TaskScore
    from mlx_smolvlm.train.evaluate.run import Evaluation

HEADINGS = ("task", "metric", "right", "share", "95 % interval")
EVAL_EPILOG = """\
\b
Examples:
  mlx-smolvlm eval demo data/test.jsonl
  mlx-smolvlm eval smolvlm-256m docvqa.jsonl --metric anls --max-tokens 64
  mlx-smolvlm eval ./my-model data --limit 50 --show-errors 10
  mlx-smolvlm eval ./my-model data/test.jsonl --markdown >> README.md"""


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, an alias, or demo.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="JSONL files, or folders with a test.jsonl."),
    ],
    metric: Annotated[
        Literal["exact", "normalized", "anls", "relaxed", "choices", "letter"] | None,
        typer.Option(
            metavar="METRIC",
            help="For lines that name none: exact, normalized, anls, relaxed, choices or letter; "
            "default: choices if a line has them, else exact.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Ask only the lines of these tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Ask the first N lines of each task.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 256,
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that keeps each result, so that a stopped run can continue; "
            "default: eval-MODEL-DATA.jsonl, here.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard earlier results, and start over.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Count a line that cannot be asked as wrong, and go on."),
    ] = False,
    show_errors: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Print N lines that are not right on stderr."),
    ] = 0,
    adapter: AdapterOption = None,
    bits: BitsOption = None,
    memory_limit: MemoryLimitOption = None,
    offline: OfflineOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table for a model card.")
    ] = False,
) -> None:
    """Measure how many answers to a dataset's questions are right, by task."""
    request = EvaluateRequest(
        model=model,
        data=tuple(decode_text("DATA", path) for path in data),
        options=make_evaluation_options(
            metric=metric,
            tasks=tasks,
            limit=limit,
            max_tokens=max_tokens,
            detail=parse_detail(detail),
            skip_bad=skip_bad,
        ),
        adapter=adapter,
        bits=bits,
        cache=make_cache_options(folder=None, kv_bits=None, max_kv_tokens=None),
        memory_limit=parse_memory_limit(memory_limit),
        offline=offline,
        results=results,
        restart=restart,
        show_errors=show_errors,
        json=json,
        markdown=markdown,
    )
    raise typer.Exit(print_evaluation(request))


@dataclass(frozen=True)
class EvaluateRequest:
    """The options of `eval`; without `results`, the file is named after model and data."""

    model: str
    data: tuple[str, ...]
    options: EvaluationOptions
    adapter: Path | None
    bits: int | None
    cache: CacheOptions
    memory_limit: int | None
    offline: bool
    results: Path | None
    restart: bool
    show_errors: int
    json: bool
    markdown: bool

    def __post_init__(self) -> None:
        if self.json and self.markdown:
            raise typer.BadParameter("it does not go with --markdown", param_hint="--json")

    @property
    def results_file(self) -> Path:
        """The file that results are kept in."""
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
    metric: Metric | None,
    tasks: str | None,
    limit: int | None,
    max_tokens: int,
    detail: Detail,
    skip_bad: bool,
) -> EvaluationOptions:
    """Return what to ask and how; `EvaluationOptions` checks the ranges.

    Raises:
        typer.BadParameter: A value is out of range; the message names the option.
    """
    from mlx_smolvlm.train.evaluate.cases import EvaluationOptions

    names = "" if tasks is None else decode_text("--tasks", tasks)
    try:
        return EvaluationOptions(
            metric=metric,
            tasks=tuple(name for name in map(str.strip, names.split(",")) if name),
            limit=limit,
            max_tokens=max_tokens,
            detail=detail,
            skip_bad=skip_bad,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise typer.BadParameter(rest, param_hint=f"--{name.replace('_', '-')}") from None


def print_evaluation(request: EvaluateRequest) -> int:
    """Evaluate a model, print the accuracies, and return the exit status.

    Every line of the datasets is checked before the model is loaded.
    """
    from mlx_smolvlm.train.evaluate.run import Evaluation, read_cases

    dataset = read_cases(request.data, request.options)
    vlm = load_model(request, frozenset({"kv_bits", "max_frames"}))
    evaluation = Evaluation(vlm, dataset, request.options)
    try:
        answer_lines(evaluation, request)
    except KeyboardInterrupt:
        done = len(evaluation.results)
        say(f"stopped after {done} of {evaluation.total} lines; the same command goes on")
        return INTERRUPTED
    report = evaluation.report()
    if request.json:
        write_json(report.to_dict())
    else:
        write(format_markdown(report) if request.markdown else format_plain(report))
    print_warnings(report)
    print_wrong_answers(evaluation.results, request.show_errors)
    return 0


def answer_lines(evaluation: Evaluation, request: EvaluateRequest) -> None:
    """Ask the questions of all lines, with a progress bar on stderr."""
    path = request.results_file
    say(f"results: {path}", dim=True)
    with contextlib.closing(ProgressBar()) as bar:
        right = 0.0
        for count, result in enumerate(evaluation.run(path, request.restart), 1):
            right += result.score
            share = f"{100 * right / count:.1f} % of {count} right"
            done = len(evaluation.results)
            bar.draw(done, evaluation.total, f"{done} of {evaluation.total} lines, {share}")


def print_warnings(report: Report) -> None:
    """Warn about lines that could not be asked and answers that were cut."""
    if bad := report.overall.bad:
        warn(f"{_count_lines(bad)} could not be asked and count as wrong; the results say why")
    if cut := report.overall.cut:
        limit = report.settings["max_tokens"]
        warn(f"{_count_lines(cut)} got an answer cut at {limit} tokens; see --max-tokens")


def print_wrong_answers(results: Sequence[Result], most: int) -> None:
    """Print the first `most` lines with a wrong answer, and the answer, on stderr."""
    for result in [one for one in results if one.score < 1][:most]:
        media = f" {', '.join(result.media)}" if result.media else ""
        say(f"{result.file}:{result.line} ({result.task}, {result.metric}){media}")
        say(f"  question: {_join_lines(result.question)}")
        say(f"  expected: {' | '.join(map(_join_lines, result.expected))}")
        got = f"  got:      {_join_lines(result.answer)}"
        say(got if result.error is None else f"  error:    {_join_lines(result.error)}")


def format_plain(report: Report) -> str:
    """Return the accuracies as a table for a terminal."""
    return format_table([HEADINGS, *map(_make_row, _list_scores(report))])


def format_markdown(report: Report) -> str:
    """Return the accuracies as a table for a model card, with model, data and settings."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_make_row, _list_scores(report))]
    lines = ["| " + " | ".join(map(_escape_markdown, row)) + " |" for row in rows]
    model, data, settings = report.model, report.data, report.settings
    digests = f"checkpoint {model['digest'][:12]}, data {data['digest'][:12]}"
    source = _escape_markdown(model["source"])
    files = _escape_markdown(", ".join(data["files"]))
    selection = "" if data["limit"] is None else f" (the first {data['limit']} of each task)"
    return (
        "\n".join(lines)
        + f"\n\n{source} on {files}{selection}: "
        + f"detail {settings['detail']}, at most {settings['max_tokens']} tokens, greedy, "
        + f"{settings['dtype']}; {digests}; mlx-smolvlm {report.versions['mlx-smolvlm']}.\n"
    )


def _list_scores(report: Report) -> list[TaskScore]:
    """Return the score of each task, and the overall score if there are several."""
    return [*report.tasks, *([report.overall] if len(report.tasks) > 1 else [])]


def _make_row(task: TaskScore) -> tuple[str, ...]:
    """Return a row of the table."""
    low, high = task.interval
    right = f"{task.right:.0f}" if task.right.is_integer() else f"{task.right:.1f}"
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    return task.task, task.metric, f"{right} of {task.n}", f"{100 * task.share:.1f} %", interval


def _escape_markdown(text: str) -> str:
    """Escape `text` for a cell of a Markdown table."""
    return re.sub(r"([\\|`*_<\[])", r"\\\1", _join_lines(escape_controls(text)))


def _join_lines(text: str) -> str:
    """Return `text` in one line."""
    return " ".join(text.split())


def _count_lines(count: int) -> str:
    """Return "1 line" or "N lines"."""
    return "1 line" if count == 1 else f"{count} lines"
