"""`mlx-smolvlm convert`: convert a checkpoint to this package's format."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_smolvlm.cli.args import OfflineOption
from mlx_smolvlm.cli.compare import ComparisonInputs, verify
from mlx_smolvlm.cli.output import ConversionProgress, format_size, say, warn, write
from mlx_smolvlm.cli.precision import PrecisionOptions, write_better
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.quant.improve import BetterOptions
    from mlx_smolvlm.convert.source import Source


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, a hub id (owner/name), an alias, or demo."
        ),
    ],
    dest: Annotated[
        Path | None,
        typer.Argument(
            metavar="DEST", help="A new folder; default: the source's name with -mlx, here."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Bits of the decoder: 2, 3, 4, 5, 6, 8, or 16 for float; default: as the source.",
        ),
    ] = None,
    vision_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Bits of the vision encoder; default: 8 if --bits is below 16."
        ),
    ] = None,
    connector_bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bits of the connector; default: as --vision-bits."),
    ] = None,
    embeddings_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Bits of the embeddings and output head; default: as --vision-bits."
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(metavar="32|64|128", help="Number of weights that share a scale (affine)."),
    ] = 64,
    mode: Annotated[
        Literal["affine", "mxfp4", "mxfp8", "nvfp4"],
        typer.Option(metavar="MODE", help="Quantization mode: affine, mxfp4, mxfp8 or nvfp4."),
    ] = "affine",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            metavar="DTYPE",
            help="Type of other values: float32, float16 or bfloat16; default: as the source.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="tiny, balanced, quality, or a TOML file, instead of bits for each part.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Mix precisions to fit this size, e.g. 150MB (1 MB is 10^6 bytes)."
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", help="Mix precisions to this mean of bits per weight, with scales."
        ),
    ] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq",
            help="Use GPTQ: each column of a matrix compensates the rounding of earlier ones.",
        ),
    ] = False,
    dwq: Annotated[
        bool,
        typer.Option("--dwq", help="Tune scales and biases so that predictions match the source."),
    ] = False,
    dwq_steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of samples that --dwq tunes on.")
    ] = 120,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Texts, JSONL datasets or folders of them to measure and tune on; repeats; "
            "default: a few of this package.",
        ),
    ] = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DEST.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare the result with SOURCE, and print the differences."),
    ] = False,
    verify_texts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to compare on; repeats. Implies --verify."),
    ] = None,
    verify_pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to compare on. Implies --verify.")
    ] = None,
    upload: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload the result to the hub; SOURCE may be converted already."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the new repository private.")
    ] = False,
) -> None:
    """Convert a Hugging Face or mlx-community checkpoint."""
    from mlx_smolvlm.convert.options import ConvertOptions

    try:
        options = ConvertOptions(
            bits=bits,
            vision_bits=vision_bits,
            connector_bits=connector_bits,
            embeddings_bits=embeddings_bits,
            group_size=group_size,
            mode=mode,
            dtype=dtype,
        )
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from None
    precision = PrecisionOptions(
        recipe=recipe,
        target_size=target_size,
        target_bits=target_bits,
        gptq=gptq,
        dwq_steps=dwq_steps if dwq else None,
        calibration=tuple(calibration or ()),
    )
    inputs = ComparisonInputs(tuple(verify_texts) if verify_texts else None, verify_pictures)
    request = ConvertRequest(
        source=source,
        dest=dest,
        options=precision.apply_recipe(options),
        force=force,
        offline=offline,
        upload=upload,
        private=private,
        verify=inputs if verify or inputs != ComparisonInputs() else None,
        precision=precision,
    )
    try:
        run_conversion(request)
    except CheckpointError as error:  # an argument of the library is named as it is typed here
        raise CheckpointError(str(error).replace("force=True", "--force")) from None


@dataclass(frozen=True)
class ConvertRequest:
    """The options of `convert`.

    Attributes:
        verify: What to compare the result with its source on; None does not compare.
        precision: The options that measure or train, beyond rounding to the bits of `options`.
        upload: A repository of the hub.
    """

    source: str
    dest: Path | None
    options: ConvertOptions
    force: bool
    offline: bool
    verify: ComparisonInputs | None = None
    precision: PrecisionOptions | None = None
    upload: str | None = None
    private: bool = False

    @property
    def has_changes(self) -> bool:
        """Whether an option asks for a conversion, or for a comparison of its result."""
        from mlx_smolvlm.convert.options import ConvertOptions

        is_precise = self.precision is not None and self.precision != PrecisionOptions()
        return is_precise or self.verify is not None or self.options != ConvertOptions()

    def __post_init__(self) -> None:
        if self.upload is not None and self.offline:
            raise typer.BadParameter("it needs the network", param_hint="--upload")
        if self.private and self.upload is None:
            raise typer.BadParameter("it needs --upload", param_hint="--private")


def run_conversion(request: ConvertRequest) -> None:
    """Convert the checkpoint, and upload it if asked to.

    Raises:
        typer.BadParameter: The options would change a checkpoint that is uploaded as it is.
        CheckpointError: The source cannot be used, the destination exists, or the hub
            refuses the upload.
    """
    from mlx_smolvlm.checkpoint.writer import check_destination
    from mlx_smolvlm.convert.source import open_source

    # Wrong files and targets out of range are refused before hours of work.
    compare_options = None if request.verify is None else request.verify.make_options()
    better = None
    if request.precision is not None and not request.precision.only_rounds:
        better = request.precision.make_options(request.force)
    if request.upload is not None:
        from mlx_smolvlm.convert.upload import check_upload

        check_upload(request.upload)  # also before the work
    name = find_source(request.source)
    suffix = None if request.precision is None else request.precision.suffix
    dest = request.dest or choose_dest(str(name), request.options, suffix)
    dest = expand_path(dest, CheckpointError)
    may_publish = request.upload is not None and request.dest is None and isinstance(name, Path)
    if not may_publish:
        check_destination(dest, request.force)  # before anything is fetched
    source = open_source(name, request.offline)
    if may_publish and source.is_own:
        if request.has_changes:
            raise typer.BadParameter(
                f"{name} is a checkpoint of mlx-smolvlm, which --upload publishes as it is; to "
                "convert it again with these options, give a new folder",
                param_hint="DEST",
            )
        publish(source.folder, request)
        return
    write_converted(source, dest, request, better)
    if compare_options is not None:
        verify(source, dest, compare_options)
    if request.upload is not None:
        publish(dest, request)


def find_source(name: str) -> str | Path:
    """Return the path `name` if it exists, else the folder of the demo, else a hub id.

    Raises:
        CheckpointError: It begins with the home directory of an unknown user.
    """
    from mlx_smolvlm.convert.hub import ALIASES, DEMO, resolve

    path = expand_path(name, CheckpointError)
    if path.exists():
        return path
    return resolve(DEMO) if name == DEMO else ALIASES.get(name.lower(), name)


def write_converted(
    source: Source, dest: Path, request: ConvertRequest, better: BetterOptions | None
) -> None:
    """Convert `source` to the folder `dest`, and report its size."""
    from mlx_smolvlm.convert.run import convert_checkpoint

    progress = ConversionProgress()
    with contextlib.closing(progress):
        if better is None:
            convert_checkpoint(
                source,
                dest,
                request.options,
                progress,
                force=request.force,
            )
        else:
            write_better(source, dest, request.options, better)
    say(f"wrote {dest}: {summarize(dest)}")


def publish(folder: Path, request: ConvertRequest) -> None:
    """Upload the checkpoint in `folder`, and print the URL of the commit."""
    from mlx_smolvlm.checkpoint.provenance import read_origin
    from mlx_smolvlm.convert.compare.measure import format_verification
    from mlx_smolvlm.convert.upload import upload

    assert request.upload is not None
    origin = read_origin(folder)
    if origin is None or origin.license is None:
        warn(f"{folder} states no licence, so its card says license: unknown")
    section = format_verification(folder) or ""
    say(f"uploading {folder} to {request.upload}", dim=True)
    url = upload(
        folder, request.upload, private=request.private, force=request.force, section=section
    )
    write(f"{url}\n")


def choose_dest(source: str, options: ConvertOptions, suffix: str | None = None) -> Path:
    """Return a folder in the current one, named after the source and the precision."""
    name = Path(source).resolve().name if Path(source).is_dir() else Path(source).name
    name = name.partition("@")[0].removesuffix(".gguf")
    if suffix is not None:
        return Path(f"{name}-mlx-{suffix}")
    if options.mode != "affine":
        return Path(f"{name}-mlx-{options.mode}")
    return Path(f"{name}-mlx" if options.bits is None else f"{name}-mlx-{options.bits}bit")


def summarize(folder: Path) -> str:
    """Return the bits and the size of the checkpoint in `folder`."""
    from mlx_smolvlm.checkpoint.load import read_config
    from mlx_smolvlm.checkpoint.provenance import PartSize, measure_parts

    config = read_config(folder)
    text, parts = config.quantization.text, measure_parts(folder)
    mean = f"{sum(parts.values(), PartSize(0, 0)).bits_per_weight:.2f} bits a weight in all"
    if not config.quantization.is_quantized:
        bits = config.dtype
    elif config.quantization.overrides or text is None:
        bits = mean
    else:
        bits = f"{text.bits} bits in the decoder, {mean}"
    return f"{bits}, {format_size(sum(file.stat().st_size for file in folder.iterdir()))}"
