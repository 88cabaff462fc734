"""`mlx-smolvlm bench`: measure this machine, or other programs beside this package."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_smolvlm.cli.args import (
    MemoryLimitOption,
    OfflineOption,
    check_output,
    parse_memory_limit,
)
from mlx_smolvlm.cli.bench_request import BenchRequest, parse_list, parse_numbers
from mlx_smolvlm.cli.output import ProgressBar, say, write, write_json
from mlx_smolvlm.files import expand_path, write_output

if TYPE_CHECKING:
    from mlx_smolvlm.bench.measure import BenchOptions
    from mlx_smolvlm.bench.models import BenchModel
    from mlx_smolvlm.bench.report import Report

PROMPT_TOKENS, MAX_TOKENS = 512, 32
BENCH_EPILOG = """\
\b
Examples:
  mlx-smolvlm bench
  mlx-smolvlm bench --random 256m --bits 16,4 --tiles 1,13 --json speed.json --png speed.png
  mlx-smolvlm bench --random 256m --against mlx-vlm --peer-python ~/venv/bin/python
  mlx-smolvlm bench --tune --random 256m"""


def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model as in chat. Default: demo.")
    ] = None,
    random: Annotated[
        str,
        typer.Option(
            metavar="256m,500m,2.2b",
            help="Measure random weights of published models' sizes, offline.",
        ),
    ] = "",
    bits: Annotated[
        str, typer.Option(metavar="4,8,16", help="Precisions to measure, side by side.")
    ] = "",
    tiles: Annotated[
        str, typer.Option(metavar="1,13", help="Tiles of a picture. Default: 1, and a photo's.")
    ] = "",
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of the prompt for prefill.")
    ] = PROMPT_TOKENS,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = MAX_TOKENS,
    repeat: Annotated[int, typer.Option(metavar="N", help="Repeats of each measurement.")] = 3,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROGRAM",
            help="Measure mlx-vlm, transformers or mlx-lm in turns with this one; repeats.",
        ),
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The interpreter that it is installed for."),
    ] = None,
    peer_blas: Annotated[
        Literal["ours", "own"],
        typer.Option(help="On Linux: whether it gets this package's OpenBLAS, or its own BLAS."),
    ] = "ours",
    memory_limit: MemoryLimitOption = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Find this machine's fastest settings, and save them."),
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep models made for this here. Default: nowhere."),
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the report as a PNG file.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Measure speed and memory on this machine."""
    if model is not None and random:
        raise typer.BadParameter("MODEL and --random exclude each other", param_hint="--random")
    check_output("--png", png)
    check_output("--json", None if json in (None, "-") else Path(json or ""))
    request = BenchRequest(
        model=model or "demo",
        random=parse_list("--random", random),
        bits=parse_numbers("--bits", bits),
        against=tuple(against or ()),
        peer_python=peer_python,
        same_blas=peer_blas == "ours",
        memory_limit=parse_memory_limit(memory_limit),
        offline=offline,
    )
    counts = parse_numbers("--tiles", tiles)
    if tune:
        ignored = {
            "--json": json is not None,
            "--png": png is not None,
            "--tiles": bool(counts),
            "--prompt-tokens": prompt_tokens != PROMPT_TOKENS,
            "--max-tokens": max_tokens != MAX_TOKENS,
            "--peer-python": peer_python is not None,
        }
        request.check_tuning(ignored, repeat)
    bar = ProgressBar()
    with contextlib.closing(bar), _open_work(work) as folder:
        models = request.open_models(folder, bar.draw)
        if tune:
            _tune(models[0], repeat, bar)
            return
        options = [_make_options(one, counts, prompt_tokens, max_tokens, repeat) for one in models]
        report = _measure(request, models, options, bar)
    _print_report(report, json, png)


def _make_options(
    model: BenchModel, tiles: tuple[int, ...], prompt_tokens: int, max_tokens: int, repeat: int
) -> BenchOptions:
    """Check the numbers, and choose those of tiles if none are given.

    Raises:
        typer.BadParameter: A number is out of range.
    """
    from mlx_smolvlm.bench.measure import BenchOptions, count_photo_tiles

    chosen = tiles or tuple(sorted({1, count_photo_tiles(model.config)}))
    context = model.config.text.max_position_embeddings
    if prompt_tokens + max_tokens > context:
        raise typer.BadParameter(
            f"with --max-tokens it exceeds the context of {context:,}", param_hint="--prompt-tokens"
        )
    try:
        return BenchOptions(chosen, prompt_tokens, max_tokens, repeat)
    except ValueError as error:
        hint = "--" + str(error).split(maxsplit=1)[0].replace("_", "-")
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _measure(
    request: BenchRequest,
    models: list[BenchModel],
    options: list[BenchOptions],
    bar: ProgressBar,
) -> Report:
    """Run the programs, one model after the other, and return the report."""
    from mlx_smolvlm.bench.machine import describe_machine
    from mlx_smolvlm.bench.measure import Result, run_bench
    from mlx_smolvlm.bench.report import Report

    results: list[Result] = []
    for number, (model, one) in enumerate(zip(models, options, strict=True)):
        size = request.random[number] if len(models) > 1 else ""
        launches = request.list_launches(model, size)
        results += run_bench(launches, model.config, one, bar.draw)
    names = ", ".join(model.name for model in models)
    return Report(names, describe_machine(), options[0], results)


def _print_report(report: Report, json: str | None, png: Path | None) -> None:
    """Print the table, or JSON if that goes to stdout, and write the files."""
    from mlx_smolvlm.bench.report import format_report, render_picture

    if json == "-":
        write_json(report.to_dict())
    else:
        write(format_report(report))
    if json not in (None, "-"):
        import json as module

        write_output(Path(json or ""), module.dumps(report.to_dict(), indent=2) + "\n")
    if png is not None:
        write_output(png, render_picture(report))


def _tune(model: BenchModel, repeat: int, bar: ProgressBar) -> None:
    """Compare settings, print what was measured, and save the best."""
    import mlx.core as mx

    from mlx_smolvlm.bench import tune

    settings = tune.list_settings(mx.default_device().type == mx.DeviceType.gpu)
    folder = next(iter(model.folders.values()))
    outcome = tune.compare_settings(settings, tune.make_measure(folder), repeat, bar.draw)
    path = tune.save_outcome(outcome)
    write(tune.format_outcome(outcome))
    if path is None:
        say("no setting is faster than the default by more than the spread; nothing is saved")
    else:
        say(f"saved {tune.format_setting(outcome.best)} in {path}; later commands use it")


@contextlib.contextmanager
def _open_work(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, which is kept, or a temporary one, which is removed."""
    if folder is not None:
        yield expand_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="mlx-smolvlm-bench-") as temporary:
        yield Path(temporary)
