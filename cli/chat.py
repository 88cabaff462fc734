"""`mlx-smolvlm chat`: one answer, an answer for each part of a long video, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from mlx_smolvlm.cli.args import (
    AdapterOption,
    BitsOption,
    CacheDirOption,
    ChatOptions,
    ImagesOption,
    MemoryLimitOption,
    ModelOption,
    OfflineOption,
    SystemOption,
    VideosOption,
    decode_optional_text,
    make_cache_options,
    make_sampling,
    parse_detail,
    parse_memory_limit,
    read_schema,
)
from mlx_smolvlm.cli.conversations import Keeper, find_last_conversation, resume_conversation
from mlx_smolvlm.cli.load import load_model, say_what_the_demo_knows
from mlx_smolvlm.cli.media import (
    OpenedImage,
    OpenedVideo,
    VideoOptions,
    check_video_options,
    open_video_source,
    parse_time,
    print_cost,
    sample_video,
)
from mlx_smolvlm.cli.printer import INTERRUPTED, Printer
from mlx_smolvlm.errors import PromptError

if TYPE_CHECKING:
    from mlx_smolvlm import AnswerStream, Conversation, SmolVLM
    from mlx_smolvlm.cli.many_pictures import ClosedImage

CHAT_EPILOG = """\
\b
Examples:
  mlx-smolvlm chat "What is in photo.png?"
  mlx-smolvlm photo.png "Is anybody in it?" -m smolvlm2-500m
  mlx-smolvlm chat "Which of them shows a dog?" -i holiday -m smolvlm2-500m --detail low
  mlx-smolvlm chat "What happens?" -v clip.mp4 -m smolvlm2-256m
  mlx-smolvlm chat "What is said on the signs?" -v walk.mp4 --chunk 60 -m smolvlm2-500m
  mlx-smolvlm chat "Read the text." -i page.png -m smolvlm2-500m --bits 4
  echo "Why is the sky blue?" | mlx-smolvlm chat -m smolvlm2-2.2b
  curl -s https://example.org/a.jpg | mlx-smolvlm chat "Describe it." -i - --json
  mlx-smolvlm chat "Read the receipt." -i receipt.jpg -m smolvlm2-500m --schema receipt.json
  mlx-smolvlm chat "What colour is it?" -i photo.png --regex "red|green|blue"
  mlx-smolvlm chat -m smolvlm2-256m
  mlx-smolvlm chat --continue"""


def chat(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="The question, which may name pictures and videos: What is in photo.png? "
            "Without it: stdin if piped, else a conversation.",
        ),
    ] = None,
    image: ImagesOption = None,
    video: VideosOption = None,
    model: ModelOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--continue", "-c", help="Go on with the last conversation, and with its model."
        ),
    ] = False,
    system: SystemOption = None,
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
    draft: Annotated[
        str,
        typer.Option(
            metavar="auto|off|N",
            help="Guess up to N tokens, 1 to 7, and check them together, which changes no answer; "
            "auto: for documents, --schema and --regex.",
        ),
    ] = "auto",
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
        typer.Option(metavar="F", help="Frames per second of a video; default: as in training."),
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most frames of a video; default: as in training."),
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="S", help="Begin the video here: seconds, or MM:SS.")
    ] = None,
    end: Annotated[str | None, typer.Option(metavar="S", help="End the video here.")] = None,
    sample: Annotated[
        Literal["even", "scene"],
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
    bits: BitsOption = None,
    adapter: AdapterOption = None,
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
    cache_dir: CacheDirOption = None,
    memory_limit: MemoryLimitOption = None,
    on_full: Annotated[
        Literal["error", "drop-oldest"],
        typer.Option(
            metavar="error|drop-oldest",
            help="In a conversation that fills the context: stop, or forget its beginning.",
        ),
    ] = "error",
    offline: OfflineOption = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per reply, not streamed.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print counts, speed and memory on stderr.")
    ] = False,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="In a conversation: answers as plain text, not Markdown."),
    ] = False,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="In a conversation: show no pictures inline.")
    ] = False,
) -> None:
    """Ask about pictures, videos or text, once or in a conversation."""
    from mlx_smolvlm.cli.many_pictures import open_closed
    from mlx_smolvlm.cli.question import announce_media, read_arguments

    video_options = VideoOptions(
        fps=fps,
        max_frames=max_frames,
        start_s=parse_time("start", start),
        end_s=parse_time("end", end),
        sample=sample,
        chunk_s=chunk,
        frames_folder=frames,
    )
    typed = read_arguments(prompt or (), image or (), video or ())
    options = ChatOptions(
        prompt=typed.text if prompt else None,
        images=typed.images,
        videos=typed.videos,
        frames=check_video_options(video_options),
        model=model,
        system=decode_optional_text("--system", system),
        sampling=make_sampling(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=tuple(stop or ()),
            schema=read_schema(schema),
            regex=decode_optional_text("--regex", regex),
            draft=draft,
        ),
        detail=parse_detail(detail),
        bits=bits,
        adapter=adapter,
        cache=make_cache_options(folder=cache_dir, kv_bits=kv_bits, max_kv_tokens=max_kv_tokens),
        memory_limit=parse_memory_limit(memory_limit),
        on_full=on_full,
        offline=offline,
        json=json,
        stats=stats,
        plain=plain,
        pictures=not no_images,
    )
    if resume and chunk is not None:
        raise typer.BadParameter("it cannot be used together with --continue", param_hint="--chunk")
    kept = find_last_conversation() if resume else None
    question = read_question(options)
    announce_media(typed)
    vlm = load_model(options if kept is None else kept.choose_model(options))
    say_what_the_demo_knows(vlm)
    images = open_closed(vlm, question.images, options.detail)
    if question.prompt is None:
        from mlx_smolvlm.cli.terminal.session import converse

        raise typer.Exit(converse(vlm, options, [*images, *question.videos], kept))
    printer = Printer(vlm, options)
    conversation = None if kept is None else resume_conversation(vlm, options, kept)
    for stream, label, extra in start_answers(vlm, options, question, images, conversation):
        is_finished = printer.print_answer(stream, label, extra)
        if conversation is not None and (is_finished or stream.reply.text):
            Keeper(vlm, kept).keep(conversation)
        if not is_finished:
            raise typer.Exit(INTERRUPTED)
    if printer.has_cut_answer:
        raise typer.Exit(1)


class Question(NamedTuple):
    """What to ask; without a prompt, a conversation begins with these pictures and videos."""

    prompt: str | None
    images: list[OpenedImage | ClosedImage]
    videos: list[OpenedVideo]


def read_question(options: ChatOptions) -> Question:
    """Open pictures and videos, and read the prompt from stdin if it was piped in.

    This comes before the model is loaded, so that mistakes are reported at once.

    Raises:
        MediaError: A picture or video cannot be opened.
        PromptError: stdin is empty, or not text.
    """
    from mlx_smolvlm.cli.many_pictures import open_pictures

    images = open_pictures(options.images)
    videos = [open_video_source(source, options.frames) for source in options.videos]
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_prompt()
    return Question(prompt, images, videos)


def read_prompt() -> str:
    """Return the prompt on stdin, without the line break at its end.

    Raises:
        PromptError: stdin is empty, or not text.
    """
    data = sys.stdin.buffer.read()
    try:
        text = data.decode(sys.stdin.encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"stdin is the prompt, but it is not {error.encoding} text (byte {error.start}); "
            "to read a picture from it use: -i - PROMPT"
        ) from None
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if not text.strip():
        raise PromptError("there is no prompt: stdin is empty; pass PROMPT or pipe one in")
    return text


class StartedAnswer(NamedTuple):
    """An answer to print: its stream, a label in front of it, and more fields for `--json`."""

    stream: AnswerStream
    label: str = ""
    extra: Mapping[str, object] = {}


def start_answers(
    vlm: SmolVLM,
    options: ChatOptions,
    question: Question,
    images: Sequence[OpenedImage],
    conversation: Conversation | None = None,
) -> Iterator[StartedAnswer]:
    """Yield the answer, or with `--chunk` one for each part and one for the whole video.

    Args:
        vlm: The model.
        options: How to answer.
        question: What to ask.
        images: Its pictures, opened.
        conversation: What the question goes on with; None for nothing.
    """
    assert question.prompt is not None
    seconds = options.frames.chunk_s
    if seconds is None:
        for image in images:
            print_cost(vlm, image, options.detail)
        pictures = [one.image for one in images]
        clips = [sample_video(vlm, one) for one in question.videos]
        if conversation is not None:
            yield StartedAnswer(conversation.stream(question.prompt, pictures, videos=clips))
            return
        stream = vlm.stream(
            question.prompt,
            images=pictures,
            videos=clips,
            system=options.system,
            sampling=options.sampling,
            detail=options.detail,
        )
        yield StartedAnswer(stream)
        return
    video = question.videos[0].video
    for part in vlm.stream_parts(
        question.prompt, video, seconds, system=options.system, sampling=options.sampling
    ):
        label = "whole video" if part.is_whole else part.label
        extra = {"start_s": part.start_s, "end_s": part.end_s, "is_whole": part.is_whole}
        yield StartedAnswer(part.stream, label, extra)
