"""Command-line values, checked before any work is done."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import typer

from mlx_smolvlm.files import expand_path
from mlx_smolvlm.quoting import redact_url

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions, Sampling, Video

Detail = Literal["high", "auto", "low"] | int
OnFull = Literal["error", "drop-oldest"]
CHAT_BITS = (4, 8, 16)


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of each video to take, see `Video`; where to write them, if anywhere.

    `chunk_s` is the length of the parts that a long video is asked about in.
    """

    fps: float | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    sample: Literal["even", "scene"] = "even"
    chunk_s: float | None = None
    frames_folder: Path | None = None


@dataclass(frozen=True)
class ChatOptions:
    """What `chat` was asked for; a `prompt` of None is to be read from stdin."""

    prompt: str | None
    images: tuple[str, ...]
    videos: tuple[str, ...]
    frames: VideoOptions
    model: str
    system: str | None
    sampling: Sampling
    detail: Detail
    bits: int | None
    adapter: Path | None
    cache: CacheOptions
    on_full: OnFull
    offline: bool
    json: bool
    stats: bool
    plain: bool
    pictures: bool

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise typer.BadParameter("it is empty", param_hint="PROMPT")
        check_bits(self.bits)
        sources = (*self.images, *self.videos)
        if "-" in sources and self.prompt is None:
            raise typer.BadParameter(
                "it is needed with '-', since stdin is the picture or video", param_hint="PROMPT"
            )
        check_sources(sources, self.offline)
        if self.prompt is not None and not self.videos:
            for name in fields(self.frames):
                if getattr(self.frames, name.name) != name.default:
                    option = _OPTION_NAMES.get(name.name, name.name.replace("_", "-"))
                    raise typer.BadParameter("it needs a video (-v)", param_hint=f"--{option}")
        if self.frames.chunk_s is not None and self.prompt is None and sys.stdin.isatty():
            raise typer.BadParameter(
                "it needs a question: a conversation is not held part by part",
                param_hint="--chunk",
            )
        if self.frames.chunk_s is not None and (len(self.videos) != 1 or self.images):
            raise typer.BadParameter("it needs one video (-v), alone", param_hint="--chunk")


class ModelOptions(Protocol):
    """Which model to load, and how."""

    @property
    def model(self) -> str: ...
    @property
    def bits(self) -> int | None: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def cache(self) -> CacheOptions: ...
    @property
    def offline(self) -> bool: ...


def check_bits(bits: int | None) -> None:
    """Refuse a precision that a model cannot be converted to on first use.

    Raises:
        typer.BadParameter: It names the option.
    """
    if bits is not None and bits not in CHAT_BITS:
        raise typer.BadParameter(f"{bits} is none of 4, 8, 16", param_hint="--bits")


def check_sources(sources: Sequence[str], offline: bool) -> None:
    """Refuse pictures and videos that cannot be opened as they are given.

    Raises:
        typer.BadParameter: It names the option.
    """
    if sources.count("-") > 1:
        raise typer.BadParameter(
            "stdin holds one picture or video; '-' came twice", param_hint="-i, -v"
        )
    if offline and (url := next(filter(is_url, sources), None)):
        raise typer.BadParameter(f"{redact_url(url)} needs the network", param_hint="--offline")


def as_text(name: str, value: str) -> str:
    """The argument `name` as text; in a locale without UTF-8 its bytes are read as UTF-8.

    Raises:
        typer.BadParameter: Its bytes are no text.
    """
    try:
        value.encode()
        return value
    except UnicodeEncodeError:  # bytes that the locale could not decode came as surrogates
        pass
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        raise typer.BadParameter("it is not valid UTF-8 text", param_hint=name) from None


