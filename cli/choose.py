"""`mlx-smolvlm choose`: how likely each of some answers is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.chat import load_model
from mlx_smolvlm.cli.media import describe_image, open_footage, open_picture, sampled
from mlx_smolvlm.cli.options import (
    Detail,
    VideoOptions,
    as_text,
    check_bits,
    check_sources,
)
from mlx_smolvlm.cli.render import table, write, write_json

if TYPE_CHECKING:
    from mlx_smolvlm import CacheOptions
    from mlx_smolvlm.choose import Normalize


@dataclass(frozen=True)
class ChooseOptions:
    """What `choose` was asked for."""

    question: str
    choices: tuple[str, ...]
    images: tuple[str, ...]
    videos: tuple[str, ...]
    model: str
    system: str | None
    detail: Detail
    normalize: str
    bits: int | None
    adapter: Path | None
    cache: CacheOptions
    offline: bool
    json: bool

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise typer.BadParameter("it is empty", param_hint="QUESTION")
        check_bits(self.bits)
        check_sources((*self.images, *self.videos), self.offline)

    def checked(self) -> tuple[tuple[str, ...], Normalize]:
        """Choices and normalisation, as the library wants them.

        Raises:
            typer.BadParameter: It names the option and what is wrong.
        """
        from mlx_smolvlm.choose import checked_choices

        texts = tuple(as_text("--choice", choice) for choice in self.choices)
        modes: dict[str, Normalize] = {"none": "none", "tokens": "tokens"}
        if self.normalize not in modes:
            raise typer.BadParameter(
                f"{self.normalize!r} is neither none nor tokens", param_hint="--normalize"
            )
        try:
            return checked_choices(texts, self.normalize), modes[self.normalize]
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--choice") from None


def choose(options: ChooseOptions) -> None:
    """Put the choices and their probabilities on stdout, the likeliest first.

    What is cheap to check comes first: choices, pictures and videos, then the model.
    """
    choices, normalize = options.checked()
    images = [open_picture(source) for source in options.images]
    videos = [open_footage(source, VideoOptions()) for source in options.videos]
    vlm = load_model(options)
    for image in images:
        describe_image(vlm, image, options.detail)
    choice = vlm.choose(
        options.question,
        choices,
        images=[one.image for one in images],
        videos=[sampled(vlm, one) for one in videos],
        system=options.system,
        detail=options.detail,
        normalize=normalize,
    )
    if options.json:
        write_json({**choice.to_dict(), "normalize": normalize})
        return
    ranked = sorted(zip(choice.probabilities, choices, strict=True), key=lambda one: -one[0])
    write(table([(f"{probability:.4f}", text) for probability, text in ranked]))
