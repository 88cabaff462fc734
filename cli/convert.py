"""`mlx-smolvlm convert`: a checkpoint into a folder of this package's format."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.render import ConversionProgress, say, size, warn, write
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm.cli.compare import Samples
    from mlx_smolvlm.cli.precision import Better
    from mlx_smolvlm.convert.quantize import ConvertOptions
    from mlx_smolvlm.convert.source import Source


@dataclass(frozen=True)
class ConvertRequest:
    """What `convert` was asked for.

    Attributes:
        verify: What to try the result on; None does not try it.
        better: What goes beyond rounding to the bits of `options`.
        upload: A repository of the hub.
    """

    source: str
    dest: Path | None
    options: ConvertOptions
    force: bool
    offline: bool
    verify: Samples | None = None
    better: Better | None = None
    upload: str | None = None
    private: bool = False

    @property
    def changes(self) -> bool:
        """Whether an option asks for a conversion, or for a comparison of its result."""
        from mlx_smolvlm.cli.precision import Better
        from mlx_smolvlm.convert.quantize import ConvertOptions

        is_better = self.better is not None and self.better != Better()
        return is_better or self.verify is not None or self.options != ConvertOptions()

    def __post_init__(self) -> None:
        if self.upload is not None and self.offline:
            raise typer.BadParameter("it needs the network", param_hint="--upload")
        if self.private and self.upload is None:
            raise typer.BadParameter("it needs --upload", param_hint="--private")


def convert(request: ConvertRequest) -> None:
    """Write the checkpoint and say where; then upload it, if that was asked for.

    Raises:
        typer.BadParameter: The options ask to change what is to be uploaded as it is.
        CheckpointError: The source is not usable, the destination is taken, or the hub
            refuses.
    """
    from mlx_smolvlm.convert.source import open_source
    from mlx_smolvlm.staging import check_destination

    if request.verify is not None:
        request.verify.options()  # wrong files are refused before hours of work
    if request.upload is not None:
        from mlx_smolvlm.convert.upload import check_upload

        check_upload(request.upload)  # or the work would be done before it is known
    name = find_source(request.source)
    suffix = None if request.better is None else request.better.suffix
    dest = request.dest or default_dest(str(name), request.options, suffix)
    dest = expand_path(dest, CheckpointError)
    may_publish = request.upload is not None and request.dest is None and isinstance(name, Path)
    if not may_publish:
        check_destination(dest, request.force)  # before anything is fetched
    source = open_source(name, request.offline)
    if may_publish and source.is_own:
        if request.changes:
            raise typer.BadParameter(
                f"{name} is a checkpoint of mlx-smolvlm, which --upload publishes as it is; to "
                "convert it again with these options, give a new folder",
                param_hint="DEST",
            )
        publish(source.folder, request)
        return
    write_converted(source, dest, request)
    if request.upload is not None:
        publish(dest, request)


def find_source(name: str) -> str | Path:
    """The path `name` if there is something, else the demo's, else a hub id.

    Raises:
        CheckpointError: It begins with a home directory that is not known.
    """
    from mlx_smolvlm.hub import ALIASES, DEMO, resolve

    path = expand_path(name, CheckpointError)
    if path.exists():
        return path
    return resolve(DEMO) if name == DEMO else ALIASES.get(name.lower(), name)


def write_converted(source: Source, dest: Path, request: ConvertRequest) -> None:
    """Convert `source` to the folder `dest`, and say so."""
    from mlx_smolvlm.convert.run import convert_checkpoint

    progress = ConversionProgress()
    with contextlib.closing(progress):
        if request.better is None or request.better.rounds:
            convert_checkpoint(
                source,
                dest,
                request.options,
                progress,
                force=request.force,
            )
        else:
            request.better.write(source, dest, request)
    say(f"wrote {dest}: {summary(dest)}")
    if request.verify is not None:
        from mlx_smolvlm.cli.compare import verify

        verify(source, dest, request.verify)


def publish(folder: Path, request: ConvertRequest) -> None:
    """Upload the checkpoint in `folder`, and put the commit's URL on stdout."""
    from mlx_smolvlm.convert.upload import upload
    from mlx_smolvlm.convert.verify import verification_section
    from mlx_smolvlm.origin import read_origin

    assert request.upload is not None
    origin = read_origin(folder)
    if origin is None or origin.license is None:
        warn(f"{folder} states no licence, so its card says license: unknown")
    section = verification_section(folder) or ""
    say(f"uploading {folder} to {request.upload}", dim=True)
    url = upload(
        folder, request.upload, private=request.private, force=request.force, section=section
    )
    write(f"{url}\n")


def default_dest(source: str, options: ConvertOptions, suffix: str | None = None) -> Path:
    """A folder here, named after the source and `suffix`, else the precision asked for."""
    name = Path(source).resolve().name if Path(source).is_dir() else Path(source).name
    name = name.partition("@")[0].removesuffix(".gguf")
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
