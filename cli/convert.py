"""`mlx-smolvlm convert`: a checkpoint into a folder of this package's format."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.render import ConversionProgress, say, size
from mlx_smolvlm.errors import CheckpointError

if TYPE_CHECKING:
    from mlx_smolvlm.cli.compare import Samples
    from mlx_smolvlm.cli.precision import Better
    from mlx_smolvlm.convert.quantize import ConvertOptions


@dataclass(frozen=True)
class ConvertRequest:
    """What `convert` was asked for; `verify` holds what to try the result on, if it is tried.

    `better` holds what goes beyond rounding to the bits of `options`.
    """

    source: str
    dest: Path | None
    options: ConvertOptions
    force: bool
    offline: bool
    verify: Samples | None = None
    better: Better | None = None


def convert(request: ConvertRequest) -> None:
    """Write the checkpoint and say where.

    Raises:
        typer.BadParameter: A precision that does not exist.
        CheckpointError: The source is not usable, or the destination is taken.
    """
    from mlx_smolvlm.convert.quantize import requested
    from mlx_smolvlm.convert.run import convert_checkpoint
    from mlx_smolvlm.hub import ALIASES

    try:
        requested(request.options)
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from None
    if request.verify is not None:
        request.verify.options()  # wrong files are refused before hours of work
    source: str | Path = Path(request.source).expanduser()
    if not Path(source).exists():
        source = ALIASES.get(request.source.lower(), request.source)
    suffix = None if request.better is None else request.better.suffix
    dest = request.dest or default_dest(str(source), request.options, suffix)
    if dest.exists() and not dest.is_dir():
        raise CheckpointError(f"{dest} is no folder; choose another destination")
    progress = ConversionProgress()
    with contextlib.closing(progress):
        if request.better is None or request.better.rounds:
            convert_checkpoint(
                source,
                dest,
                request.options,
                progress,
                offline=request.offline,
                force=request.force,
            )
        else:
            request.better.write(source, dest, request)
    say(f"wrote {dest}: {summary(dest)}")
    if request.verify is not None:
        from mlx_smolvlm.cli.compare import verify

        verify(source, dest, request.verify, request.offline)


def default_dest(source: str, options: ConvertOptions, suffix: str | None = None) -> Path:
    """A folder here, named after the source and `suffix`, else the precision asked for."""
    name = Path(source).resolve().name if Path(source).is_dir() else Path(source).name
    name = name.partition("@")[0]
    if suffix is not None:
        return Path(f"{name}-mlx-{suffix}")
    if options.mode != "affine":
        return Path(f"{name}-mlx-{options.mode}")
    return Path(f"{name}-mlx" if options.bits is None else f"{name}-mlx-{options.bits}bit")


def summary(folder: Path) -> str:
    """Bits and size of the checkpoint in `folder`."""
    from mlx_smolvlm.checkpoint import read_config

    config = read_config(folder)
    text = config.quantization.text
    bits = config.dtype if text is None else f"{text.bits} bits"
    return f"{bits}, {size(sum(file.stat().st_size for file in folder.iterdir()))}"
