"""The command table, and the one place that turns errors into exit statuses.

0 is success, 1 an error, 2 a wrong option, 130 Ctrl-C, 141 a closed stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_smolvlm.cli.render import OutputClosedError, fail, prepare_streams, write
from mlx_smolvlm.errors import SmolVLMError

OUTPUT_CLOSED = 141

app = typer.Typer(
    help="Run the SmolVLM family of vision-language models with MLX, on this machine.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich is slow to import and to render
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command in `sys.argv`; leaves by SystemExit."""
    prepare_streams()
    try:
        app(prog_name="mlx-smolvlm")
    except OutputClosedError:
        sys.exit(OUTPUT_CLOSED)
    except SmolVLMError as error:
        fail(error)
    except MemoryError:
        fail("out of memory; try --detail low, or a smaller model or --bits 4")
    except OSError as error:
        name = f": {error.filename}" if error.filename is not None else ""
        fail(f"{error.strerror or error}{name}")
    except RuntimeError as error:
        if "malloc" not in str(error) and "Insufficient Memory" not in str(error):
            raise
        fail(f"out of memory ({error}); try --detail low, or a smaller model or --bits 4")
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from mlx_smolvlm import __version__

        write(f"mlx-smolvlm {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


CHAT_EPILOG = """\
\b
Examples:
  mlx-smolvlm chat "What is in this picture?" -i photo.png
  mlx-smolvlm chat "What happens?" -v clip.mp4 -m smolvlm2-256m
  mlx-smolvlm chat "What is said on the signs?" -v walk.mp4 --chunk 60 -m smolvlm2-500m
  mlx-smolvlm chat "Read the text." -i page.png -m smolvlm2-500m --bits 4
  echo "Why is the sky blue?" | mlx-smolvlm chat -m smolvlm2-2.2b
  curl -s https://example.org/a.jpg | mlx-smolvlm chat "Describe it." -i - --json
  mlx-smolvlm chat -m smolvlm2-256m"""


@app.command(epilog=CHAT_EPILOG)
def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The question. Without it: stdin if piped, else a conversation.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", metavar="IMAGE", help="A path, URL, data URI, or - for stdin; repeats."
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video", "-v", metavar="VIDEO", help="A path, URL, data URI, or - for stdin; repeats."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A folder, a hub id, an alias, or demo."
        ),
    ] = "demo",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 1024,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; higher varies more.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Share of the likeliest tokens to choose from, 0 to 1."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Repeat a varied answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer at this text; repeats.")
    ] = None,
    detail: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="high: tiles as in training; auto: no enlarging; low: one tile; "
            "a number: tiles along the longer side at most.",
        ),
    ] = "high",
    fps: Annotated[
        float | None,
        typer.Option(metavar="F", help="Frames of a video a second; default: as in training."),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(metavar="N", help="Frames of a video at most; likewise.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="S", help="Begin the video here: seconds, or MM:SS.")
    ] = None,
    end: Annotated[str | None, typer.Option(metavar="S", help="End the video here.")] = None,
    sample: Annotated[
        str,
        typer.Option(
            metavar="even|scene", help="Frames at equal distances, or where scenes change."
        ),
    ] = "even",
    chunk: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Answer for each part of so many seconds, then over the parts."
        ),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the frames that the model sees to this folder."),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(metavar="4|8|16", help="Precision when converting a model on first use."),
    ] = None,
    kv_bits: Annotated[
        int | None,
        typer.Option(metavar="8|4", help="Precision of keys and values; default: as computed."),
    ] = None,
    max_kv_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep the first message, the pictures and the latest tokens, N in all; "
            "default: every token.",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep what prompts have in common here, for the next run."
        ),
    ] = None,
    on_full: Annotated[
        str,
        typer.Option(
            metavar="error|drop-oldest",
            help="In a conversation that fills the context: stop, or forget its beginning.",
        ),
    ] = "error",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per reply, not streamed.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print counts, speed and memory on stderr.")
    ] = False,
) -> None:
    """Ask about pictures, videos or text, once or in a conversation."""
    from mlx_smolvlm.cli.chat import chat as run
    from mlx_smolvlm.cli.options import (
        ChatOptions,
        as_text,
        make_cache_options,
        make_sampling,
        make_video_options,
        parse_detail,
        parse_on_full,
    )

    options = ChatOptions(
        prompt=None if prompt is None else as_text("PROMPT", prompt),
        images=tuple(image or ()),
        videos=tuple(video or ()),
        frames=make_video_options(
            fps=fps,
            max_frames=max_frames,
            start=start,
            end=end,
            sample=sample,
            chunk=chunk,
            frames=frames,
        ),
        model=model,
        system=None if system is None else as_text("--system", system),
        sampling=make_sampling(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=tuple(stop or ()),
        ),
        detail=parse_detail(detail),
        bits=bits,
        cache=make_cache_options(folder=cache_dir, kv_bits=kv_bits, max_kv_tokens=max_kv_tokens),
        on_full=parse_on_full(on_full),
        offline=offline,
        json=json,
        stats=stats,
    )
    raise typer.Exit(run(options))


