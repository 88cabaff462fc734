"""Options of `convert` beyond rounding: recipes, mixed precision, GPTQ, trained scales."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.args import parse_size
from mlx_smolvlm.cli.output import ProgressBar, say

if TYPE_CHECKING:
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.quant.improve import BetterOptions
    from mlx_smolvlm.convert.source import Source


@dataclass(frozen=True)
class PrecisionOptions:
    """How precisions are chosen and rounding errors reduced.

    Attributes:
        recipe: The name of a recipe or its file.
        target_size: The size of the result, such as 150MB.
        target_bits: Mean bits of a weight, including its share of the scales.
        gptq: Whether to compensate rounding errors by GPTQ.
        dwq_steps: Steps that scales and biases are trained; None does not train them.
        calibration: Files to measure and train on.
    """

    recipe: str | None = None
    target_size: str | None = None
    target_bits: float | None = None
    gptq: bool = False
    dwq_steps: int | None = None
    calibration: tuple[Path, ...] = ()

    @property
    def only_rounds(self) -> bool:
        """Whether weights are only rounded, without calibration."""
        return not (self.has_target or self.gptq or self.dwq_steps is not None)

    @property
    def has_target(self) -> bool:
        """Whether precisions are mixed to reach a size."""
        return self.target_size is not None or self.target_bits is not None

    @property
    def suffix(self) -> str | None:
        """The suffix of the default destination; None if the bits are to name it."""
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

    def apply_recipe(self, given: ConvertOptions) -> ConvertOptions:
        """Return `given`, or the options of the recipe with the dtype of `given`.

        Raises:
            typer.BadParameter: Options exclude each other, or the size cannot be parsed.
            CheckpointError: The recipe cannot be read.
        """
        from mlx_smolvlm.convert.options import ConvertOptions, read_recipe

        self._check()
        if self.recipe is None and not self.has_target:
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
        """Refuse options that exclude each other, or a size that cannot be parsed."""
        ways = [self.recipe, self.target_size, self.target_bits]
        if sum(way is not None for way in ways) > 1:
            raise typer.BadParameter("give one of --recipe, --target-size and --target-bits")
        if self.target_size is not None:
            parse_size("--target-size", self.target_size)
        if self.calibration and self.only_rounds:
            raise typer.BadParameter(
                "--calibration is for --target-size, --target-bits, --gptq and --dwq; give one of "
                "them"
            )

    def make_options(self, force: bool) -> BetterOptions:
        """Return the library's options; they check the range of the target.

        Raises:
            typer.BadParameter: The target is out of range.
        """
        from mlx_smolvlm.convert.quant.dwq import LearnOptions
        from mlx_smolvlm.convert.quant.gptq import GptqOptions
        from mlx_smolvlm.convert.quant.improve import BetterOptions

        try:
            return BetterOptions(
                target_bytes=None
                if self.target_size is None
                else parse_size("--target-size", self.target_size),
                target_bits=self.target_bits,
                gptq=GptqOptions() if self.gptq else None,
                learn=None if self.dwq_steps is None else LearnOptions(steps=self.dwq_steps),
                calibration=self.calibration,
                force=force,
            )
        except ValueError as error:
            hint = "--target-size" if self.target_bits is None else "--target-bits"
            raise typer.BadParameter(str(error), param_hint=hint) from None


def write_better(
    source: Source, dest: Path, options: ConvertOptions, better: BetterOptions
) -> None:
    """Convert `source` to the folder `dest`, and report the measured errors."""
    from mlx_smolvlm.convert.quant.improve import convert_better

    bar = ProgressBar()
    with contextlib.closing(bar):
        report = convert_better(source, dest, options, better, bar.draw)
    for line in report.format_lines():
        say(line)
