"""`mlx-smolvlm doctor`: check this machine and its models. Nothing is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_smolvlm.cli.output import say, write, write_json

if TYPE_CHECKING:
    from mlx_smolvlm.cli.doctor_checks import Finding


def doctor(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a converted model, or demo; repeats.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and the converted checkpoints; nothing is sent."""
    findings: list[Finding] = []
    for finding in _check_models(models) if models else _check_everything():
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    broken = sum(finding.status == "broken" for finding in findings)
    if as_json:
        write_json({"ok": not broken, "findings": [dataclasses.asdict(one) for one in findings]})
    elif broken:
        say(f"{broken} broken")
    if broken:
        raise typer.Exit(1)


def _check_everything() -> Iterator[Finding]:
    """Yield the findings of all checks, the slowest last."""
    from mlx_smolvlm.cli import doctor_checks as checks
    from mlx_smolvlm.convert.model_cache import list_cached_models, list_fetched_models

    yield from checks.check_software()
    yield from checks.check_device()
    yield from checks.check_storage()
    yield from checks.check_environment()
    yield from checks.check_pictures()
    yield from checks.check_videos()
    yield from checks.check_demo()
    for model in list_cached_models():
        if model.state == "whole":
            yield from checks.check_checkpoint(model.name, model.path)
    for original in list_fetched_models():
        if original.is_own:
            name = f"{original.name}@{original.revision[:12]}"
            yield from checks.check_checkpoint(name, original.path)


def _check_models(names: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding for each named model: a folder, a model in a cache, or the demo."""
    from mlx_smolvlm.cli.doctor_checks import check_checkpoint
    from mlx_smolvlm.convert.hub import DEMO, find_folder, resolve
    from mlx_smolvlm.convert.model_cache import find_models, list_cached_models, list_fetched_models

    for name in names:
        if name == DEMO:
            yield from check_checkpoint(name, resolve(name))
            continue
        if (folder := find_folder(name)) is not None:
            yield from check_checkpoint(name, folder)
            continue
        originals = [one for one in list_fetched_models() if one.is_own and one.name == name]
        for original in originals:
            yield from check_checkpoint(f"{name}@{original.revision[:12]}", original.path)
        for model in [] if originals else find_models(name, list_cached_models()):
            yield from check_checkpoint(model.name, model.path)


def _print_finding(finding: Finding) -> None:
    """Print a finding in one line, with its advice in a second."""
    mark = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}[finding.status]
    advice = f"\n        {finding.advice}" if finding.advice else ""
    write(f"{mark}  {finding.name}: {finding.text}{advice}\n")
