"""`mlx-smolvlm models`: what can be named, what has been converted, and its removal."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_smolvlm.cli.render import say, size, table, write, write_json

if TYPE_CHECKING:
    from mlx_smolvlm.cached import CachedModel
    from mlx_smolvlm.convert.originals import Original

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def models(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the aliases and the converted checkpoints in the cache; rm removes some."""
    if context.invoked_subcommand is None:
        show(json)


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
    remove_named(names, yes)


def show(as_json: bool) -> None:
    """Put the aliases, the converted checkpoints and what was fetched on stdout."""
    from mlx_smolvlm.cached import list_cached
    from mlx_smolvlm.convert.originals import list_originals
    from mlx_smolvlm.hub import ALIASES, cache_folder

    cached, originals = list_cached(), list_originals()
    if as_json:
        values = {
            "aliases": ALIASES,
            "cache_folder": str(cache_folder()),
            "converted": [_plain(model) for model in cached if model.state == "whole"],
            "leftovers": [_plain(model) for model in cached if model.state != "whole"],
            "fetched": [_plain(original) for original in originals],
        }
        write_json(values)
        return
    rows = [("alias", "model"), ("demo", "bundled with this package"), *ALIASES.items()]
    text = table(rows)
    whole = [model for model in cached if model.state == "whole"]
    rest = [model for model in cached if model.state != "whole"]
    if cached:
        text += f"\nin {cache_folder()}\n"
    if whole:
        text += table([CONVERTED, *map(_converted_row, whole)])
    if rest:
        left = [(model.name, size(model.nbytes), model.state) for model in rest]
        text += "\n" * bool(whole) + table([("not usable", "size", "state"), *left])
    if originals:
        text += "\n" + table([FETCHED, *map(_fetched_row, originals)])
    write(text)


CONVERTED = ("converted", *("text", "vision", "connector", "embeddings"), "size", "used", "from")
FETCHED = ("fetched from the hub", "commit", "size", "used", "")


def _converted_row(model: CachedModel) -> tuple[str, ...]:
    """A line of the table of conversions: bits by part, size, and where it comes from."""
    source = model.source + (f"@{model.revision[:12]}" if model.revision else "")
    bits = tuple(str(model.parts[part]) for part in CONVERTED[1:5])
    return (model.name, *bits, size(model.nbytes), _day(model.last_used_s), source)


def _fetched_row(one: Original) -> tuple[str, ...]:
    """A line of the table of fetched checkpoints."""
    note = "used as it is" if one.is_own else ""
    return (one.name, one.revision[:12], size(one.nbytes), _day(one.last_used_s), note)


def _day(seconds: float | None) -> str:
    """The local day at `seconds` since 1970."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d", time.localtime(seconds))


def _plain(value: CachedModel | Original) -> dict[str, Any]:
    """`value` as JSON can hold it."""
    return dataclasses.asdict(value) | {"path": str(value.path)}


def remove_named(names: Sequence[str], yes: bool) -> None:
    """Remove the conversions that `names` mean, after a question on a terminal.

    Raises:
        typer.BadParameter: There is no terminal to ask on, and `yes` was not given.
        CheckpointError: A name means nothing in the cache, or cannot be removed.
    """
    from mlx_smolvlm.cached import find, list_cached, remove

    cached = list_cached()
    wanted = {model.path: model for name in names for model in find(name, cached)}
    total = size(sum(model.nbytes for model in wanted.values()))
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise typer.BadParameter("it is needed where nobody can be asked", param_hint="--yes")
        for model in wanted.values():
            say(f"{model.name}  {size(model.nbytes)}")
        say(f"remove {_count(len(wanted))}, {total}? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing removed")
            raise typer.Exit(1)
    for model in wanted.values():
        is_link = os.path.islink(model.path)
        remove(model)
        what = "a link" if is_link else size(model.nbytes)
        say(f"removed {model.name}: {what}")


def _count(number: int) -> str:
    """How many checkpoints."""
    return f"{number} checkpoint" + ("" if number == 1 else "s")
