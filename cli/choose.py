"""`mlx-smolvlm choose`: how likely each of several answers is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_smolvlm.cli.args import (
    AdapterOption,
    BitsOption,
    CacheDirOption,
    ImagesOption,
    MemoryLimitOption,
    ModelOption,
    OfflineOption,
    SystemOption,
    VideosOption,
    check_sources,
    decode_optional_text,
    decode_text,
    make_cache_options,
    parse_detail,
    parse_memory_limit,
)
from mlx_smolvlm.cli.load import load_model, say_what_the_demo_knows
from mlx_smolvlm.cli.media import (
    VideoOptions,
    open_video_source,
    print_cost,
    sample_video,
)
from mlx_smolvlm.cli.output import format_table, write, write_json

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions
    from mlx_smolvlm.media.tiles import Detail

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
    image: ImagesOption = None,
    video: VideosOption = None,
    model: ModelOption = None,
    system: SystemOption = None,
    normalize: Annotated[
        Literal["none", "tokens"],
        typer.Option(
            metavar="none|tokens",
            help="Compare whole answers, or their means over tokens, so that length counts less.",
        ),
    ] = "none",
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "high",
    bits: BitsOption = None,
    adapter: AdapterOption = None,
    cache_dir: CacheDirOption = None,
    memory_limit: MemoryLimitOption = None,
    offline: OfflineOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the probability of each of several answers to a question."""
    from mlx_smolvlm.cli.question import announce_media, read_arguments

    typed = read_arguments([question], image or (), video or ())
    options = ChooseOptions(
        question=typed.text,
        choices=tuple(choice),
        images=typed.images,
        videos=typed.videos,
        model=model,
        system=decode_optional_text("--system", system),
        detail=parse_detail(detail),
        normalize=normalize,
        bits=bits,
        adapter=adapter,
        cache=make_cache_options(folder=cache_dir, kv_bits=None, max_kv_tokens=None),
        memory_limit=parse_memory_limit(memory_limit),
        offline=offline,
        json=json,
    )
    announce_media(typed)
    print_choices(options)


@dataclass(frozen=True)
class ChooseOptions:
    """The options of `choose`."""

    question: str
    choices: tuple[str, ...]
    images: tuple[str, ...]
    videos: tuple[str, ...]
    model: str | None
    system: str | None
    detail: Detail
    normalize: Literal["none", "tokens"]
    bits: int | None
    adapter: Path | None
    cache: CacheOptions
    memory_limit: int | None
    offline: bool
    json: bool

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise typer.BadParameter("it is empty", param_hint="QUESTION")
        check_sources((*self.images, *self.videos), self.offline)


def print_choices(options: ChooseOptions) -> None:
    """Print the choices with their probabilities, the likeliest first.

    Choices, pictures and videos are checked before the model is loaded.
    """
    from mlx_smolvlm.cli.many_pictures import open_closed, open_pictures

    choices = decode_choices(options)
    pictures = open_pictures(options.images)
    videos = [open_video_source(source, VideoOptions()) for source in options.videos]
    vlm = load_model(options, frozenset({"kv_bits", "max_frames"}))
    say_what_the_demo_knows(vlm)
    images = open_closed(vlm, pictures, options.detail)
    for image in images:
        print_cost(vlm, image, options.detail)
    choice = vlm.choose(
        options.question,
        choices,
        images=[one.image for one in images],
        videos=[sample_video(vlm, one) for one in videos],
        system=options.system,
        detail=options.detail,
        normalize=options.normalize,
    )
    if options.json:
        write_json({**choice.to_dict(), "normalize": options.normalize})
        return
    ranked = sorted(zip(choice.probabilities, choices, strict=True), key=lambda one: -one[0])
    write(format_table([(f"{probability:.4f}", text) for probability, text in ranked]))


def decode_choices(options: ChooseOptions) -> tuple[str, ...]:
    """Return the choices as text.

    Raises:
        typer.BadParameter: There are too few choices, or one is empty, repeated or not text.
    """
    from mlx_smolvlm.generate.choose import check_choices

    texts = tuple(decode_text("--choice", choice) for choice in options.choices)
    try:
        return check_choices(texts, options.normalize)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--choice") from None
