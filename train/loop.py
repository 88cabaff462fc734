"""The training loop: learning rates, steps with accumulated gradients, and a saved state.

The loop is given a module, a loss, an optimizer and a function that loads a batch by its number; it
knows nothing else about them. The random numbers of a step depend on the seed and the step's
number alone, so a run that is resumed from its state gives the same weights, bit for bit, as one
that was never stopped.
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
# From the trainee and a batch to a sum of losses and the sum of their weights. The loss of a step
# is the first divided by the second, each summed over the step's batches.
LossFunction = Callable[[Any, Any], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Schedule:
    """Learning rates: a linear warmup to `rate`, then a decay to `floor` times `rate`.

    Attributes:
        rate: The highest learning rate.
        steps: Steps of the whole training.
        warmup: Steps of the warmup.
        kind: The shape of the decay; "constant" has none.
        floor: The last rate as a fraction of `rate`.
    """

    rate: float
    steps: int
    warmup: int = 0
    kind: ScheduleKind = "cosine"
    floor: float = 0.0

    def get_rate(self, step: int) -> float:
        """Return the learning rate of step number `step`, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 1 - progress if self.kind == "linear" else 0.5 + 0.5 * math.cos(math.pi * progress)
        return self.rate * (self.floor + (1 - self.floor) * left)


@dataclass(frozen=True)
class LoopOptions:
    """Options of a `Loop`.

    Attributes:
        schedule: The learning rates and the number of steps.
        accumulate: Batches whose gradients are added up in a step.
        clip: The largest norm of the gradient; longer gradients are scaled down. None never does.
        seed: Seeds the random numbers of every step.
    """

    schedule: Schedule
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """The figures of one step.

    Attributes:
        step: Its number, from 1.
        loss: The mean loss of its batches, before the update.
        weight: The sum of the weights of its losses; with `answer_loss` the number of targets.
        rate: Its learning rate.
        norm: The norm of the gradient, before clipping.
        seconds: How long it took.
    """

    step: int
    loss: float
    weight: float
    rate: float
    norm: float
    seconds: float


class Loop:
    """Trains a module step by step; `step` is the number of steps taken."""

    def __init__(
        self,
        trainee: nn.Module,
        loss: LossFunction,
        optimizer: optim.Optimizer,
        load_batch: Callable[[int], Any],
        options: LoopOptions,
    ) -> None:
        """Set up the loop before its first step.

        Args:
            trainee: The module to train; frozen parameters stay as they are.
            loss: See `LossFunction`.
            optimizer: Its learning rate is set before every step.
            load_batch: Returns a batch by its number. Step s, from 0, takes the numbers
                s * accumulate to (s + 1) * accumulate - 1.
            options: The schedule, accumulation, clipping and the seed.
        """
        self.trainee, self.optimizer, self.options = trainee, optimizer, options
        self._load_batch, self._value_and_grad = load_batch, nn.value_and_grad(trainee, loss)
        self.step = 0
        optimizer.init(trainee.trainable_parameters())

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.options.schedule.steps

    def run(self) -> Iterator[StepReport]:
        """Take the remaining steps, and yield the figures of each.

        Raises:
            TrainingError: The loss is infinite or not a number.
        """
        while not self.is_done:
            yield self.advance()

    def advance(self) -> StepReport:
        """Take one step; raises as `run`."""
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
        """Return the loss of the next step, its weight (see `StepReport`) and the gradient."""
        options = self.options
        mx.random.seed(options.seed * 1_000_003 + self.step)
        total = weight = 0.0
        gradient: Any = None
        self.trainee.train()
        for part in range(options.accumulate):
            batch = self._load_batch(self.step * options.accumulate + part)
            (value, count), added = self._value_and_grad(self.trainee, batch)
            gradient = added if gradient is None else tree_map(mx.add, gradient, added)
            mx.eval(value, count, gradient)
            total, weight = total + float(value.item()), weight + float(count.item())
        return total / weight, weight, tree_map(lambda one: one / weight, gradient)

    def save(self, path: Path, notes: dict[str, str]) -> None:
        """Write the step, the trained parameters and the optimizer's state atomically.

        Args:
            path: A file name that ends in .safetensors.
            notes: Texts to store with the state; `read_notes` returns them.
        """
        parts = {"trainee": self.trainee.trainable_parameters(), "optimizer": self.optimizer.state}
        arrays = dict(tree_flatten(parts))
        save_tensors(path, arrays, {**notes, "step": str(self.step)})

    def restore(self, path: Path) -> None:
        """Continue from the state that `save` wrote to `path`.

        Raises:
            TrainingError: The file is damaged, or is the state of another training.
        """
        with _state_errors():
            arrays, step = load_tensors(path), read_metadata(path).get("step", "")
        if not (step.isascii() and step.isdigit()) or len(step) > 9:
            raise TrainingError(
                f"{path} has the step {step!r:.40}, not a number; remove it to start again"
            )
        if int(step) > self.options.schedule.steps:
            raise TrainingError(
                f"{path} is of step {step}, but the training has {self.options.schedule.steps} "
                "steps; remove it to start again"
            )

        def get_array(name: str, old: mx.array) -> mx.array:
            array = arrays.get(name)
            if array is None or (array.shape, array.dtype) != (old.shape, old.dtype):
                raise TrainingError(
                    f"{path} has no '{name}' of this training's shape and type; remove it to "
                    "start again"
                )
            return array

        parts = {"trainee": self.trainee.trainable_parameters(), "optimizer": self.optimizer.state}
        state: Any = tree_map_with_path(get_array, parts)
        self.trainee.update(state["trainee"])
        self.optimizer.state = state["optimizer"]
        self.step = int(step)
        mx.eval(self.trainee.parameters(), self.optimizer.state)


def read_notes(path: Path) -> dict[str, str]:
    """Return the notes that `Loop.save` wrote to `path`, and the step under "step".

    Raises:
        TrainingError: The file is damaged.
    """
    with _state_errors():
        return read_metadata(path)


@contextlib.contextmanager
def _state_errors() -> Iterator[None]:
    """Turn a `CheckpointError` into a `TrainingError` about the state."""
    try:
        yield
    except CheckpointError as error:
        reason = str(error).removesuffix("; fetch it again")
        raise TrainingError(
            f"the state of the training cannot be read: {reason}; remove it to start again"
        ) from None
