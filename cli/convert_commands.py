"""`convert`, `compare` and `doctor` as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_smolvlm.cli.arguments import Offline


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
            help="Of the decoder: 2, 3, 4, 5, 6, 8, or 16 for float; default: as the source.",
        ),
    ] = None,
    vision_bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the vision encoder; default: 8 if --bits is below 16."),
    ] = None,
    connector_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Of the connector; default: likewise.")
    ] = None,
    embeddings_bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the embeddings and output head; default: likewise."),
    ] = None,
    group_size: Annotated[
        int, typer.Option(metavar="32|64|128", help="Weights that share a scale (affine).")
    ] = 64,
    mode: Annotated[
        str, typer.Option(metavar="MODE", help="affine, mxfp4, mxfp8 or nvfp4.")
    ] = "affine",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of the rest: float32, float16 or bfloat16; default: as the source.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="tiny, balanced, quality, or a TOML file; in place of the options above.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Mix precisions so that all fits, e.g. 150MB (1 MB is 10^6 bytes)."
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Likewise, to so many bits a weight with its scales."),
    ] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq", help="Let each column of a matrix make up for the rounding of those before."
        ),
    ] = False,
    dwq: Annotated[
        bool,
        typer.Option(
            "--dwq", help="Tune scales and biases until the result says what the source says."
        ),
    ] = False,
    dwq_steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many samples to tune on.")
    ] = 120,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Texts, JSONL datasets or folders of them to measure and tune on; repeats; "
            "default: a few of this package.",
        ),
    ] = None,
    offline: Offline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DEST.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the result with SOURCE, and say what it lost.")
    ] = False,
    verify_texts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Texts to compare on; repeats. Implies --verify."),
    ] = None,
    verify_pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to compare on; likewise.")
    ] = None,
    upload: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Then upload it to the hub; SOURCE may be converted already."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the new repository private.")
    ] = False,
) -> None:
    """Convert a Hugging Face or mlx-community checkpoint."""
    from mlx_smolvlm.cli.compare import Samples
    from mlx_smolvlm.cli.convert import ConvertRequest
    from mlx_smolvlm.cli.convert import convert as run
    from mlx_smolvlm.cli.precision import Better
    from mlx_smolvlm.convert.quantize import ConvertOptions
    from mlx_smolvlm.errors import CheckpointError

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
    better = Better(
        recipe=recipe,
        target_size=target_size,
        target_bits=target_bits,
        gptq=gptq,
        dwq_steps=dwq_steps if dwq else None,
        calibration=tuple(calibration or ()),
    )
    samples = Samples(tuple(verify_texts) if verify_texts else None, verify_pictures)
    wanted = samples if verify or samples != Samples() else None
    request = ConvertRequest(
        source=source,
        dest=dest,
        options=better.options(options),
        force=force,
        offline=offline,
        upload=upload,
        private=private,
        verify=wanted,
        better=better,
    )
    run(request)


COMPARE_EPILOG = """\
\b
Examples:
  mlx-smolvlm compare smolvlm-256m ./smolvlm-256m-4bit
  mlx-smolvlm compare ./float ./packed --pictures photos/ --plot lost.png --json lost.json
  mlx-smolvlm compare ./before ./after --data data/test.jsonl --limit 50"""


def compare(
    reference: Annotated[
        str, typer.Argument(metavar="A", help="What to compare with: a model as in chat.")
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="What it became; of the same tokenizer.")
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Texts to predict; repeats. Default: some of ours."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures to look at. Default: some that are drawn."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What to ask about the first pictures, in turn; repeats."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 48,
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "low",
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A dataset to answer, as eval takes one; repeats."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Of each of its tasks, the first N lines.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all that was found here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it here, as a PNG.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Say how far a checkpoint lies from another: predictions, pictures, answers, weights."""
    from mlx_smolvlm.cli.compare import CompareRequest, Samples
    from mlx_smolvlm.cli.compare import compare as run
    from mlx_smolvlm.cli.options import as_text, parse_detail

    run(
        CompareRequest(
            reference=reference,
            other=other,
            samples=Samples(tuple(texts) if texts else None, pictures, tuple(data or ()), limit),
            questions=tuple(as_text("--question", text) for text in question or ()),
            max_tokens=max_tokens,
            detail=parse_detail(detail),
            json=json,
            plot=plot,
            offline=offline,
        )
    )


def doctor(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="A folder, a converted model, or demo; repeats."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and the converted checkpoints; nothing is sent."""
    from mlx_smolvlm.cli.doctor import doctor as run

    run(tuple(model or ()), json)
