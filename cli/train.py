"""`mlx-smolvlm train`: train a checkpoint further, as a TOML file describes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_smolvlm.cli.args import OfflineOption
from mlx_smolvlm.cli.output import ProgressBar, say, write
from mlx_smolvlm.cli.printer import INTERRUPTED
from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm.train.finetune import Tuning, TuningEvent
    from mlx_smolvlm.train.settings import Settings

TRAIN_EPILOG = """\
\b
Examples:
  mlx-smolvlm train receipts.toml
  mlx-smolvlm train receipts.toml --out receipts-2 --fuse
  mlx-smolvlm chat "Read it." -i receipt.jpg -m smolvlm2-256m --adapter receipts-trained/adapter"""


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml", help="Settings of the training: model, data and options."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder to write to, or of a run to continue; default: as the file says, "
            "or its name with -trained.",
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Also write a checkpoint with the adapter merged in.")
    ] = False,
    offline: OfflineOption = False,
) -> None:
    """Train a model further on your own pictures, videos and answers."""
    from mlx_smolvlm.train.finetune import Tuning
    from mlx_smolvlm.train.settings import read_settings

    settings = read_settings(config)
    if fuse and settings.method != "lora":
        raise TrainingError("--fuse needs method lora: a full training makes a whole model")
    out = out or settings.resolve_path(settings.out or f"{config.stem}-trained")
    with catch_interruption() as interruptions:
        tuning = Tuning(settings, expand_path(out, TrainingError), offline)
        with contextlib.closing(tuning):
            print_settings(tuning)
            if not run_steps(tuning, interruptions):
                raise typer.Exit(INTERRUPTED)
            result = tuning.result
            if fuse or settings.fuse:
                result = tuning.fuse()
    write(f"{result}\n")


@contextlib.contextmanager
def catch_interruption() -> Iterator[list[int]]:
    """Let Ctrl-C add to the list that is yielded; a second one raises KeyboardInterrupt."""
    interruptions: list[int] = []

    def receive(number: int, frame: object) -> None:
        if interruptions:
            raise KeyboardInterrupt
        interruptions.append(number)
        say("stopping after this step; Ctrl-C again stops now and loses what is not saved")

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield interruptions
    finally:
        signal.signal(signal.SIGINT, before)


def print_settings(tuning: Tuning) -> None:
    """Print what is trained, on how many examples, and after which step it continues."""
    settings, loop = tuning.settings, tuning.loop
    parts = ", ".join(settings.trained_parts)
    say(
        f"training {parts} of {tuning.vlm.config.name} ({settings.method}, "
        f"{tuning.parameter_count / 1e6:.2f} million parameters) on {tuning.example_count} "
        f"examples, {tuning.total_steps} steps, into {tuning.out}"
    )
    if tuning.skipped_count:
        say(f"{tuning.skipped_count} examples are too long and left out")
    if loop.is_done:
        say(
            f"this training has finished, with step {loop.step}; to train again, choose another "
            "folder with --out"
        )
    elif loop.step:
        say(f"going on after step {loop.step}")


def run_steps(tuning: Tuning, interruptions: list[int]) -> bool:
    """Run the remaining steps; after Ctrl-C, save the state and return False."""
    pace = Pace(tuning.loop.step)
    with contextlib.closing(ProgressBar()) as bar:
        for event in tuning.run():
            if event.report is not None:
                pace.add(event)
                bar.draw(event.report.step, tuning.total_steps, pace.format(tuning.total_steps))
            print_losses(event, tuning.settings, tuning.total_steps, bar)
            if interruptions and not tuning.loop.is_done:
                tuning.save()
                bar.close()
                say(f"stopped after step {tuning.loop.step}; the same command goes on from there")
                return False
    return True


def print_losses(event: TuningEvent, settings: Settings, total: int, bar: ProgressBar) -> None:
    """Print the loss of held-out examples and, where no bar is shown, that of some steps."""
    step = event.report.step if event.report is not None else 0
    if event.valid_loss is not None:
        bar.close()
        say(f"step {step} of {total}: loss {event.valid_loss:.4f} on held-out examples")
    if event.report is not None and not bar.is_shown and step % settings.log_every == 0:
        say(f"step {step} of {total}: loss {event.report.loss:.4f}")


class Pace:
    """Running means of the speed and the loss; the slow first steps soon stop counting."""

    def __init__(self, step: int) -> None:
        self._step, self._at = step, time.monotonic()
        self._seconds = self._tokens = self._loss = 0.0

    def add(self, event: TuningEvent) -> None:
        """Add a step to the means."""
        assert event.report is not None
        now = time.monotonic()
        share = 0.1 if self._seconds else 1.0
        self._seconds += share * (now - self._at - self._seconds)
        self._tokens += share * (event.tokens - self._tokens)
        self._loss += share * (event.report.loss - self._loss)
        self._step, self._at = event.report.step, now

    def format(self, total: int) -> str:
        """Return step, loss, speed and remaining time in one line."""
        left = int(self._seconds * (total - self._step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        speed = self._tokens / max(self._seconds, 1e-9)
        return (
            f"step {self._step} of {total}, loss {self._loss:.4f}, {speed:,.0f} tokens/s, "
            f"{clock} left"
        )
