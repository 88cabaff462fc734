"""The command table, and the one place that turns errors into exit statuses.

0 is success, 1 an error, 2 a wrong option, 130 Ctrl-C, 141 a closed stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_smolvlm.cli.models import app as models_app
from mlx_smolvlm.cli.render import (
    OutputClosedError,
    fail,
    os_fault,
    out_of_memory,
    prepare_streams,
    write,
)
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
    except OSError as error:
        fail(os_fault(error))
    except (MemoryError, RuntimeError) as error:
        if (message := out_of_memory(error)) is None:
            raise
        fail(message)
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


# Options that several commands share.
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

CHAT_EPILOG = """\
\b
Examples:
  mlx-smolvlm chat "What is in this picture?" -i photo.png
  mlx-smolvlm chat "What happens?" -v clip.mp4 -m smolvlm2-256m
  mlx-smolvlm chat "What is said on the signs?" -v walk.mp4 --chunk 60 -m smolvlm2-500m
  mlx-smolvlm chat "Read the text." -i page.png -m smolvlm2-500m --bits 4
  echo "Why is the sky blue?" | mlx-smolvlm chat -m smolvlm2-2.2b
  curl -s https://example.org/a.jpg | mlx-smolvlm chat "Describe it." -i - --json
  mlx-smolvlm chat "Read the receipt." -i receipt.jpg -m smolvlm2-500m --schema receipt.json
  mlx-smolvlm chat "What colour is it?" -i photo.png --regex "red|green|blue"
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
    image: Images = None,
    video: Videos = None,
    model: ModelName = "demo",
    system: System = None,
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
    schema: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answer with JSON that fits this JSON Schema."),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Answer with what this regular expression matches."),
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
    bits: Bits = None,
    adapter: Adapter = None,
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
    cache_dir: CacheDir = None,
    on_full: Annotated[
        str,
        typer.Option(
            metavar="error|drop-oldest",
            help="In a conversation that fills the context: stop, or forget its beginning.",
        ),
    ] = "error",
    offline: Offline = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per reply, not streamed.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print counts, speed and memory on stderr.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="In a conversation: answers as they are, not Markdown.")
    ] = False,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="In a conversation: show no pictures inline.")
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
        read_schema,
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
            schema=read_schema(schema),
            regex=None if regex is None else as_text("--regex", regex),
        ),
        detail=parse_detail(detail),
        bits=bits,
        adapter=adapter,
        cache=make_cache_options(folder=cache_dir, kv_bits=kv_bits, max_kv_tokens=max_kv_tokens),
        on_full=parse_on_full(on_full),
        offline=offline,
        json=json,
        stats=stats,
        plain=plain,
        pictures=not no_images,
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
    image: Images = None,
    video: Videos = None,
    model: ModelName = "demo",
    system: System = None,
    normalize: Annotated[
        str,
        typer.Option(
            metavar="none|tokens",
            help="Compare whole answers, or their means over tokens, so that length counts less.",
        ),
    ] = "none",
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    bits: Bits = None,
    adapter: Adapter = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
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
        adapter=adapter,
        cache=make_cache_options(folder=cache_dir, kv_bits=None, max_kv_tokens=None),
        offline=offline,
        json=json,
    )
    run(options)


EVAL_EPILOG = """\
\b
Examples:
  mlx-smolvlm eval demo data/test.jsonl
  mlx-smolvlm eval smolvlm-256m docvqa.jsonl --metric anls --max-tokens 64
  mlx-smolvlm eval ./my-model data --limit 50 --show-errors 10
  mlx-smolvlm eval ./my-model data/test.jsonl --markdown >> README.md"""


@app.command("eval", epilog=EVAL_EPILOG)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, an alias, or demo.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="JSONL files, or folders with a test.jsonl."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="For lines that name none: exact, normalized, anls, relaxed, choices or letter; "
            "default: choices if a line has them, else exact.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only lines of these tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Of each task, the first N lines.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 256,
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where each result is kept and a stopped run goes on; "
            "default: eval-MODEL-DATA.jsonl, here.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the results that are there.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Count a line that cannot be asked as wrong, and go on."),
    ] = False,
    show_errors: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Print N lines that are not right on stderr."),
    ] = 0,
    adapter: Adapter = None,
    bits: Bits = None,
    offline: Offline = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table for a model card.")
    ] = False,
) -> None:
    """Measure how many answers to a dataset's questions are right, by task."""
    from mlx_smolvlm.cli.evaluate import EvaluateRequest, make_evaluation_options
    from mlx_smolvlm.cli.evaluate import evaluate as run
    from mlx_smolvlm.cli.options import as_text, make_cache_options, parse_detail

    request = EvaluateRequest(
        model=model,
        data=tuple(as_text("DATA", path) for path in data),
        options=make_evaluation_options(
            metric=metric,
            tasks=tasks,
            limit=limit,
            max_tokens=max_tokens,
            detail=parse_detail(detail),
            skip_bad=skip_bad,
        ),
        adapter=adapter,
        bits=bits,
        cache=make_cache_options(folder=None, kv_bits=None, max_kv_tokens=None),
        offline=offline,
        results=results,
        restart=restart,
        show_errors=show_errors,
        json=json,
        markdown=markdown,
    )
    raise typer.Exit(run(request))


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

    options = ConvertOptions(
        bits=bits,
        vision_bits=vision_bits,
        connector_bits=connector_bits,
        embeddings_bits=embeddings_bits,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
    )
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


@app.command(epilog=COMPARE_EPILOG)
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


TRAIN_EPILOG = """\
\b
Examples:
  mlx-smolvlm train receipts.toml
  mlx-smolvlm train receipts.toml --out receipts-2 --fuse
  mlx-smolvlm chat "Read it." -i receipt.jpg -m smolvlm2-256m --adapter receipts-trained/adapter"""


@app.command(epilog=TRAIN_EPILOG)
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="What to train, on which data, and how.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to write, and where an earlier run goes on; default: as the file says, "
            "or its name with -trained.",
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Write a checkpoint of model and adapter together, too.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Train a model further on your own pictures, videos and answers."""
    from mlx_smolvlm.cli.train import TrainOptions
    from mlx_smolvlm.cli.train import train as run

    raise typer.Exit(run(TrainOptions(config=config, out=out, fuse=fuse, offline=offline)))


@app.command()
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


app.add_typer(models_app, name="models")


if __name__ == "__main__":
    main()
