"""Conversions that do better than rounding: precisions mixed by what is measured, scales tuned."""

from __future__ import annotations

import dataclasses
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
MEASURED_SAMPLES = 32  # a matrix's number is a mean over many weights, so few are enough
TENSOR_BYTES, MODULE_BYTES, FILE_BYTES = 160, 160, 8192  # at most, of headers and config.json


@dataclass(frozen=True)
class BetterOptions:
    """What goes beyond rounding.

    Attributes:
        target_bytes: Of the folder, all files counted; precisions are mixed to fit. None, with
            `target_bits` None too, leaves them as `ConvertOptions` say.
        target_bits: Likewise, as mean bits of a weight of a matrix, its share of scales counted.
        gptq: How errors of rounding are made up for; None rounds each weight by itself.
        learn: How scales and biases are tuned; None leaves them.
        calibration: Files to measure and tune on; empty takes the bundled ones.
        offline: Take a hub id from the local cache alone.
        force: Replace a checkpoint at the destination.
    """

    target_bytes: int | None = None
    target_bits: float | None = None
    gptq: GptqOptions | None = None
    learn: LearnOptions | None = None
    calibration: tuple[Path, ...] = ()
    offline: bool = False
    force: bool = False


@dataclass(frozen=True)
class Mixture:
    """Precisions by path, in `choices`; bits of a weight, and the estimated damage in nats."""

    choices: dict[str, PrecisionChoice]
    bits_per_weight: float
    damage: float

    def format_lines(self) -> list[str]:
        """What to tell of it."""
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
    """What `convert_better` did; `mixture` is None if precisions were given."""

    folder: Path
    mixture: Mixture | None

    def format_lines(self) -> list[str]:
        """What to tell of it."""
        return [] if self.mixture is None else self.mixture.format_lines()


def convert_better(
    source: str | Path | Source,
    dest: str | Path,
    options: ConvertOptions,
    better: BetterOptions,
    progress: Progress,
) -> ConversionResult:
    """The folder `dest` with the checkpoint `source`, converted as `better` says.

    Args:
        options: Precision where `better` has no target; dtype.
        progress: Called with steps done, steps in all, and what is at hand.

    Raises:
        CheckpointError: The source is not usable, `dest` is taken, the target is too small, or
            nothing is rounded that errors could be made up for.
    """
    dest = expand_path(dest, CheckpointError)
    check_destination(dest, better.force)
    opened = open_source(source, better.offline)
    plan = plan_checkpoint(opened, options)
    targeted = better.target_bytes is not None or better.target_bits is not None
    if (
        better.gptq is not None
        and not targeted
        and not any(is_compensated(step) for step in plan.steps)
    ):
        raise CheckpointError(
            "GPTQ has nothing to do: no matrix is to be rounded to fewer than 8 bits; ask for "
            "fewer, such as 4"
        )
    vlm = SourceReader(opened).load()
    samples = read_samples(vlm, better.calibration)
    mixture = None
    if targeted:
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
    """The mixture of `CANDIDATES` and float for the matrices of `plan` that fits the target.

    Args:
        model: The source as floats.

    Raises:
        CheckpointError: Even the smallest mixture is larger; it names the smallest size.
    """
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    choices = measure_choices(plan, model, samples, progress)
    weights = sum(_count_weights(step) for step in steps.values())
    least = sum(min(one.nbytes for one in many) for many in choices.values())
    if better.target_bits is not None:
        fixed, budget = 0, int(better.target_bits * weights / 8)
        smallest = f"{least * 8 / weights:.2f} bits a weight"
        asked = f"{better.target_bits:g} bits"
    else:
        assert better.target_bytes is not None
        fixed = _count_fixed_bytes(plan)
        budget = better.target_bytes - fixed
        smallest = f"{-(-(least + fixed) // 1000) / 1000:.3f} MB"
        asked = f"{better.target_bytes / 1e6:g} MB"
    chosen = choose_precisions(choices, budget)
    if chosen is None:
        raise CheckpointError(f"this model does not fit {asked}; the smallest is {smallest}")
    size = sum(one.nbytes for one in chosen.values())
    return Mixture(chosen, size * 8 / weights, sum(one.damage for one in chosen.values()))