def parse_time(name: str, text: str | None) -> float | None:
    """Seconds in `text`: a number of them, or MM:SS, or H:MM:SS.

    Raises:
        typer.BadParameter: It is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no time; give seconds, MM:SS or H:MM:SS", param_hint=f"--{name}"
        )
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def make_video_options(
    *,
    fps: float | None,
    max_frames: int | None,
    start: str | None,
    end: str | None,
    sample: str,
    chunk: float | None,
    frames: Path | None,
) -> VideoOptions:
    """The choice of frames that the options describe; `Video` itself owns the ranges.

    Raises:
        typer.BadParameter: It names the option and its range.
    """
    options = VideoOptions(
        fps=fps,
        max_frames=max_frames,
        start_s=parse_time("start", start),
        end_s=parse_time("end", end),
        sample=sample,  # type: ignore[arg-type]  # Video checks it
        chunk_s=chunk,
        frames_folder=frames,
    )
    if chunk is not None and not 0 < chunk < math.inf:
        raise typer.BadParameter(f"{chunk:g} is not above 0", param_hint="--chunk")
    if options != VideoOptions(chunk_s=chunk, frames_folder=frames):  # Video brings Pillow
        try:
            make_video("", options)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            option = _OPTION_NAMES.get(name, name.replace("_", "-"))
            rest = rest.replace("start_s", "--start")
            raise typer.BadParameter(rest, param_hint=f"--{option}") from None
    return options


_OPTION_NAMES = {
    "start_s": "start",
    "end_s": "end",
    "chunk_s": "chunk",
    "frames_folder": "frames",
    "folder": "cache-dir",
}


def make_video(source: str, options: VideoOptions) -> Video:
    """The video at `source`, sampled as `options` say."""
    from mlx_smolvlm import Video

    return Video(
        source,
        fps=options.fps,
        max_frames=options.max_frames,
        start_s=options.start_s,
        end_s=options.end_s,
        sample=options.sample,
    )


def is_url(image: str) -> bool:
    """Whether the picture has to be fetched."""
    return image.lower().startswith(("http://", "https://"))


def parse_detail(text: str) -> Detail:
    """The level of detail that `text` names.

    Raises:
        typer.BadParameter: It is neither a level nor a number of tiles.
    """
    levels: tuple[Detail, ...] = ("high", "auto", "low")
    for level in levels:
        if text == level:
            return level
    from mlx_smolvlm.image import MAX_TILES_PER_SIDE

    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_TILES_PER_SIDE:
        return int(text)
    raise typer.BadParameter(
        f"{text!r} is none of high, auto, low, or a number of tiles from 1 to {MAX_TILES_PER_SIDE}",
        param_hint="--detail",
    )


def parse_on_full(text: str) -> OnFull:
    """What to do when the context is full.

    Raises:
        typer.BadParameter: It is neither.
    """
    choices: tuple[OnFull, ...] = ("error", "drop-oldest")
    for choice in choices:
        if text == choice:
            return choice
    raise typer.BadParameter(f"{text!r} is neither error nor drop-oldest", param_hint="--on-full")


def read_schema(value: str | None) -> str | None:
    """The JSON Schema that `value` is, if it begins with {, or that the file of that name holds.

    Raises:
        typer.BadParameter: The file cannot be read as text.
    """
    if value is None or value.lstrip().startswith("{"):
        return None if value is None else as_text("--schema", value)
    try:
        return expand_path(value).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:  # no text, or no name of a file
        reason = str(error)
    raise typer.BadParameter(f"{value}: {reason}", param_hint="--schema")


def make_sampling(
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int | None,
    stop: tuple[str, ...],
    schema: str | None,
    regex: str | None,
) -> Sampling:
    """The sampling that the options describe; `Sampling` itself owns the ranges.

    Raises:
        typer.BadParameter: It names the option and its range.
    """
    from mlx_smolvlm import Sampling

    stop = tuple(as_text("--stop", text) for text in stop)
    try:
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
            schema=schema,
            regex=regex,
        )
    except ValueError as error:
        name = str(error).split(maxsplit=1)[0]
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None


def make_cache_options(
    *, folder: Path | None, kv_bits: int | None, max_kv_tokens: int | None
) -> CacheOptions:
    """The cache that the options describe; `CacheOptions` itself owns the ranges.

    Raises:
        typer.BadParameter: It names the option and its range.
    """
    from mlx_smolvlm import CacheOptions

    try:
        return CacheOptions(folder=folder, kv_bits=kv_bits, max_kv_tokens=max_kv_tokens)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        option = _OPTION_NAMES.get(name, name.replace("_", "-"))
        rest = rest.replace("kv_bits", "--kv-bits").replace("max_kv_tokens", "--max-kv-tokens")
        raise typer.BadParameter(rest, param_hint=f"--{option}") from None
