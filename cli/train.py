"""`mlx-smolvlm train`: a checkpoint trained further, as a file describes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.render import Bar, say, write
from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm.train.settings import Settings
    from mlx_smolvlm.train.tuning import Event, Tuning

INTERRUPTED = 130


@dataclass(frozen=True)
class TrainOptions:
    """What `train` was asked for."""

    config: Path
    out: Path | None
    fuse: bool
    offline: bool


def train(options: TrainOptions) -> int:
    """The exit status; the folder of what was made is put on stdout.

    Raises:
        TrainingError: The file, or the folder to write to, is not usable.
        DatasetError: An example is not usable.
        CheckpointError: The model is not.
    """
    from mlx_smolvlm.train.settings import read_settings
    from mlx_smolvlm.train.tuning import Tuning

    settings = read_settings(options.config)
    if options.fuse and settings.method != "lora":
        raise TrainingError("--fuse needs method lora: a full training makes a whole model")
    out = options.out or settings.path(settings.out or f"{options.config.stem}-trained")
    with interruption() as interrupted:
        tuning = Tuning(settings, expand_path(out, TrainingError), options.offline)
        with contextlib.closing(tuning):
            describe(tuning)
            if not run(tuning, interrupted):
                return INTERRUPTED
            result = tuning.result
            if options.fuse or settings.fuse:
                result = tuning.fuse()
    write(f"{result}\n")
    return 0


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """A list that Ctrl-C fills: the step at hand is finished. A second one stops at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("stopping after this step; Ctrl-C again stops now and loses what is not saved")

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def describe(tuning: Tuning) -> None:
    """Say what is trained, on how much, and where it goes on."""
    settings, loop = tuning.settings, tuning.loop
    parts = ", ".join(settings.trained_parts)
    say(
        f"training {parts} of {tuning.vlm.config.source} ({settings.method}, "
        f"{tuning.parameters / 1e6:.2f} million parameters) on {tuning.examples} examples, "
        f"{tuning.total} steps, into {tuning.out}"
    )
    if tuning.skipped:
        say(f"{tuning.skipped} examples are too long and left out")
    if loop.step:
        say(f"going on after step {loop.step}")


def run(tuning: Tuning, interrupted: list[int]) -> bool:
    """Makes the steps that are left; False if Ctrl-C ended them, what is done then saved."""
    pace = Pace(tuning.loop.step)
    with contextlib.closing(Bar()) as bar:
        for event in tuning.run():
            if event.report is not None:
                pace.count(event)
                bar.draw(event.report.step, tuning.total, pace.line(tuning.total))
            tell(event, tuning.settings, tuning.total, bar)
            if interrupted and not tuning.loop.done:
                tuning.save()
                bar.close()
                say(f"stopped after step {tuning.loop.step}; the same command goes on from there")
                return False
    return True


def tell(event: Event, settings: Settings, total: int, bar: Bar) -> None:
    """Say the loss of held-out examples, and where there is no bar, that of some steps."""
    step = event.report.step if event.report is not None else 0
    if event.valid_loss is not None:
        bar.close()
        say(f"step {step} of {total}: loss {event.valid_loss:.4f} on held-out examples")
    if event.report is not None and not bar.is_shown and step % settings.log_every == 0:
        say(f"step {step} of {total}: loss {event.report.loss:.4f}")


class Pace:
    """How fast steps go: a running mean, so that the first slow ones are soon forgotten."""

    def __init__(self, step: int) -> None:
        self._step, self._at = step, time.monotonic()
        self._seconds = self._tokens = self._loss = 0.0

    def count(self, event: Event) -> None:
        """Take a step into account."""
        assert event.report is not None
        now = time.monotonic()
        share = 0.1 if self._seconds else 1.0
        self._seconds += share * (now - self._at - self._seconds)
        self._tokens += share * (event.tokens - self._tokens)
        self._loss += share * (event.report.loss - self._loss)
        self._step, self._at = event.report.step, now

    def line(self, total: int) -> str:
        """Step, loss, speed and time left."""
        left = int(self._seconds * (total - self._step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        speed = self._tokens / max(self._seconds, 1e-9)
        return (
            f"step {self._step} of {total}, loss {self._loss:.4f}, {speed:,.0f} tokens/s, "
            f"{clock} left"
        )