def measure_choices(
    plan: Plan, model: Model, samples: Sequence[Sample], progress: Progress
) -> dict[str, list[PrecisionChoice]]:
    """What each matrix of `plan` can have, its bytes and the estimated damage.

    Without pictures among `samples`, nothing is known of the encoder, and it gets 8 bits.
    """
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    count = min(len(samples), MEASURED_SAMPLES)
    spread = [samples[number * len(samples) // count] for number in range(count)]
    information = estimate_importance(model, spread, list(steps), progress)
    pictured = any(sample.pixel_values is not None for sample in spread)
    dtype: mx.Dtype = getattr(mx, plan.config.dtype)
    modules = dict(model.named_modules())
    choices: dict[str, list[PrecisionChoice]] = {}
    for number, (path, step) in enumerate(steps.items()):
        progress(number, len(steps), path)
        weight = modules[path].weight
        known = pictured or not path.startswith(PICTURE_PARTS)
        choices[path] = (
            [PrecisionChoice(None, _count_nbytes(step, None, dtype), 0.0)] if known else []
        )
        for one in CANDIDATES:
            if not _can_quantize(step, one) or not (known or one.bits == FINE_BITS):
                continue
            lost = estimate_damage(weight, information[path], one, dtype)
            choices[path].append(PrecisionChoice(one, _count_nbytes(step, one, dtype), lost))
        mx.clear_cache()
    return choices


def _can_quantize(step: Step, quantization: Quantization) -> bool:
    """Whether groups divide the width; the vision MLP is padded until they do."""
    if step.entry.path.endswith(".mlp.fc2"):
        return True
    try:
        check_width(step.entry.path, step.entry.width, quantization)
    except CheckpointError:
        return False
    return True


def _count_nbytes(step: Step, quantization: Quantization | None, dtype: mx.Dtype) -> int:
    """At most so many bytes, padding of the vision MLP counted for the largest groups."""
    extra = max(one.group_size for one in CANDIDATES)
    rows = columns = 0
    if step.entry.path.endswith(".mlp.fc1"):
        rows = -step.entry.shapes[0][0] % extra
    elif step.entry.path.endswith(".mlp.fc2"):
        columns = -step.entry.width % extra
    changed = dataclasses.replace(step, target=quantization, extra_rows=rows, extra_columns=columns)
    return changed.nbytes(dtype.size)


def _count_weights(step: Step) -> int:
    """Weights of a matrix, without padding."""
    return sum(shape[0] for shape in step.entry.shapes) * step.entry.width


def _count_fixed_bytes(plan: Plan) -> int:
    """At most what is in the folder besides matrices: norms, headers, tokenizer, config."""
    item_bytes = getattr(mx, plan.config.dtype).size
    others = [step for step in plan.steps if not step.entry.quantizable]
    arrays = sum(step.nbytes(item_bytes) for step in others)
    tokenizer = (plan.source.folder / TOKENIZER_FILE).stat().st_size
    headers = len(plan.steps) * (4 * TENSOR_BYTES + MODULE_BYTES)
    return arrays + tokenizer + len(plan.template.encode()) + headers + FILE_BYTES


STEPS = 30000  # sizes are counted in so many parts of the range that is possible


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision that a matrix can have: None is float; its bytes, and the damage it does."""

    quantization: Quantization | None
    nbytes: int
    damage: float


def choose_precisions(
    choices: Mapping[str, list[PrecisionChoice]], budget: int
) -> dict[str, PrecisionChoice] | None:
    """A choice for each path, of least total damage within `budget` bytes; None if none fits.

    The knapsack is solved exactly up to its unit: bytes above the smallest choice are rounded
    up to a `STEPS`th of what is possible. The unit does not depend on the budget, so
    more bytes never do more damage.
    """
    smallest = {path: min(one.nbytes for one in many) for path, many in choices.items()}
    largest = {path: max(one.nbytes for one in many) for path, many in choices.items()}
    spare = budget - sum(smallest.values())
    if spare < 0:
        return None
    unit = max(1, (sum(largest.values()) - sum(smallest.values())) // STEPS)
    room = min(spare // unit, STEPS + 2 * len(choices) + 2)
    best, picks = np.zeros(room + 1), []  # least damage of what came before, by units spent
    for path, many in choices.items():
        least, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int16)
        for number, one in enumerate(many):
            cost = -(-(one.nbytes - smallest[path]) // unit)
            if cost > room:
                continue
            tried = best[: room + 1 - cost] + one.damage
            better = tried < least[cost:]
            least[cost:][better], pick[cost:][better] = tried[better], number
        best = least
        picks.append((path, pick))
    result, left = {}, room
    for path, pick in reversed(picks):
        result[path] = one = choices[path][pick[left]]
        left -= -(-(one.nbytes - smallest[path]) // unit)
    return {path: result[path] for path in choices}


BLOCK = 32  # weights of a row that share a number; every group is a multiple
SEED = 0

Importance = Mapping[str, mx.array]  # path -> (rows, blocks), the mean of F's diagonal


def estimate_importance(
    model: Model, samples: Sequence[Sample], paths: Sequence[str], progress: Progress
) -> Importance:
    """The diagonal of F, per token to predict, for the matrices of `model` at `paths`.

    Args:
        model: With float weights; it is as it was afterwards.
        samples: What it predicts; those with pictures are what the encoder is measured by.
        progress: Called before each sample.
    """
    leaves = dict(model.named_modules())
    modules = {path: leaves[path] for path in paths}
    weights = {path: module.weight for path, module in modules.items()}

    def loss(given: dict[str, mx.array], sample: Sample, key: mx.array) -> mx.array:
        for path, module in modules.items():
            module.weight = given[path]
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
    """Negative log-likelihood, summed, of tokens drawn from the predictions themselves."""
    pixels = sample.pixel_values
    embeds = model.embed(sample.input_ids, None if pixels is None else model.encode(pixels))
    hidden = model.text_model(embeds)[0, sample.start - 1 : -1]
    logits = model.head(hidden).astype(mx.float32)
    drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
    return cross_entropy(logits, drawn).sum()


def _split_blocks(weight: mx.array) -> mx.array:
    """`weight` in float32 as (rows, blocks, `BLOCK`), zeros after the end of a row."""
    rows, width = weight.shape
    padded = mx.pad(weight.astype(mx.float32), [(0, 0), (0, -width % BLOCK)])
    return padded.reshape(rows, -1, BLOCK)


def estimate_damage(
    weight: mx.array, information: mx.array, quantization: Quantization, dtype: mx.Dtype
) -> float:
    """Estimated KL divergence in nats a token if `weight` alone is packed.

    Args:
        weight: (rows, width), in floats.
        information: Of `estimate_importance`, (rows, blocks).
        quantization: How it is packed; a width that groups do not divide is padded.
        dtype: Of its scales.
    """
    width = weight.shape[1]
    padded = mx.pad(weight.astype(dtype), [(0, 0), (0, -width % quantization.group_size)])
    packed = unpack(pack(padded, quantization), quantization, mx.float32)[:, :width]
    squares = (_split_blocks(packed - weight.astype(mx.float32)) ** 2).sum(-1)
    return 0.5 * float(np.array((squares * information).sum(-1)).sum(dtype=np.float64))
