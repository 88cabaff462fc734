"""The options of `bench` that say what to measure, and their checks: measuring takes minutes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.output import say

if TYPE_CHECKING:
    from mlx_smolvlm.bench.models import BenchModel, Progress
    from mlx_smolvlm.bench.programs import Launch

BITS = (4, 8, 16)


@dataclass(frozen=True)
class BenchRequest:
    """The options of `bench` that say what to measure."""

    model: str
    random: tuple[str, ...]
    bits: tuple[int, ...]
    against: tuple[str, ...]
    peer_python: str | None
    same_blas: bool
    memory_limit: int | None
    offline: bool

    def __post_init__(self) -> None:
        from mlx_smolvlm.bench.peer import PEERS
        from mlx_smolvlm.convert.catalog import SIZES

        for number in self.bits:
            if number not in BITS:
                raise typer.BadParameter(f"{number} is none of 4, 8 and 16", param_hint="--bits")
        for size in self.random:
            if size not in SIZES:
                message = f"'{size}' is none of {', '.join(SIZES)}"
                raise typer.BadParameter(message, param_hint="--random")
        if self.against and len(self.random) > 1:
            message = "other programs are measured on one size at a time"
            raise typer.BadParameter(message, param_hint="--random")
        for name in self.against:
            if name not in PEERS:
                raise typer.BadParameter(
                    f"'{name}' is none of {', '.join(PEERS)}", param_hint="--against"
                )

    def check_tuning(self, ignored: Mapping[str, bool], repeat: int) -> None:
        """Check, before a model is made, that `--tune` can do what was asked for.

        Args:
            ignored: Whether each option is given that has no effect with `--tune`.
            repeat: Repeats of each measurement.

        Raises:
            typer.BadParameter: An option would be ignored, or is out of range.
            SmolVLMError: One of the variables to tune is set.
        """
        from mlx_smolvlm.bench import tune

        given = {
            **ignored,
            "--against": bool(self.against),
            "--memory-limit": self.memory_limit is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise typer.BadParameter("it has no effect with --tune", param_hint=option)
        for option, values in (("--random", self.random), ("--bits", self.bits)):
            if len(values) > 1:
                raise typer.BadParameter("--tune measures one model; give one", param_hint=option)
        try:
            tune.check_repeat(repeat)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--repeat") from None
        tune.check_variables(os.environ)

    def open_models(self, work: Path, progress: Progress) -> list[BenchModel]:
        """Make or open the models; conversions are written to `work`.

        Raises:
            CheckpointError: One cannot be found or converted.
        """
        from mlx_smolvlm.bench.models import make_random_model, open_model

        if not self.random:
            for_peers = bool(self.against)
            return [
                open_model(self.model, self.bits, work, self.offline, progress, for_peers=for_peers)
            ]
        say(f"making random weights of {', '.join(self.random)}", dim=True)
        return [make_random_model(size, self.bits, work, progress) for size in self.random]

    def list_launches(self, model: BenchModel, size: str = "") -> list[Launch]:
        """Return how to start each program, this package first; `size` is part of its name.

        Raises:
            CheckpointError: A peer is wanted, and there is nothing that it can read.
        """
        from mlx_smolvlm.bench.programs import OURS, launch_ours, launch_peer

        ours = [
            launch_ours(
                folder,
                name=" ".join(filter(None, (OURS, size, precision))),
                memory_limit=self.memory_limit,
            )
            for precision, folder in model.folders.items()
        ]
        peers = [
            launch_peer(name, model.get_source(), self.peer_python, self.same_blas)
            for name in self.against
        ]
        return [*ours, *peers]


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse numbers with commas between them; raises typer.BadParameter."""
    try:
        return tuple(dict.fromkeys(map(int, parse_list(option, text))))
    except ValueError:
        message = f"'{text}' is not numbers with commas between them"
        raise typer.BadParameter(message, param_hint=option) from None


def parse_list(option: str, text: str) -> tuple[str, ...]:
    """Return the values in `text`, with commas between them; raises typer.BadParameter."""
    values = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if text and not values:
        raise typer.BadParameter(f"'{text}' has no value", param_hint=option)
    return values
