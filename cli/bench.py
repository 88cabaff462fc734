"""`mlx-smolvlm bench`: measure this machine, or other programs beside this package."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_smolvlm.cli.args import MemoryLimitOption, OfflineOption, parse_memory_limit
from mlx_smolvlm.cli.output import ProgressBar, say, write, write_json
from mlx_smolvlm.files import expand_path, write_output

if TYPE_CHECKING:
    from mlx_smolvlm.bench.measure import BenchOptions
    from mlx_smolvlm.bench.models import BenchModel, Progress
    from mlx_smolvlm.bench.programs import Launch
    from mlx_smolvlm.bench.report import Report

BITS = (4, 8, 16)
SIZES = ("256m", "500m", "2.2b")
PEERS = ("mlx-vlm", "transformers", "mlx-lm")
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
            metavar="mlx-vlm|transformers|mlx-lm",
            help="Measure another program in turns with this one; repeats.",
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
    _check_output("--png", png)
    _check_output("--json", None if json in (None, "-") else Path(json or ""))
    request = BenchRequest(
        model=model or "demo",
        random=_parse_list("--random", random),
        bits=_parse_numbers("--bits", bits),
        against=tuple(against or ()),
        peer_python=peer_python,
        same_blas=peer_blas == "ours",
        memory_limit=parse_memory_limit(memory_limit),
        offline=offline,
    )
    counts = _parse_numbers("--tiles", tiles)
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


@dataclass(frozen=True)
class BenchRequest:
    """The options of `bench` that say what to measure."""

    model: str
    random: tuple[str, ...]
    bits: tuple[int, ...]
    against: tuple[str, ...]
    peer_python: str | None
    same_blas: bool
    memory_limit: int | None
    offline: bool

    def __post_init__(self) -> None:
        for number in self.bits:
            if number not in BITS:
                raise typer.BadParameter(f"{number} is none of 4, 8 and 16", param_hint="--bits")
        for size in self.random:
            if size not in SIZES:
                message = f"'{size}' is none of {', '.join(SIZES)}"
                raise typer.BadParameter(message, param_hint="--random")
        if self.against and len(self.random) > 1:
            message = "other programs are measured on one size at a time"
            raise typer.BadParameter(message, param_hint="--random")
        for name in self.against:
            if name not in PEERS:
                raise typer.BadParameter(
                    f"'{name}' is none of {', '.join(PEERS)}", param_hint="--against"
                )

    def check_tuning(self, ignored: Mapping[str, bool], repeat: int) -> None:
        """Check, before a model is made, that `--tune` can do what was asked for.

        Args:
            ignored: Whether each option is given that has no effect with `--tune`.
            repeat: Repeats of each measurement.

        Raises:
            typer.BadParameter: An option would be ignored, or is out of range.
            SmolVLMError: One of the variables to tune is set.
        """
        from mlx_smolvlm.bench import tune

        given = {
            **ignored,
            "--against": bool(self.against),
            "--memory-limit": self.memory_limit is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise typer.BadParameter("it has no effect with --tune", param_hint=option)
        for option, values in (("--random", self.random), ("--bits", self.bits)):
            if len(values) > 1:
                raise typer.BadParameter("--tune measures one model; give one", param_hint=option)
        try:
            tune.check_repeat(repeat)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--repeat") from None
        tune.check_variables(os.environ)

    def open_models(self, work: Path, progress: Progress) -> list[BenchModel]:
        """Make or open the models; conversions are written to `work`.

        Raises:
            CheckpointError: One cannot be found or converted.
        """
        from mlx_smolvlm.bench.models import make_random_model, open_model

        if not self.random:
            for_peers = bool(self.against)
            return [
                open_model(self.model, self.bits, work, self.offline, progress, for_peers=for_peers)
            ]
        say(f"making random weights of {', '.join(self.random)}", dim=True)
        return [make_random_model(size, self.bits, work, progress) for size in self.random]

    def list_launches(self, model: BenchModel, size: str = "") -> list[Launch]:
        """Return how to start each program, this package first; `size` is part of its name.

        Raises:
            CheckpointError: A peer is wanted, and there is nothing that it can read.
        """
        from mlx_smolvlm.bench.programs import OURS, launch_ours, launch_peer

        ours = [
            launch_ours(
                folder,
                name=" ".join(filter(None, (OURS, size, precision))),
                memory_limit=self.memory_limit,
            )
            for precision, folder in model.folders.items()
        ]
        peers = [
            launch_peer(name, model.get_source(), self.peer_python, self.same_blas)
            for name in self.against
        ]
        return [*ours, *peers]


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


def _parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse numbers with commas between them; raises typer.BadParameter."""
    try:
        return tuple(dict.fromkeys(map(int, _parse_list(option, text))))
    except ValueError:
        message = f"'{text}' is not numbers with commas between them"
        raise typer.BadParameter(message, param_hint=option) from None


def _parse_list(option: str, text: str) -> tuple[str, ...]:
    """Return the values in `text`, with commas between them; raises typer.BadParameter."""
    values = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if text and not values:
        raise typer.BadParameter(f"'{text}' has no value", param_hint=option)
    return values


def _check_output(option: str, path: Path | None) -> None:
    """Raise typer.BadParameter if `path` is or has no folder: measuring takes minutes."""
    if path is None:
        return
    try:
        path = expand_path(path)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give a file", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)


@contextlib.contextmanager
def _open_work(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, which is kept, or a temporary one, which is removed."""
    if folder is not None:
        yield expand_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="mlx-smolvlm-bench-") as temporary:
        yield Path(temporary)
