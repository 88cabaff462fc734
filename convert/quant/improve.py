"""Conversions that do better than rounding: precisions mixed by what is measured, scales tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

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
from mlx_smolvlm.convert.quant.calibration import Sample, read_samples
from mlx_smolvlm.convert.quant.dwq import PICTURE_PARTS, LearnOptions, Progress, learn, make_targets
from mlx_smolvlm.convert.quant.gptq import GptqOptions, compensate_model, gains
from mlx_smolvlm.convert.quant.mixed import Choice, choose, damage, importance
from mlx_smolvlm.convert.run import Plan, plan_checkpoint, write_checkpoint
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.model.model import Model

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

    choices: dict[str, Choice]
    bits_per_weight: float
    damage: float

    def lines(self) -> list[str]:
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
class Result:
    """What `convert_better` did; `mixture` is None if precisions were given."""

    folder: Path
    mixture: Mixture | None

    def lines(self) -> list[str]:
        """What to tell of it."""
        return [] if self.mixture is None else self.mixture.lines()


def convert_better(
    source: str | Path | Source,
    dest: str | Path,
    options: ConvertOptions,
    better: BetterOptions,
    progress: Progress,
) -> Result:
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
    if better.gptq is not None and not targeted and not any(gains(step) for step in plan.steps):
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
    return Result(write_checkpoint(plan, dest, None, better.force), mixture)


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
    choices = measure(plan, model, samples, progress)
    weights = sum(_numbers(step) for step in steps.values())
    least = sum(min(one.nbytes for one in many) for many in choices.values())
    if better.target_bits is not None:
        fixed, budget = 0, int(better.target_bits * weights / 8)
        smallest = f"{least * 8 / weights:.2f} bits a weight"
        asked = f"{better.target_bits:g} bits"
    else:
        assert better.target_bytes is not None
        fixed = _fixed_bytes(plan)
        budget = better.target_bytes - fixed
        smallest = f"{-(-(least + fixed) // 1000) / 1000:.3f} MB"
        asked = f"{better.target_bytes / 1e6:g} MB"
    chosen = choose(choices, budget)
    if chosen is None:
        raise CheckpointError(f"this model does not fit {asked}; the smallest is {smallest}")
    size = sum(one.nbytes for one in chosen.values())
    return Mixture(chosen, size * 8 / weights, sum(one.damage for one in chosen.values()))


def measure(
    plan: Plan, model: Model, samples: Sequence[Sample], progress: Progress
) -> dict[str, list[Choice]]:
    """What each matrix of `plan` can have, its bytes and the estimated damage.

    Without pictures among `samples`, nothing is known of the encoder, and it gets 8 bits.
    """
    steps = {step.entry.path: step for step in plan.steps if step.entry.quantizable}
    count = min(len(samples), MEASURED_SAMPLES)
    spread = [samples[number * len(samples) // count] for number in range(count)]
    information = importance(model, spread, list(steps), progress)
    pictured = any(sample.pixel_values is not None for sample in spread)
    dtype: mx.Dtype = getattr(mx, plan.config.dtype)
    modules = dict(model.named_modules())
    choices: dict[str, list[Choice]] = {}
    for number, (path, step) in enumerate(steps.items()):
        progress(number, len(steps), path)
        weight = modules[path].weight
        known = pictured or not path.startswith(PICTURE_PARTS)
        choices[path] = [Choice(None, _nbytes(step, None, dtype), 0.0)] if known else []
        for one in CANDIDATES:
            if not _fits(step, one) or not (known or one.bits == FINE_BITS):
                continue
            lost = damage(weight, information[path], one, dtype)
            choices[path].append(Choice(one, _nbytes(step, one, dtype), lost))
        mx.clear_cache()
    return choices


def _fits(step: Step, quantization: Quantization) -> bool:
    """Whether groups divide the width; the vision MLP is padded until they do."""
    if step.entry.path.endswith(".mlp.fc2"):
        return True
    try:
        check_width(step.entry.path, step.entry.width, quantization)
    except CheckpointError:
        return False
    return True


def _nbytes(step: Step, quantization: Quantization | None, dtype: mx.Dtype) -> int:
    """At most so many bytes, padding of the vision MLP counted for the largest groups."""
    extra = max(one.group_size for one in CANDIDATES)
    rows = columns = 0
    if step.entry.path.endswith(".mlp.fc1"):
        rows = -step.entry.shapes[0][0] % extra
    elif step.entry.path.endswith(".mlp.fc2"):
        columns = -step.entry.width % extra
    changed = dataclasses.replace(step, target=quantization, extra_rows=rows, extra_columns=columns)
    return changed.nbytes(dtype.size)


def _numbers(step: Step) -> int:
    """Weights of a matrix, without padding."""
    return sum(shape[0] for shape in step.entry.shapes) * step.entry.width


def _fixed_bytes(plan: Plan) -> int:
    """At most what is in the folder besides matrices: norms, headers, tokenizer, config."""
    item_bytes = getattr(mx, plan.config.dtype).size
    others = [step for step in plan.steps if not step.entry.quantizable]
    arrays = sum(step.nbytes(item_bytes) for step in others)
    tokenizer = (plan.source.folder / TOKENIZER_FILE).stat().st_size
    headers = len(plan.steps) * (4 * TENSOR_BYTES + MODULE_BYTES)
    return arrays + tokenizer + len(plan.template.encode()) + headers + FILE_BYTES
