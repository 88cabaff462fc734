"""Conversions that lose less than rounding: mixed precisions, GPTQ and tuned scales.

Precisions are mixed by the damage of packing each matrix, which `sensitivity` estimates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_smolvlm.checkpoint.load import TOKENIZER_FILE
from mlx_smolvlm.checkpoint.writer import check_destination
from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.open_model import SourceReader
from mlx_smolvlm.convert.options import (
    AFFINE_BITS,
    FINE_BITS,
    ConvertOptions,
    check_width,
)
from mlx_smolvlm.convert.plan import Step
from mlx_smolvlm.convert.quant.calibration import Sample, may_have_pictures, read_samples
from mlx_smolvlm.convert.quant.dwq import PICTURE_PARTS, LearnOptions, Progress, learn, make_targets
from mlx_smolvlm.convert.quant.gptq import GptqOptions, compensate_model, is_compensated
from mlx_smolvlm.convert.quant.sensitivity import estimate_damage, estimate_importance
from mlx_smolvlm.convert.run import Plan, plan_checkpoint, write_checkpoint
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.model.model import Model

CANDIDATES = tuple(Quantization(n, g, "affine") for n in AFFINE_BITS for g in (32, 64))
MEASURED_SAMPLES = 32  # enough, because F is averaged over many weights
TENSOR_BYTES, MODULE_BYTES, FILE_BYTES = 160, 160, 8192  # bounds for headers and config.json
STEPS = 30000  # units of the knapsack between the smallest and the largest size


@dataclass(frozen=True)
class BetterOptions:
    """How a conversion chooses precisions and reduces rounding errors.

    Attributes:
        target_bytes: The size of the folder with all files, to which precisions are mixed. If it
            and `target_bits` are None, precisions are those of `ConvertOptions`.
        target_bits: Likewise, the mean bits of a weight, including its share of the scales.
        gptq: How GPTQ compensates rounding errors; None rounds each weight on its own.
        learn: How scales and biases are tuned; None does not tune them.
        calibration: Files to measure and tune on; empty takes the bundled ones.
        offline: Look up a hub id in the local cache only.
        force: Replace a checkpoint at the destination.

    Raises:
        ValueError: A target is not a finite number above 0, or both targets are given.
    """

    target_bytes: int | None = None
    target_bits: float | None = None
    gptq: GptqOptions | None = None
    learn: LearnOptions | None = None
    calibration: tuple[Path, ...] = ()
    offline: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("target_bytes", "target_bits"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be a number above 0")
        if self.target_bytes is not None and self.target_bits is not None:
            raise ValueError("target_bytes and target_bits exclude each other; give one of them")

    @property
    def has_target(self) -> bool:
        """Whether precisions are mixed to reach a size."""
        return self.target_bytes is not None or self.target_bits is not None


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision of a matrix, None for floats, with its bytes and its damage in nats a token."""

    quantization: Quantization | None
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Mixture:
    """The precision of each matrix by path, mean bits of a weight, and total damage in nats."""

    choices: dict[str, PrecisionChoice]
    bits_per_weight: float
    damage: float

    def format_lines(self) -> list[str]:
        """Return lines that report it to the user."""
        counts: dict[str, int] = {}
        for one in self.choices.values():
            q = one.quantization
            name = "float" if q is None else f"{q.bits} bits in groups of {q.group_size}"
            counts[name] = counts.get(name, 0) + 1
        mixed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        return [
            f"mixed {self.bits_per_weight:.2f} bits a weight in matrices, "
            f"estimated KL {self.damage:.3g} nats",
            f"matrices: {mixed}",
        ]


@dataclass(frozen=True)
class ConversionResult:
    """The folder that `convert_better` wrote; `mixture` is None without a target."""

    folder: Path
    mixture: Mixture | None

    def format_lines(self) -> list[str]:
        """Return lines that report it to the user."""
        return [] if self.mixture is None else self.mixture.format_lines()


