"""Conversions that lose less than rounding: mixed precisions, GPTQ and tuned scales.

Precisions are mixed by the estimated damage of packing each matrix. To second order, the KL
divergence of rounded weights from the float ones is half of d'Fd, with d the errors and F the
Fisher information. Rounding errors are almost independent of each other, so only the diagonal of F
is used: the mean square of the gradient of the log-likelihood of tokens that are drawn from the
model's own predictions. One backward pass for each sample gives it for all matrices, including
those of the vision encoder, because the decoder reads the pictures.
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
    pack,
    unpack,
)
from mlx_smolvlm.convert.plan import Step
from mlx_smolvlm.convert.quant.calibration import Sample, read_samples
from mlx_smolvlm.convert.quant.dwq import PICTURE_PARTS, LearnOptions, Progress, learn, make_targets
from mlx_smolvlm.convert.quant.gptq import GptqOptions, compensate_model, is_compensated
from mlx_smolvlm.convert.run import Plan, plan_checkpoint, write_checkpoint
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.generate.sampling import cross_entropy
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.train.loss import checkpoint_layers

CANDIDATES = tuple(Quantization(n, g, "affine") for n in AFFINE_BITS for g in (32, 64))
MEASURED_SAMPLES = 32  # enough, because F is averaged over many weights
TENSOR_BYTES, MODULE_BYTES, FILE_BYTES = 160, 160, 8192  # bounds for headers and config.json
STEPS = 30000  # units of the knapsack between the smallest and the largest size
BLOCK = 32  # weights of a row that share a value of F; divides every group size
SEED = 0

Importance = Mapping[str, mx.array]  # path -> (rows, blocks), means of the diagonal of F


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
            f"mixed {self.bits_per_weight:.2f} bits a weight, estimated KL {self.damage:.3g} nats",
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
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    choices = measure_choices(plan, model, samples, progress)
    weights = sum(_count_weights(step) for step in steps.values())
    least = sum(min(one.nbytes for one in many) for many in choices.values())
    if better.target_bits is not None:
        fixed, budget = 0, int(better.target_bits * weights / 8)
        smallest = f"{least * 8 / weights:.2f} bits a weight"
        target = f"{better.target_bits:g} bits"
    else:
        assert better.target_bytes is not None
        fixed = _count_fixed_bytes(plan)
        budget = better.target_bytes - fixed
        smallest = f"{-(-(least + fixed) // 1000) / 1000:.3f} MB"
        target = f"{better.target_bytes / 1e6:g} MB"
    choice = choose_precisions(choices, budget)
    if choice is None:
        raise CheckpointError(f"this model does not fit {target}; the smallest is {smallest}")
    size = sum(one.nbytes for one in choice.values())
    return Mixture(choice, size * 8 / weights, sum(one.damage for one in choice.values()))


def measure_choices(
    plan: Plan, model: Model, samples: Sequence[Sample], progress: Progress
) -> dict[str, list[PrecisionChoice]]:
    """Return the possible precisions of each matrix of `plan`, with bytes and damage.

    Without pictures in `samples`, the encoder cannot be measured, and gets 8 bits.
    """
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    count = min(len(samples), MEASURED_SAMPLES)
    spread = [samples[number * len(samples) // count] for number in range(count)]
    information = estimate_importance(model, spread, list(steps), progress)
    has_pictures = any(sample.pixel_values is not None for sample in spread)
    dtype: mx.Dtype = getattr(mx, plan.config.dtype)
    modules = dict(model.named_modules())
    choices: dict[str, list[PrecisionChoice]] = {}
    for number, (path, step) in enumerate(steps.items()):
        progress(number, len(steps), path)
        weight = modules[path].weight
        is_measured = has_pictures or not path.startswith(PICTURE_PARTS)
        choices[path] = (
            [PrecisionChoice(None, _count_nbytes(step, None, dtype), 0.0)] if is_measured else []
        )
        for one in CANDIDATES:
            if not _can_quantize(step, one) or not (is_measured or one.bits == FINE_BITS):
                continue
            damage = estimate_damage(weight, information[path], one, dtype)
            choices[path].append(PrecisionChoice(one, _count_nbytes(step, one, dtype), damage))
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
) -> dict[str, PrecisionChoice] | None:
    """Choose a precision for each path with the least total damage within `budget` bytes.

    The knapsack is solved exactly up to its unit: bytes above the smallest choice are rounded up
    to 1 / `STEPS` of the range of sizes. The unit does not depend on the budget, so a larger
    budget never does more damage.

    Returns:
        The choices by path; None if the smallest ones exceed the budget.
    """
    smallest = {path: min(one.nbytes for one in many) for path, many in choices.items()}
    largest = {path: max(one.nbytes for one in many) for path, many in choices.items()}
    spare = budget - sum(smallest.values())
    if spare < 0:
        return None
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


def estimate_importance(
    model: Model, samples: Sequence[Sample], paths: Sequence[str], progress: Progress
) -> Importance:
    """Estimate the diagonal of F, per predicted token, for the matrices of `model` at `paths`.

    Args:
        model: A model with float weights, which are the same afterwards.
        samples: Samples to predict; those with pictures measure the encoder.
        paths: The paths of the matrices.
        progress: Called before each sample.
    """
    leaves = dict(model.named_modules())
    modules = {path: leaves[path] for path in paths}
    weights = {path: module.weight for path, module in modules.items()}

    def loss(parameters: dict[str, mx.array], sample: Sample, key: mx.array) -> mx.array:
        for path, module in modules.items():
            module.weight = parameters[path]
        return _compute_nll(model, sample, key)

    total = {path: mx.zeros(_split_blocks(weight).shape[:2]) for path, weight in weights.items()}
    try:
        with checkpoint_layers():
            for number, sample in enumerate(samples):
                progress(number, len(samples), "sensitivity")
                gradients = mx.grad(loss)(weights, sample, mx.random.key(SEED + number))
                for path in list(gradients):
                    total[path] = total[path] + (_split_blocks(gradients.pop(path)) ** 2).mean(-1)
                mx.eval(total)
    finally:
        for path, module in modules.items():
            module.weight = weights[path]
    tokens = sum(sample.input_ids.size - sample.start for sample in samples)
    return {path: one / tokens for path, one in total.items()}


def _compute_nll(model: Model, sample: Sample, key: mx.array) -> mx.array:
    """Sum the negative log-likelihood of tokens that are drawn from the predictions."""
    pixels = sample.pixel_values
    embeds = model.embed(sample.input_ids, None if pixels is None else model.encode(pixels))
    hidden = model.text_model(embeds)[0, sample.start - 1 : -1]
    logits = model.head(hidden).astype(mx.float32)
    token_ids = mx.random.categorical(mx.stop_gradient(logits), key=key)
    return cross_entropy(logits, token_ids).sum()


def _split_blocks(weight: mx.array) -> mx.array:
    """Return `weight` in float32 as (rows, blocks, `BLOCK`), each row padded with zeros."""
    rows, width = weight.shape
    padded = mx.pad(weight.astype(mx.float32), [(0, 0), (0, -width % BLOCK)])
    return padded.reshape(rows, -1, BLOCK)


def estimate_damage(
    weight: mx.array, information: mx.array, quantization: Quantization, dtype: mx.Dtype
) -> float:
    """Estimate the KL divergence in nats a token if `weight` alone is packed.

    Args:
        weight: The float matrix (rows, width).
        information: The result (rows, blocks) of `estimate_importance`.
        quantization: How it is packed; the width is padded to a multiple of the group size.
        dtype: The dtype of scales and biases.
    """
    width = weight.shape[1]
    padded = mx.pad(weight.astype(dtype), [(0, 0), (0, -width % quantization.group_size)])
    packed = unpack(pack(padded, quantization), quantization, mx.float32)[:, :width]
    squares = (_split_blocks(packed - weight.astype(mx.float32)) ** 2).sum(-1)
    return 0.5 * float(np.array((squares * information).sum(-1)).sum(dtype=np.float64))
