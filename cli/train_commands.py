"""`train` and `eval` as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_smolvlm.cli.arguments import Adapter, Bits, Offline

TRAIN_EPILOG = """\
\b
Examples:
  mlx-smolvlm train receipts.toml
  mlx-smolvlm train receipts.toml --out receipts-2 --fuse
  mlx-smolvlm chat "Read it." -i receipt.jpg -m smolvlm2-256m --adapter receipts-trained/adapter"""


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="What to train, on which data, and how.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to write, and where an earlier run goes on; default: as the file says, "
            "or its name with -trained.",
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Write a checkpoint of model and adapter together, too.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Train a model further on your own pictures, videos and answers."""
    from mlx_smolvlm.cli.train import TrainOptions
    from mlx_smolvlm.cli.train import train as run

    raise typer.Exit(run(TrainOptions(config=config, out=out, fuse=fuse, offline=offline)))


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
        str | None,
        typer.Option(
            metavar="METRIC",
            help="For lines that name none: exact, normalized, anls, relaxed, choices or letter; "
            "default: choices if a line has them, else exact.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only lines of these tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Of each task, the first N lines.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 256,
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where each result is kept and a stopped run goes on; "
            "default: eval-MODEL-DATA.jsonl, here.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the results that are there.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Count a line that cannot be asked as wrong, and go on."),
    ] = False,
    show_errors: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Print N lines that are not right on stderr."),
    ] = 0,
    adapter: Adapter = None,
    bits: Bits = None,
    offline: Offline = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table for a model card.")
    ] = False,
) -> None:
    """Measure how many answers to a dataset's questions are right, by task."""
    from mlx_smolvlm.cli.evaluate import EvaluateRequest, make_evaluation_options
    from mlx_smolvlm.cli.evaluate import evaluate as run
    from mlx_smolvlm.cli.options import as_text, make_cache_options, parse_detail

    request = EvaluateRequest(
        model=model,
        data=tuple(as_text("DATA", path) for path in data),
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
        offline=offline,
        results=results,
        restart=restart,
        show_errors=show_errors,
        json=json,
        markdown=markdown,
    )
    raise typer.Exit(run(request))