def convert_better(
    source: str | Path | Source,
    dest: str | Path,
    options: ConvertOptions,
    better: BetterOptions,
    progress: Progress,
) -> ConversionResult:
    """Convert `source` into the folder `dest`.

    Args:
        source: A folder, a hub id, or an opened source.
        dest: The folder to write.
        options: The precision if `better` has no target, and the dtype.
        better: How precisions are chosen and rounding errors reduced.
        progress: Called with the steps done, the steps in all, and the name of the step.

    Raises:
        CheckpointError: The source is not usable, `dest` exists, the target is too small, or
            GPTQ has no matrix to work on.
    """
    dest = expand_path(dest, CheckpointError)
    check_destination(dest, better.force)
    opened = open_source(source, better.offline)
    plan = plan_checkpoint(opened, options)
    if (
        better.gptq is not None
        and not better.has_target
        and not any(is_compensated(step) for step in plan.steps)
    ):
        raise CheckpointError(
            "GPTQ has nothing to do: no matrix is to be rounded to fewer than 8 bits; ask for "
            "fewer, such as 4"
        )
    if better.has_target:
        find_budget(plan, better, may_have_pictures(better.calibration))  # before minutes of work
    vlm = SourceReader(opened).load()
    samples = read_samples(vlm, better.calibration)
    mixture = None
    if better.has_target:
        mixture = mix(plan, vlm.model, samples, better, progress)
        overrides = tuple((path, one.quantization) for path, one in mixture.choices.items())
        plan = plan_checkpoint(opened, dataclasses.replace(options, overrides=overrides))
    model = vlm.model
    del vlm
    targets = None if better.learn is None else make_targets(model, samples, progress)
    if better.gptq is not None:
        plan = plan.replace_arrays(compensate_model(plan, model, samples, better.gptq, progress))
    del model
    mx.clear_cache()
    if better.learn is not None:
        assert targets is not None
        packed = SourceReader(opened, plan).load().model
        plan = plan.replace_arrays(learn(packed, targets, samples, better.learn, progress))
    return ConversionResult(write_checkpoint(plan, dest, None, better.force), mixture)


def mix(
    plan: Plan, model: Model, samples: Sequence[Sample], better: BetterOptions, progress: Progress
) -> Mixture:
    """Choose `CANDIDATES` or float for each matrix of `plan` to fit the target of `better`.

    `model` is the source as floats; the damage is estimated on `samples`.

    Raises:
        CheckpointError: Even the smallest mixture is larger; the message states its size.
    """
    samples = _spread(samples)
    budget = find_budget(plan, better, _have_pictures(samples))
    choice = choose_precisions(measure_choices(plan, model, samples, progress), budget)
    weights = sum(_count_weights(step) for step in plan.steps if step.entry.quantizable)
    size = sum(one.nbytes for one in choice.values())
    return Mixture(choice, size * 8 / weights, sum(one.damage for one in choice.values()))


def find_budget(plan: Plan, better: BetterOptions, has_pictures: bool) -> int:
    """Return the bytes that the target of `better` leaves for the matrices of `plan`.

    Args:
        plan: The plan of the conversion.
        better: The target.
        has_pictures: Whether there are pictures to measure the encoder on.

    Raises:
        CheckpointError: Even the smallest mixture is larger; the message states its size.
    """
    steps = [step for step in plan.steps if step.entry.quantizable]
    least = sum(min(n for _, n in list_candidates(s, plan, has_pictures)) for s in steps)
    weights = sum(map(_count_weights, steps))
    if better.target_bits is not None:
        budget = int(better.target_bits * weights / 8)
        smallest = f"{math.ceil(least * 800 / weights) / 100:.2f} bits a weight"
        target = f"{better.target_bits:g} bits"
    else:
        assert better.target_bytes is not None
        fixed = _count_fixed_bytes(plan)
        budget = better.target_bytes - fixed
        smallest = f"{-(-(least + fixed) // 1000) / 1000:.3f} MB"
        target = f"{better.target_bytes / 1e6:g} MB"
    if budget < least:
        raise CheckpointError(f"this model does not fit {target}; the smallest is {smallest}")
    return budget


