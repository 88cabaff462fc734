"""The loop of a training: steps, rates, accumulated gradients, and a state on disk.

It knows neither what a batch is nor what is trained: it is given a module, a loss, an
optimizer, and a function from a number to a batch. What is random in a step follows from
the seed and the step's number, so a run that goes on from its state equals one that was
never stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_smolvlm.checkpoint.headers import load_tensors, read_metadata, save_tensors
from mlx_smolvlm.errors import CheckpointError, TrainingError

ScheduleKind = Literal["cosine", "linear", "constant"]
# From the trainee and a batch to a sum of losses and what they count together: the loss of a
# step is the one by the other, over all its batches.
LossFunction = Callable[[Any, Any], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Schedule:
    """Learning rates: up to `rate` in `warmup` steps, then down to `floor` of it at the end.

    Attributes:
        rate: The highest.
        steps: Of the whole training.
        warmup: Steps in which the rate grows in a straight line.
        kind: How it falls: along a cosine, in a straight line, or not at all.
        floor: Share of `rate` that is left at the end.
    """

    rate: float
    steps: int
    warmup: int = 0
    kind: ScheduleKind = "cosine"
    floor: float = 0.0

    def get_rate(self, step: int) -> float:
        """The rate of `step`, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.rate
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 1 - share if self.kind == "linear" else 0.5 + 0.5 * math.cos(math.pi * share)
        return self.rate * (self.floor + (1 - self.floor) * left)


@dataclass(frozen=True)
class LoopOptions:
    """How steps are made.

    Attributes:
        schedule: Rates, and how many steps.
        accumulate: Batches of a step.
        clip: The longest gradient, by its norm; None for any.
        seed: What everything random follows from.
    """

    schedule: Schedule
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """A step that was made: its number from 1, and the loss before it.

    `weight` is what its losses counted together; `norm` is of the gradient, before it was
    clipped; `seconds` is how long it took.
    """

    step: int
    loss: float
    weight: float
    rate: float
    norm: float
    seconds: float


class Loop:
    """A training under way; `step` steps are made."""

    def __init__(
        self,
        trainee: nn.Module,
        loss: LossFunction,
        optimizer: optim.Optimizer,
        batch: Callable[[int], Any],
        options: LoopOptions,
    ) -> None:
        """A loop before its first step.

        Args:
            trainee: What is trained: its parameters that are not frozen.
            loss: See `LossFunction`.
            optimizer: Its rate is set before every step.
            batch: The batch of a number; step s takes numbers s * accumulate and on.
            options: How steps are made.
        """
        self.trainee, self.optimizer, self.options = trainee, optimizer, options
        self._batch, self._value_and_grad = batch, nn.value_and_grad(trainee, loss)
        self.step = 0
        optimizer.init(trainee.trainable_parameters())

    @property
    def is_done(self) -> bool:
        """Whether every step is made."""
        return self.step >= self.options.schedule.steps

    def run(self) -> Iterator[StepReport]:
        """Makes the steps that are left, and reports each.

        Raises:
            TrainingError: The loss is no number any more.
        """
        while not self.is_done:
            yield self.advance()

    def advance(self) -> StepReport:
        """Makes one step; errors as `run`."""
        began, rate = time.perf_counter(), self.options.schedule.get_rate(self.step)
        loss, weight, gradient = self.compute_gradient()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step + 1} is {loss}; lower the learning rate, or clip "
                "the gradient"
            )
        limit = math.inf if self.options.clip is None else self.options.clip
        gradient, norm = optim.clip_grad_norm(gradient, limit)
        self.optimizer.learning_rate = rate  # type: ignore[assignment]
        self.optimizer.update(self.trainee, gradient)
        mx.eval(self.trainee.parameters(), self.optimizer.state, norm)
        self.step += 1
        seconds = time.perf_counter() - began
        return StepReport(self.step, loss, weight, rate, float(norm.item()), seconds)

    def compute_gradient(self) -> tuple[float, float, Any]:
        """Loss of the present step, what its batches count together, and the gradient."""
        options = self.options
        mx.random.seed(options.seed * 1_000_003 + self.step)
        total = weight = 0.0
        gradient: Any = None
        self.trainee.train()
        for part in range(options.accumulate):
            batch = self._batch(self.step * options.accumulate + part)
            (value, count), own = self._value_and_grad(self.trainee, batch)
            gradient = own if gradient is None else tree_map(mx.add, gradient, own)
            mx.eval(value, count, gradient)
            total, weight = total + float(value.item()), weight + float(count.item())
        return total / weight, weight, tree_map(lambda one: one / weight, gradient)

    def save(self, path: Path, notes: dict[str, str]) -> None:
        """Write step, trained parameters and the optimizer's state to `path`, at once.

        Args:
            path: Ends in .safetensors.
            notes: What `read_notes` is to give back.
        """
        parts = {"trainee": self.trainee.trainable_parameters(), "optimizer": self.optimizer.state}
        arrays = dict(tree_flatten(parts))
        save_tensors(path, arrays, {**notes, "step": str(self.step)})

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote to `path`.

        Raises:
            TrainingError: It is no state of this training.
        """
        with _state_errors():
            arrays, step = load_tensors(path), read_metadata(path).get("step", "")
        if not (step.isascii() and step.isdigit()) or len(step) > 9:
            raise TrainingError(f"{path} states the step {step!r:.40}; remove it to begin anew")
        if int(step) > self.options.schedule.steps:
            raise TrainingError(
                f"{path} is of step {step}, and there are {self.options.schedule.steps}; remove it "
                "to begin anew"
            )

        def stored(name: str, old: mx.array) -> mx.array:
            array = arrays.get(name)
            if array is None or (array.shape, array.dtype) != (old.shape, old.dtype):
                raise TrainingError(f"{path} has no '{name}' of this training; remove it")
            return array

        own = {"trainee": self.trainee.trainable_parameters(), "optimizer": self.optimizer.state}
        state: Any = tree_map_with_path(stored, own)
        self.trainee.update(state["trainee"])
        self.optimizer.state = state["optimizer"]
        self.step = int(step)
        mx.eval(self.trainee.parameters(), self.optimizer.state)


def read_notes(path: Path) -> dict[str, str]:
    """The notes that `Loop.save` wrote to `path`, and "step".

    Raises:
        TrainingError: The file is damaged.
    """
    with _state_errors():
        return read_metadata(path)


@contextlib.contextmanager
def _state_errors() -> Iterator[None]:
    """Turns errors of reading a checkpoint's file into those of a training's state."""
    try:
        yield
    except CheckpointError as error:
        reason = str(error).removesuffix("; fetch it again")
        raise TrainingError(
            f"the state of the training cannot be read: {reason}; remove it to begin anew"
        ) from None
