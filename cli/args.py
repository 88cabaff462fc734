"""Options that several commands share, and their conversion to the library's types."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from mlx_smolvlm.cli.media import VideoOptions, is_url, name_video_option
from mlx_smolvlm.errors import redact_url
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions, Sampling
    from mlx_smolvlm.media.tiles import Detail

ImagesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        "-i",
        metavar="IMAGE",
        help="A path, folder, pattern, URL, data URI, or - for stdin; repeats.",
    ),
]
VideosOption = Annotated[
    list[str] | None,
    typer.Option(
        "--video", "-v", metavar="VIDEO", help="A path, URL, data URI, or - for stdin; repeats."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A folder, a hub id, an alias, or demo; default: the converted model used last.",
    ),
]
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")]
BitsOption = Annotated[
    Literal[4, 8, 16] | None,
    typer.Option(
        metavar="4|8|16",
        help="Precision when converting a model on first use; default: the most that fits.",
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A LoRA adapter made by mlx-smolvlm train for this model."),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the caches of prompts in this folder for later runs."),
]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Most memory to take, e.g. 600MB; refuse what cannot fit into it."
    ),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network.")]


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
LARGEST_SIZE = 2**63  # bytes; sizes from here on are no 64-bit integers


@dataclass(frozen=True)
class ChatOptions:
    """The options of `chat`; a `prompt` of None is read from stdin or begins a conversation."""

    prompt: str | None
    images: tuple[str, ...]
    videos: tuple[str, ...]
    frames: VideoOptions
    model: str | None
    system: str | None
    sampling: Sampling
    detail: Detail
    bits: int | None
    adapter: Path | None
    cache: CacheOptions
    memory_limit: int | None
    on_full: Literal["error", "drop-oldest"]
    offline: bool
    json: bool
    stats: bool
    plain: bool
    pictures: bool

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise typer.BadParameter("it is empty", param_hint="PROMPT")
        sources = (*self.images, *self.videos)
        if "-" in sources and self.prompt is None:
            raise typer.BadParameter(
                "it is needed with '-', since stdin is the picture or video", param_hint="PROMPT"
            )
        check_sources(sources, self.offline)
        if self.prompt is not None and not self.videos:
            for field in fields(self.frames):
                if getattr(self.frames, field.name) != field.default:
                    option = name_video_option(field.name)
                    raise typer.BadParameter("it needs a video (-v)", param_hint=option)
        if self.frames.chunk_s is not None and self.prompt is None and sys.stdin.isatty():
            raise typer.BadParameter(
                "it needs a question: a conversation is not held part by part",
                param_hint="--chunk",
            )
        if self.frames.chunk_s is not None and (len(self.videos) != 1 or self.images):
            raise typer.BadParameter("it needs one video (-v), alone", param_hint="--chunk")


class ModelOptions(Protocol):
    """The options that say which model to load, and how."""

    @property
    def model(self) -> str | None: ...
    @property
    def bits(self) -> int | None: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def cache(self) -> CacheOptions: ...
    @property
    def memory_limit(self) -> int | None: ...
    @property
    def offline(self) -> bool: ...


def check_sources(sources: Sequence[str], offline: bool) -> None:
    """Refuse pictures and videos that cannot be opened together, or not offline.

    Raises:
        typer.BadParameter: The message names the option.
    """
    if sources.count("-") > 1:
        raise typer.BadParameter(
            "stdin holds one picture or video; '-' came twice", param_hint="-i, -v"
        )
    if offline and (url := next(filter(is_url, sources), None)):
        raise typer.BadParameter(f"{redact_url(url)} needs the network", param_hint="--offline")


def decode_text(name: str, value: str) -> str:
    """Return the argument `name` as text; in a locale without UTF-8, read its bytes as UTF-8.

    Raises:
        typer.BadParameter: It is not valid UTF-8.
    """
    try:
        value.encode()
        return value
    except UnicodeEncodeError:  # Python keeps bytes that the locale cannot decode as surrogates
        pass
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        raise typer.BadParameter("it is not valid UTF-8 text", param_hint=name) from None


def decode_optional_text(name: str, value: str | None) -> str | None:
    """Return `decode_text(name, value)`, or None if the option was not given."""
    return None if value is None else decode_text(name, value)


def parse_detail(text: str) -> Detail:
    """Parse a level of detail: high, auto, low, or a number of tiles.

    Raises:
        typer.BadParameter: `text` is none of them.
    """
    levels: tuple[Detail, ...] = ("high", "auto", "low")
    for level in levels:
        if text == level:
            return level
    from mlx_smolvlm.media.tiles import MAX_TILES_PER_SIDE

    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_TILES_PER_SIDE:
        return int(text)
    raise typer.BadParameter(
        f"{text!r} is none of high, auto, low, or a number of tiles from 1 to {MAX_TILES_PER_SIDE}",
        param_hint="--detail",
    )


def parse_size(name: str, text: str) -> int:
    """Parse a size such as 150MB, the value of the option `name`, and return bytes.

    Raises:
        typer.BadParameter: `text` is not a size, or not below `LARGEST_SIZE`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write 150MB or 1.2GB", param_hint=name)
    size = float(match[1]) * UNITS[match[2].upper()]  # infinite for hundreds of digits
    if size >= LARGEST_SIZE:
        raise typer.BadParameter(
            f"it must be below {LARGEST_SIZE // UNITS['GB']} GB", param_hint=name
        )
    return round(size)


