"""Options of `convert` for more than rounding: recipes, mixed precision, GPTQ, tuned scales."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.render import Bar, say
from mlx_smolvlm.errors import CheckpointError

if TYPE_CHECKING:
    from mlx_smolvlm.cli.convert import ConvertRequest
    from mlx_smolvlm.convert.quantize import ConvertOptions
    from mlx_smolvlm.convert.source import Source

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Better:
    """What was asked for beyond bits.

    Attributes:
        recipe: A name or a file.
        target_size: Such as 150MB.
        target_bits: Of a weight, its share of scales counted.
        gptq: Whether errors of rounding are made up for.
        dwq_steps: Of tuning; None does not tune.
        calibration: Files to do all that on.
    """

    recipe: str | None = None
    target_size: str | None = None
    target_bits: float | None = None
    gptq: bool = False
    dwq_steps: int | None = None
    calibration: tuple[Path, ...] = ()

    @property
    def rounds(self) -> bool:
        """Whether rounding is all there is to do, with nothing measured."""
        return not (self.measured or self.gptq or self.dwq_steps is not None)

    @property
    def measured(self) -> bool:
        """Whether precisions are mixed by what is measured."""
        return self.target_size is not None or self.target_bits is not None

    @property
    def suffix(self) -> str | None:
        """What the default destination is called after; None for the bits."""
        if self.recipe is not None:
            name = Path(self.recipe).stem
        elif self.target_size is not None:
            name = self.target_size.lower().replace(" ", "")
        elif self.target_bits is not None:
            name = f"{self.target_bits:g}bits"
        else:
            return None
        name = f"{name}-gptq" if self.gptq else name
        return name if self.dwq_steps is None else f"{name}-dwq"

    def options(self, given: ConvertOptions) -> ConvertOptions:
        """`given`, or what the recipe says with its dtype.

        Raises:
            typer.BadParameter: Options that exclude each other, or a size that is none.
            CheckpointError: The recipe cannot be read.
        """
        from mlx_smolvlm.convert.quantize import ConvertOptions
        from mlx_smolvlm.convert.recipes import read_recipe

        self._check()
        if self.recipe is None and not self.measured:
            return given
        if replace(given, dtype=None) != ConvertOptions():
            way = "--recipe" if self.recipe is not None else "a target"
            raise typer.BadParameter(
                f"{way} decides on precision; leave out --bits, --group-size, --mode and the like"
            )
        if self.recipe is None:
            return given
        options = read_recipe(self.recipe)
        return options if given.dtype is None else replace(options, dtype=given.dtype)

    def _check(self) -> None:
        """Refuse options that exclude each other, or a size that is none."""
        ways = [self.recipe, self.target_size, self.target_bits]
        if sum(way is not None for way in ways) > 1:
            raise typer.BadParameter("give one of --recipe, --target-size and --target-bits")
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.calibration and self.rounds:
            raise typer.BadParameter(
                "--calibration is for --target-size, --target-bits, --gptq and --dwq; give one of "
                "them"
            )

    def write(self, source: Source, dest: Path, request: ConvertRequest) -> None:
        """Write the checkpoint, with what was asked for."""
        from mlx_smolvlm.convert.better import BetterOptions, convert_better
        from mlx_smolvlm.convert.compensate import GptqOptions
        from mlx_smolvlm.convert.learn import LearnOptions

        options = BetterOptions(
            target_bytes=None if self.target_size is None else parse_size(self.target_size),
            target_bits=self.target_bits,
            gptq=GptqOptions() if self.gptq else None,
            learn=None if self.dwq_steps is None else LearnOptions(steps=self.dwq_steps),
            calibration=self.calibration,
            force=request.force,
        )
        bar = Bar()
        with contextlib.closing(bar):
            found = convert_better(source, dest, request.options, options, bar.draw)
        for line in found.lines():
            say(line)


def parse_size(text: str) -> int:
    """Bytes that `text`, such as 150MB, stands for.

    Raises:
        typer.BadParameter: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no size; write such as 150MB or 1.2GB", param_hint="--target-size"
        )
    return round(float(match[1]) * UNITS[match[2].upper()])


__all__ = ["Better", "CheckpointError", "parse_size"]
