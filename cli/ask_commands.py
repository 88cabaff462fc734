"""`chat` and `choose` as they are typed: their options, and nothing that is slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_smolvlm.cli.arguments import (
    Adapter,
    Bits,
    CacheDir,
    Images,
    ModelName,
    Offline,
    System,
    Videos,
)

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
        typer.Option(
            metavar="P",
            help="Keep the likeliest tokens up to this share, 0 to 1, before the temperature.",
        ),
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