def list_candidates(
    step: Step, plan: Plan, has_pictures: bool
) -> list[tuple[Quantization | None, int]]:
    """Return the precisions that the matrix of `step` may get, None for floats, with their bytes.

    Without pictures, the encoder cannot be measured, and gets 8 bits.
    """
    dtype: mx.Dtype = getattr(mx, plan.config.dtype)
    is_measured = has_pictures or not step.entry.path.startswith(PICTURE_PARTS)
    all_kinds: list[Quantization | None] = [None] if is_measured else []
    all_kinds += [
        one
        for one in CANDIDATES
        if _can_quantize(step, one) and (is_measured or one.bits == FINE_BITS)
    ]
    return [(one, _count_nbytes(step, one, dtype)) for one in all_kinds]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Return at most `MEASURED_SAMPLES` of `samples`, evenly spread."""
    count = min(len(samples), MEASURED_SAMPLES)
    return [samples[number * len(samples) // count] for number in range(count)]


def _have_pictures(samples: Sequence[Sample]) -> bool:
    """Whether one of `samples` has a picture."""
    return any(sample.pixel_values is not None for sample in samples)


def measure_choices(
    plan: Plan, model: Model, samples: Sequence[Sample], progress: Progress
) -> dict[str, list[PrecisionChoice]]:
    """Return the possible precisions of each matrix of `plan`, with bytes and damage."""
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    information = estimate_importance(model, samples, list(steps), progress)
    has_pictures = _have_pictures(samples)
    dtype: mx.Dtype = getattr(mx, plan.config.dtype)
    modules = dict(model.named_modules())
    choices: dict[str, list[PrecisionChoice]] = {}
    for number, (path, step) in enumerate(steps.items()):
        progress(number, len(steps), path)
        weight, blocks = modules[path].weight, information[path]
        choices[path] = [
            PrecisionChoice(
                one,
                nbytes,
                0.0 if one is None else estimate_damage(weight, blocks, one, dtype),
            )
            for one, nbytes in list_candidates(step, plan, has_pictures)
        ]
        mx.clear_cache()
    return choices


def _can_quantize(step: Step, quantization: Quantization) -> bool:
    """Whether groups divide the width; the vision MLP is padded, so there they always do."""
    if step.entry.path.endswith(".mlp.fc2"):
        return True
    try:
        check_width(step.entry.path, step.entry.width, quantization)
    except CheckpointError:
        return False
    return True


def _count_nbytes(step: Step, quantization: Quantization | None, dtype: mx.Dtype) -> int:
    """Return an upper bound of the bytes, with the vision MLP padded for the largest groups."""
    extra = max(one.group_size for one in CANDIDATES)
    rows = columns = 0
    if step.entry.path.endswith(".mlp.fc1"):
        rows = -step.entry.shapes[0][0] % extra
    elif step.entry.path.endswith(".mlp.fc2"):
        columns = -step.entry.width % extra
    changed = dataclasses.replace(step, target=quantization, extra_rows=rows, extra_columns=columns)
    return changed.nbytes(dtype.size)


def _count_weights(step: Step) -> int:
    """Return the number of weights of a matrix, without padding."""
    return sum(shape[0] for shape in step.entry.shapes) * step.entry.width


def _count_fixed_bytes(plan: Plan) -> int:
    """Return an upper bound of the bytes besides matrices: norms, headers, tokenizer, config."""
    item_bytes = getattr(mx, plan.config.dtype).size
    others = [step for step in plan.steps if not step.entry.quantizable]
    arrays = sum(step.nbytes(item_bytes) for step in others)
    tokenizer = (plan.source.folder / TOKENIZER_FILE).stat().st_size
    headers = len(plan.steps) * (4 * TENSOR_BYTES + MODULE_BYTES)
    return arrays + tokenizer + len(plan.template.encode()) + headers + FILE_BYTES


def choose_precisions(
    choices: Mapping[str, list[PrecisionChoice]], budget: int
) -> dict[str, PrecisionChoice]:
    """Choose a precision for each path with the least total damage within `budget` bytes.

    The knapsack is solved exactly up to its unit: bytes above the smallest choice are rounded up
    to 1 / `STEPS` of the range of sizes. The unit does not depend on the budget, so a larger
    budget never does more damage. The smallest choices must fit into it (`find_budget`).
    """
    smallest = {path: min(one.nbytes for one in many) for path, many in choices.items()}
    largest = {path: max(one.nbytes for one in many) for path, many in choices.items()}
    spare = budget - sum(smallest.values())
    unit = max(1, (sum(largest.values()) - sum(smallest.values())) // STEPS)
    room = min(spare // unit, STEPS + 2 * len(choices) + 2)
    best, picks = np.zeros(room + 1), []  # least damage of the matrices so far, by units spent
    for path, many in choices.items():
        least, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int16)
        for number, one in enumerate(many):
            cost = -(-(one.nbytes - smallest[path]) // unit)
            if cost > room:
                continue
            total = best[: room + 1 - cost] + one.damage
            better = total < least[cost:]
            least[cost:][better], pick[cost:][better] = total[better], number
        best = least
        picks.append((path, pick))
    result, left = {}, room
    for path, pick in reversed(picks):
        result[path] = one = choices[path][pick[left]]
        left -= -(-(one.nbytes - smallest[path]) // unit)
    return {path: result[path] for path in choices}
