"""`mlx-smolvlm doctor`: what this machine has, and what is broken. It sends nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import typer

from mlx_smolvlm.cli.health import Finding, device, software, storage, surroundings
from mlx_smolvlm.cli.render import say, write, write_json
from mlx_smolvlm.cli.trials import checkpoint, demo, pictures, videos


def doctor(models: Sequence[str], as_json: bool) -> None:
    """Put the findings on stdout; those of `models` alone, if some are named.

    Raises:
        typer.Exit: 1 if something is broken.
    """
    findings: list[Finding] = []
    for finding in _named(models) if models else _everything():
        findings.append(finding)
        if not as_json:
            _show(finding)
    broken = sum(finding.status == "broken" for finding in findings)
    if as_json:
        write_json({"ok": not broken, "findings": [dataclasses.asdict(one) for one in findings]})
    elif broken:
        say(f"{broken} broken")
    if broken:
        raise typer.Exit(1)


def _everything() -> Iterator[Finding]:
    """All there is to know, what takes longest last."""
    from mlx_smolvlm.cached import list_cached
    from mlx_smolvlm.convert.originals import list_originals

    for part in (software, device, storage, surroundings, pictures, videos, demo):
        yield from part()
    for model in list_cached():
        if model.state == "whole":
            yield from checkpoint(model.name, model.path)
    for original in list_originals():
        if original.is_own:
            yield from checkpoint(f"{original.name}@{original.revision[:12]}", original.path)


def _named(models: Sequence[str]) -> Iterator[Finding]:
    """Of each model that a user names: a folder, what is in a cache, or demo."""
    from mlx_smolvlm.cached import find, list_cached
    from mlx_smolvlm.convert.originals import list_originals
    from mlx_smolvlm.hub import DEMO, find_folder, resolve

    for name in models:
        if name == DEMO:
            yield from checkpoint(name, resolve(name))
            continue
        if (folder := find_folder(name)) is not None:
            yield from checkpoint(name, folder)
            continue
        fetched = [one for one in list_originals() if one.is_own and one.name == name]
        for original in fetched:
            yield from checkpoint(f"{name}@{original.revision[:12]}", original.path)
        for model in [] if fetched else find(name, list_cached()):
            yield from checkpoint(model.name, model.path)


def _show(finding: Finding) -> None:
    """One finding, as a line or two."""
    mark = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}[finding.status]
    advice = f"\n        {finding.advice}" if finding.advice else ""
    write(f"{mark}  {finding.name}: {finding.text}{advice}\n")
