"""How much each matrix's rounding changes what a model says, estimated to second order.

To second order, the KL divergence of rounded weights from the float ones is half of d'Fd,
with d the errors and F the Fisher information. Errors of rounding are all but independent of
each other, so F's diagonal is what counts: the mean square of the gradient of the
log-likelihood of tokens drawn from the model's own predictions. One pass back for each sample
gives it for all matrices, of the vision encoder too, whose pictures are read by the decoder.
It is kept as means over `BLOCK` weights of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.options import pack, unpack
from mlx_smolvlm.convert.quant.calibration import Sample
from mlx_smolvlm.convert.quant.dwq import Progress
from mlx_smolvlm.generate.sampling import cross_entropy
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.train.loss import checkpoint_layers

STEPS = 30000  # sizes are counted in so many parts of the range that is possible


@dataclass(frozen=True)
class Choice:
    """A precision that a matrix can have: None is float; its bytes, and the damage it does."""

    quantization: Quantization | None
    nbytes: int
    damage: float


def choose(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, Choice] | None:
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


def importance(
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
        return _surprise(model, sample, key)

    total = {path: mx.zeros(_blocks(weight).shape[:2]) for path, weight in weights.items()}
    try:
        with checkpoint_layers():
            for number, sample in enumerate(samples):
                progress(number, len(samples), "sensitivity")
                gradients = mx.grad(loss)(weights, sample, mx.random.key(SEED + number))
                for path in list(gradients):
                    total[path] = total[path] + (_blocks(gradients.pop(path)) ** 2).mean(-1)
                mx.eval(total)
    finally:
        for path, module in modules.items():
            module.weight = weights[path]
    tokens = sum(sample.input_ids.size - sample.start for sample in samples)
    return {path: one / tokens for path, one in total.items()}


def _surprise(model: Model, sample: Sample, key: mx.array) -> mx.array:
    """Negative log-likelihood, summed, of tokens drawn from the predictions themselves."""
    pixels = sample.pixel_values
    embeds = model.embed(sample.input_ids, None if pixels is None else model.encode(pixels))
    hidden = model.text_model(embeds)[0, sample.start - 1 : -1]
    logits = model.head(hidden).astype(mx.float32)
    drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
    return cross_entropy(logits, drawn).sum()


def _blocks(weight: mx.array) -> mx.array:
    """`weight` in float32 as (rows, blocks, `BLOCK`), zeros after the end of a row."""
    rows, width = weight.shape
    padded = mx.pad(weight.astype(mx.float32), [(0, 0), (0, -width % BLOCK)])
    return padded.reshape(rows, -1, BLOCK)


def damage(
    weight: mx.array, information: mx.array, quantization: Quantization, dtype: mx.Dtype
) -> float:
    """Estimated KL divergence in nats a token if `weight` alone is packed.

    Args:
        weight: (rows, width), in floats.
        information: Of `importance`, (rows, blocks).
        quantization: How it is packed; a width that groups do not divide is padded.
        dtype: Of its scales.
    """
    width = weight.shape[1]
    padded = mx.pad(weight.astype(dtype), [(0, 0), (0, -width % quantization.group_size)])
    packed = unpack(pack(padded, quantization), quantization, mx.float32)[:, :width]
    squares = (_blocks(packed - weight.astype(mx.float32)) ** 2).sum(-1)
    return 0.5 * float(np.array((squares * information).sum(-1)).sum(dtype=np.float64))
