"""Options that several commands share, as Typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image", "-i", metavar="IMAGE", help="A path, URL, data URI, or - for stdin; repeats."
    ),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        "--video", "-v", metavar="VIDEO", help="A path, URL, data URI, or - for stdin; repeats."
    ),
]
ModelName = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder, a hub id, an alias, or demo."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")]
Bits = Annotated[
    int | None,
    typer.Option(metavar="4|8|16", help="Precision when converting a model on first use."),
]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="What mlx-smolvlm train made of this model."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep what prompts have in common here, for the next run."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