def check_output(option: str, path: Path | None) -> None:
    """Check that a file can be written to `path`, the value of `option`, before long work.

    Raises:
        typer.BadParameter: `path` is a folder, or its folder does not exist.
    """
    if path is None:
        return
    try:
        path = expand_path(path)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give a file", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)


def parse_memory_limit(text: str | None) -> int | None:
    """Parse the value of `--memory-limit`, and return bytes; None without one.

    Raises:
        typer.BadParameter: `text` is not a size above 0, or too large.
    """
    if text is None:
        return None
    size = parse_size("--memory-limit", text)
    if size == 0:
        raise typer.BadParameter("it must be above 0", param_hint="--memory-limit")
    return size


def read_schema(value: str | None) -> str | None:
    """Return a JSON Schema as text; a value that does not begin with { is the name of its file.

    Raises:
        typer.BadParameter: The file cannot be read as text.
    """
    if value is None or value.lstrip().startswith("{"):
        return decode_optional_text("--schema", value)
    try:
        return expand_path(value).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:  # the file is not text, or its name is not valid
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
    draft: str,
) -> Sampling:
    """Return the sampling options; `Sampling` checks their ranges.

    Raises:
        typer.BadParameter: A value is out of range; the message names the option.
    """
    from mlx_smolvlm import Sampling

    stop = tuple(decode_text("--stop", text) for text in stop)
    try:
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
            schema=schema,
            regex=regex,
            draft=read_draft(draft),
        )
    except ValueError as error:
        name = str(error).split(maxsplit=1)[0]
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None


def read_draft(text: str) -> int | Literal["auto", "off"]:
    """Return how many tokens are guessed ahead: auto, off, or a number.

    Raises:
        typer.BadParameter: `text` is none of them.
    """
    words: tuple[Literal["auto", "off"], ...] = ("auto", "off")
    for word in words:
        if text == word:
            return word
    if text.isascii() and text.isdigit() and len(text) == 1:
        return int(text)
    raise typer.BadParameter(
        f"{text!r} is none of auto, off, or a number of tokens from 1 to 7", param_hint="--draft"
    )


def make_cache_options(
    *, folder: Path | None, kv_bits: int | None, max_kv_tokens: int | None
) -> CacheOptions:
    """Return the options of the key-value cache; `CacheOptions` checks their ranges.

    Raises:
        typer.BadParameter: A value is out of range; the message names the option.
    """
    from mlx_smolvlm import CacheOptions

    try:
        return CacheOptions(folder=folder, kv_bits=kv_bits, max_kv_tokens=max_kv_tokens)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        option = "cache-dir" if name == "folder" else name.replace("_", "-")
        rest = rest.replace("kv_bits", "--kv-bits").replace("max_kv_tokens", "--max-kv-tokens")
        raise typer.BadParameter(rest, param_hint=f"--{option}") from None
