"""Reads the TOML file that configures a fine-tuning.

docs/fine-tuning.md describes every key. An unknown key, or a value of another type or out of
range, is refused by name before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint.lora import LARGEST_RANK, LARGEST_SCALE
from mlx_smolvlm.config import DTYPES, PARTS
from mlx_smolvlm.errors import TrainingError, shorten
from mlx_smolvlm.files import expand_path, read_toml
from mlx_smolvlm.records import read_record

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant")
DETAILS = ("high", "auto", "low")
# Keys that have no influence on the trained weights.
NOT_DECISIVE = ("out", "evaluate_every", "save_every", "log_every", "fuse", "valid", "folder")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: the rank of the matrices, the factor of their product, and the dropout before them."""

    rank: int = 8
    scale: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_range("lora.rank", self.rank, 1, LARGEST_RANK)
        _check_range("lora.scale", self.scale, 1e-6, LARGEST_SCALE)
        _check_range("lora.dropout", self.dropout, 0, 0.99)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with the learning rates of a `loop.Schedule`; `clip` 0 does not clip the gradient."""

    rate: float = 2e-4
    schedule: str = "cosine"
    warmup: int = 0
    floor: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_range("optimizer.rate", self.rate, 1e-12, 10)
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _check_range("optimizer.warmup", self.warmup, 0, 10**9)
        _check_range("optimizer.floor", self.floor, 0, 1)
        _check_range("optimizer.weight_decay", self.weight_decay, 0, 10)
        _check_range("optimizer.clip", self.clip, 0, math.inf)


@dataclass(frozen=True)
class DataSettings:
    """A dataset, and its weight in the mixture; None draws all examples equally often."""

    path: str
    weight: float | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.weight is not None:
            _check_range("data.weight", self.weight, 1e-9, 1e9)


@dataclass(frozen=True)
class Settings:
    """The configuration of a fine-tuning; relative paths are resolved in `folder`."""

    model: str
    data: tuple[DataSettings, ...]
    folder: Path = Path()
    out: str | None = None
    method: str = "lora"
    parts: tuple[str, ...] | None = None
    valid: str | None = None
    detail: str | int = "high"
    fps: float | None = None
    max_frames: int | None = None
    max_tokens: int | None = None
    too_long: str = "error"
    batch_size: int = 4
    accumulate: int = 1
    steps: int | None = None
    epochs: float | None = None
    checkpoint_gradients: bool = False
    dtype: str | None = None
    evaluate_every: int = 100
    save_every: int = 100
    log_every: int = 10
    fuse: bool = False
    seed: int = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts to train: by default all if in full, the decoder and connector if by LoRA."""
        if self.parts is not None:
            return self.parts
        return PARTS if self.method == "full" else ("text", "connector")

    def resolve_path(self, name: str) -> Path:
        """Return the path `name`, which may be relative to the file's folder."""
        return self.folder / expand_path(name, TrainingError)

    def __post_init__(self) -> None:
        """Refuse values that are out of range or contradict each other.

        Raises:
            TrainingError: Names the key, the value and the allowed values.
        """
        _check_choice("method", self.method, METHODS)
        _check_choice("too_long", self.too_long, ("error", "skip"))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, DTYPES)
        for name in self.trained_parts:
            _check_choice("parts", name, PARTS)
        if not self.trained_parts:
            raise TrainingError(f"parts is empty; give one or more of {', '.join(PARTS)}")
        if isinstance(self.detail, int):
            _check_range("detail", self.detail, 1, 6)
        else:
            _check_choice("detail", self.detail, DETAILS)
        counts = ("batch_size", "accumulate", "evaluate_every", "save_every", "log_every", "steps")
        for name in (*counts, "max_tokens", "max_frames"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 1, 10**9)
        _check_range("seed", self.seed, 0, 2**31)
        for name in ("epochs", "fps"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 1e-6, 1e6)
        if self.fuse and self.method != "lora":
            raise TrainingError("fuse needs method lora: method full writes a whole model already")
        if (self.steps is None) == (self.epochs is None):
            raise TrainingError("give either steps or epochs")
        if not self.data:
            raise TrainingError("[[data]] is missing; add at least one with a path")
        weights = [one.weight is None for one in self.data]
        if any(weights) and not all(weights):
            raise TrainingError(
                "some [[data]] have a weight and some have none; give all of them one"
            )

    def dump_decisive(self) -> dict[str, Any]:
        """Return the settings that influence the trained weights, as plain values."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in NOT_DECISIVE}


def read_settings(path: str | Path) -> Settings:
    """Read the settings in the TOML file at `path`.

    Raises:
        TrainingError: The file cannot be read, or a key or value is invalid.
    """
    file = expand_path(path, TrainingError)
    try:
        values = read_toml(file)
    except OSError as error:
        raise TrainingError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TrainingError(f"{file} is {error}") from None
    try:
        if isinstance(values.get("data"), dict):
            raise TrainingError("write [[data]], not [data]: data is a list of tables")
        settings = read_record(Settings, values, skip=("folder",))
        settings = dataclasses.replace(settings, folder=file.parent)
    except (TrainingError, ValueError) as error:
        raise TrainingError(f"{file}: {error}") from None
    return settings


def _check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a `value` below `low` or above `high`."""
    if not low <= value <= high:
        bound = f"{low:g} or more" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise TrainingError(f"{name} is {shorten(value)}; it must be {bound}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a `value` that is not one of `choices`."""
    if value not in choices:
        raise TrainingError(f"{name} is {shorten(value)}; it must be one of {', '.join(choices)}")
