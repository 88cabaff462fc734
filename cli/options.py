"""Command-line values, checked before any work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from mlx_smolvlm import Sampling

Detail = Literal["high", "auto", "low"] | int
CHAT_BITS = (4, 8, 16)


@dataclass(frozen=True)
class ChatOptions:
    """What `chat` was asked for; a `prompt` of None is to be read from stdin."""

    prompt: str | None
    images: tuple[str, ...]
    model: str
    system: str | None
    sampling: Sampling
    detail: Detail
    bits: int | None
    offline: bool
    json: bool
    stats: bool

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise typer.BadParameter("it is empty", param_hint="PROMPT")
        if self.bits is not None and self.bits not in CHAT_BITS:
            raise typer.BadParameter(f"{self.bits} is none of 4, 8, 16", param_hint="--bits")
        if self.images.count("-") > 1:
            raise typer.BadParameter("stdin holds one picture; '-' came twice", param_hint="-i")
        if "-" in self.images and self.prompt is None:
            raise typer.BadParameter(
                "it is needed with '-i -', since stdin is the picture", param_hint="PROMPT"
            )
        if self.offline and (url := next(filter(is_url, self.images), None)):
            raise typer.BadParameter(f"{url} needs the network", param_hint="--offline")


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


def make_sampling(
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int | None,
    stop: tuple[str, ...],
) -> Sampling:
    """The sampling that the options describe; `Sampling` itself owns the ranges.

    Raises:
        typer.BadParameter: It names the option and its range.
    """
    from mlx_smolvlm import Sampling

    stop = tuple(as_text("--stop", text) for text in stop)
    try:
        return Sampling(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, stop=stop
        )
    except ValueError as error:
        name = str(error).split(maxsplit=1)[0]
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None