CHOOSE_EPILOG = """\
\b
Examples:
  mlx-smolvlm choose "What is this?" -i photo.png -c "A cat." -c "A dog." -m smolvlm-256m
  mlx-smolvlm choose "Does somebody run?" -v clip.mp4 -c Yes. -c No. -m smolvlm2-256m --json"""


@app.command(epilog=CHOOSE_EPILOG)
def choose(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    choice: Annotated[
        list[str],
        typer.Option(
            "--choice", "-c", metavar="TEXT", help="An answer as the model would word it; repeats."
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", metavar="IMAGE", help="A path, URL, data URI, or - for stdin; repeats."
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video", "-v", metavar="VIDEO", help="A path, URL, data URI, or - for stdin; repeats."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A folder, a hub id, an alias, or demo."
        ),
    ] = "demo",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    normalize: Annotated[
        str,
        typer.Option(
            metavar="none|tokens",
            help="Compare whole answers, or their means over tokens, so that length counts less.",
        ),
    ] = "none",
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    bits: Annotated[
        int | None,
        typer.Option(metavar="4|8|16", help="Precision when converting a model on first use."),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep what prompts have in common here, for the next run."
        ),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how likely each of some answers to a question is."""
    from mlx_smolvlm.cli.choose import ChooseOptions
    from mlx_smolvlm.cli.choose import choose as run
    from mlx_smolvlm.cli.options import as_text, make_cache_options, parse_detail

    options = ChooseOptions(
        question=as_text("QUESTION", question),
        choices=tuple(choice),
        images=tuple(image or ()),
        videos=tuple(video or ()),
        model=model,
        system=None if system is None else as_text("--system", system),
        detail=parse_detail(detail),
        normalize=normalize,
        bits=bits,
        cache=make_cache_options(folder=cache_dir, kv_bits=None, max_kv_tokens=None),
        offline=offline,
        json=json,
    )
    run(options)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a hub id (owner/name) or an alias.")
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
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DEST.")] = False,
) -> None:
    """Convert a Hugging Face or mlx-community checkpoint."""
    from mlx_smolvlm.cli.convert import ConvertRequest
    from mlx_smolvlm.cli.convert import convert as run
    from mlx_smolvlm.convert.quantize import ConvertOptions

    options = ConvertOptions(
        bits=bits,
        vision_bits=vision_bits,
        connector_bits=connector_bits,
        embeddings_bits=embeddings_bits,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
    )
    run(ConvertRequest(source=source, dest=dest, options=options, force=force, offline=offline))


@app.command()
def models(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the aliases and the converted checkpoints in the cache."""
    from mlx_smolvlm.cli.models import models as run

    run(json)


if __name__ == "__main__":
    main()
