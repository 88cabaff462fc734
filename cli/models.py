"""`mlx-smolvlm models`: list aliases and models on this machine, and remove conversions."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_smolvlm.cli.output import format_size, format_table, say, write, write_json

if TYPE_CHECKING:
    from mlx_smolvlm.convert.catalog import ModelFigures
    from mlx_smolvlm.convert.model_cache import CachedModel, FetchedModel
    from mlx_smolvlm.generate.memory_plan import Machine

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def models(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the aliases and the converted checkpoints in the cache; rm removes some."""
    if context.invoked_subcommand is None:
        print_models(json)


@app.command("rm")
def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="As `models` lists them; or a hub id for all its conversions."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove converted checkpoints from the cache. What was fetched from the hub stays."""
    remove_models(names, yes)


def print_models(as_json: bool) -> None:
    """Print the aliases, the converted checkpoints and the downloads."""
    from mlx_smolvlm.convert.catalog import list_figures
    from mlx_smolvlm.convert.hub import ALIASES, DEMO, find_cache_folder
    from mlx_smolvlm.convert.model_cache import list_cached_models, list_fetched_models
    from mlx_smolvlm.generate.memory_plan import find_machine

    machine = find_machine()
    figures = list_figures(machine)
    cached, originals = list_cached_models(), list_fetched_models()
    if as_json:
        values = {
            "aliases": ALIASES,
            "machine": dataclasses.asdict(machine),
            "models": [
                {"model": ALIASES.get(one.alias, DEMO), **dataclasses.asdict(one)}
                for one in figures
            ],
            "cache_folder": str(find_cache_folder()),
            "converted": [_to_dict(model) for model in cached if model.state == "whole"],
            "leftovers": [_to_dict(model) for model in cached if model.state != "whole"],
            "fetched": [_to_dict(original) for original in originals],
        }
        write_json(values)
        return
    text = format_table([MODEL_HEADINGS, *map(_make_model_row, figures)]) + describe_fit(machine)
    complete = [model for model in cached if model.state == "whole"]
    unusable = [model for model in cached if model.state != "whole"]
    if cached:
        text += f"\nin {find_cache_folder()}\n"
    if complete:
        text += format_table([CONVERTED_HEADINGS, *map(_make_converted_row, complete)])
    if unusable:
        states = [(model.name, format_size(model.nbytes), model.state) for model in unusable]
        text += "\n" * bool(complete) + format_table([("not usable", "size", "state"), *states])
    if originals:
        text += "\n" + format_table([FETCHED_HEADINGS, *map(_make_fetched_row, originals)])
    write(text)


MODEL_HEADINGS = (
    "model",
    "download",
    "disk at 16, 8, 4 bits",
    "memory at 16, 8, 4",
    "fits at",
    "good at",
)


def _make_model_row(one: ModelFigures) -> tuple[str, ...]:
    """Return a row of the table of published models."""
    return (
        one.alias,
        _format_gb([one.download_bytes]) if one.download_bytes else "bundled",
        _format_gb(one.disk_bytes.values()),
        _format_gb(one.answer_bytes.values()),
        "-" if one.fits_bits is None else f"{one.fits_bits} bits",
        one.good_at,
    )


def _format_gb(sizes: Iterable[int]) -> str:
    """Return `sizes` in bytes as numbers of GB."""
    return ", ".join(f"{size / 1e9:.{1 if size >= 1e9 else 2}f}" for size in sizes) + " GB"


def describe_fit(machine: Machine) -> str:
    """Return what the columns of the table mean on `machine`."""
    memory = "memory that is not known"
    if machine.memory is not None:
        memory = f"the {machine.memory / 1e9:.1f} GB of this machine"
    return (
        "Estimated. Memory is that of an answer about a photograph; a model fits if it takes at "
        f"most half of\n{memory}, and without --bits it is converted to what fits. "
        "A download stays on\nthe disk too.\n"
    )


PARTS = ("text", "vision", "connector", "embeddings")
CONVERTED_HEADINGS = (
    "converted",
    *PARTS,
    "size",
    "used",
    "from",
)
FETCHED_HEADINGS = ("fetched from the hub", "commit", "size", "used", "")


def _make_converted_row(model: CachedModel) -> tuple[str, ...]:
    """Return a row of the table of conversions: bits of each part, size and source."""
    source = model.source + (f"@{model.revision[:12]}" if model.revision else "")
    bits = tuple(str(model.parts[part]) for part in PARTS)
    return (model.name, *bits, format_size(model.nbytes), _format_day(model.last_used_s), source)


def _make_fetched_row(one: FetchedModel) -> tuple[str, ...]:
    """Return a row of the table of downloads."""
    note = "used as it is" if one.is_own else ""
    return (
        one.name,
        one.revision[:12],
        format_size(one.nbytes),
        _format_day(one.last_used_s),
        note,
    )


def _format_day(seconds: float | None) -> str:
    """Return the local date at `seconds` since 1970."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d", time.localtime(seconds))


def _to_dict(value: CachedModel | FetchedModel) -> dict[str, Any]:
    """Return the fields of `value` for JSON."""
    return dataclasses.asdict(value) | {"path": str(value.path)}


def remove_models(names: Sequence[str], yes: bool) -> None:
    """Remove the conversions with these names, after asking on the terminal unless `yes`.

    Raises:
        typer.BadParameter: There is no terminal to ask on, and `yes` was not given.
        CheckpointError: A name is not in the cache, or cannot be removed.
    """
    from mlx_smolvlm.convert.model_cache import find_models, list_cached_models, remove_model

    cached = list_cached_models()
    selected = {model.path: model for name in names for model in find_models(name, cached)}
    total = format_size(sum(model.nbytes for model in selected.values()))
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise typer.BadParameter("it is needed where nobody can be asked", param_hint="--yes")
        for model in selected.values():
            say(f"{model.name}  {format_size(model.nbytes)}")
        say(f"remove {_count_checkpoints(len(selected))}, {total}? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing removed")
            raise typer.Exit(1)
    for model in selected.values():
        is_link = os.path.islink(model.path)
        remove_model(model)
        what = "a link" if is_link else format_size(model.nbytes)
        say(f"removed {model.name}: {what}")


def _count_checkpoints(number: int) -> str:
    """Return "1 checkpoint" or "N checkpoints"."""
    return f"{number} checkpoint" + ("" if number == 1 else "s")
