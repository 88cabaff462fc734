"""GPTQ: rounds a model matrix by matrix so that later weights compensate earlier errors.

Each matrix is fitted to the inputs that it gets from the matrices rounded before it. The order is
that of a forward pass: encoder, connector, embeddings, decoder, head. The hidden states of all
samples are kept from one layer to the next, and a layer is freed once its outputs are computed.

Letters in shapes: N tiles, I tokens of a tile, P patches, V vision width, L tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.compare.observe import record_outputs
from mlx_smolvlm.convert.open_model import Matrix
from mlx_smolvlm.convert.options import pack
from mlx_smolvlm.convert.plan import Step
from mlx_smolvlm.convert.quant.calibration import Sample
from mlx_smolvlm.convert.quant.dwq import PackedArrays, Progress, encode_tiles
from mlx_smolvlm.convert.run import Plan
from mlx_smolvlm.model.model import Model

ROWS = 4096  # rows that are rounded at once; a group of them fits into a CPU's cache


@dataclass(frozen=True)
class GptqOptions:
    """How rounding errors are compensated.

    Attributes:
        damping: Added to the diagonal of H, as a share of its mean. The larger, the less other
            columns change. It also keeps H invertible where inputs are always 0.
        shrinks: Factors from 0 to 1 to try on the range of a group. A smaller range clips a few
            large weights and rounds the others more finely; each group takes the factor of least
            error. (1.0,) never clips.

    Raises:
        ValueError: A number is out of range.
    """

    damping: float = 0.01
    shrinks: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping is {self.damping!r}; it must be a number above 0")
        if not self.shrinks or not all(0 < one <= 1 for one in self.shrinks):
            raise ValueError(
                f"shrinks is {self.shrinks!r}; it must hold numbers above 0 and up to 1"
            )


PLAIN = GptqOptions()


def compensate(
    weight: mx.array,
    moment: mx.array,
    quantization: Quantization,
    dtype: mx.Dtype,
    options: GptqOptions = PLAIN,
) -> dict[str, mx.array]:
    """Pack `weight` in affine mode by GPTQ, and return "weight", "scales" and "biases".

    Args:
        weight: The float matrix (rows, width).
        moment: H = inputs.T @ inputs (width, width), of the inputs (tokens, width). With a zero
            matrix, weights are rounded to the nearest.
        quantization: Bits and group size, which must divide the width.
        dtype: The dtype of scales and biases; their rounding errors are compensated too.
        options: How errors are compensated.
    """
    factor = compute_inverse_factor(np.array(moment.astype(mx.float32)), options.damping)
    parts = []
    for start in range(0, weight.shape[0], ROWS):
        columns = np.array(weight[start : start + ROWS].astype(mx.float32).T)
        levels, scales, biases = _round_columns(columns, factor, quantization, dtype, options)
        packed = mx.array(pack_levels(np.ascontiguousarray(levels.T), quantization.bits))
        parts.append({"weight": packed, "scales": scales.T, "biases": biases.T})
    arrays = {suffix: mx.concatenate([one[suffix] for one in parts]) for suffix in parts[0]}
    mx.eval(arrays)
    return arrays


def compute_inverse_factor(moment: np.ndarray, damping: float) -> np.ndarray:
    """Return the upper triangular U (width, width), float32, with U'U the inverse of damped H.

    Row j of U gives the change of the columns after j: an error e of column j changes column k
    by -e U[j, k] / U[j, j].
    """
    damped = moment.astype(np.float64)
    mean = damped.diagonal().mean()
    damped.flat[:: len(damped) + 1] += damping * mean if mean > 0 else 1.0
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)


def _round_columns(
    columns: np.ndarray,
    factor: np.ndarray,
    quantization: Quantization,
    dtype: mx.Dtype,
    options: GptqOptions,
) -> tuple[np.ndarray, mx.array, mx.array]:
    """Return the levels (width, rows) of `columns` (width, rows), scales and biases (groups, rows).

    `columns` is modified in place.
    """
    size, most = quantization.group_size, 2**quantization.bits - 1
    levels = np.empty(columns.shape, np.uint8)
    grids = []
    for start in range(0, len(columns), size):
        end = start + size
        group, errors = columns[start:end], np.empty_like(columns[start:end])
        weights = 1 / np.square(factor.diagonal()[start:end])
        grid = fit_grid(group, weights, quantization, dtype, options.shrinks)
        scales, biases = (np.array(one.astype(mx.float32)) for one in grid)
        for j in range(size):
            level = np.clip(np.rint((group[j] - biases) / scales), 0, most)
            error = (group[j] - (level * scales + biases)) / factor[start + j, start + j]
            group[j + 1 :] -= factor[start + j, start + j + 1 : end, None] * error
            levels[start + j], errors[j] = level, error
        columns[end:] -= factor[start:end, end:].T @ errors
        grids.append(grid)
    return levels, mx.stack([grid[0] for grid in grids]), mx.stack([grid[1] for grid in grids])


def fit_grid(
    group: np.ndarray,
    weights: np.ndarray,
    quantization: Quantization,
    dtype: mx.Dtype,
    shrinks: tuple[float, ...],
) -> tuple[mx.array, mx.array]:
    """Return scales and biases (rows,) of type `dtype` for a `group` (group size, rows).

    Args:
        group: The columns of a group.
        weights: The weight of a squared error in each column, (group size,).
        quantization: Bits and group size.
        dtype: The dtype of the result.
        shrinks: Factors of the range; the one of least error is used, the first of equal ones.
    """
    most = 2**quantization.bits - 1
    rows = mx.array(np.ascontiguousarray(group.T))
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    best: list[mx.array] = []
    for shrink in shrinks:
        cut = mx.clip(rows, low * shrink, high * shrink) if shrink < 1 else rows
        _, scales, biases = mx.quantize(cut, quantization.group_size, quantization.bits)
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        s, b = scales.astype(mx.float32), biases.astype(mx.float32)
        if len(shrinks) == 1:
            return scales[:, 0], biases[:, 0]
        error = rows - (mx.clip(mx.round((rows - b) / s), 0, most) * s + b)
        loss = (error * error) @ mx.array(weights)[:, None]
        if best:
            better = loss < best[0]
            pairs = zip((loss, scales, biases), best, strict=True)
            best = [mx.where(better, new, old) for new, old in pairs]
        else:
            best = [loss, scales, biases]
    return best[1][:, 0], best[2][:, 0]


def pack_levels(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack `levels` (rows, width) of `bits` bits each as MLX does, into uint32 (rows, words).

    Levels follow each other from the lowest bit of the first word of a row.
    """
    rows, width = levels.shape
    single = np.unpackbits(levels[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(single.reshape(rows, width * bits), axis=-1, bitorder="little")
    return packed.view("<u4")


COMPENSATE_BELOW_BITS = 8  # 8 bits lose almost nothing
EMBEDDINGS = "text_model.embed_tokens"

RunModule = Callable[[Any, mx.array], mx.array]  # a module and its input -> its output


def compensate_model(
    plan: Plan,
    model: Model,
    samples: Sequence[Sample],
    options: GptqOptions,
    progress: Progress,
) -> PackedArrays:
    """Return the packed arrays, by path, of the matrices of `plan` that GPTQ changes.

    It leaves out matrices of 8 bits, of modes other than affine, and those that the source has
    packed in the same way; without pictures also those of the encoder and the connector.

    Args:
        plan: The plan of the conversion.
        model: The source as floats. Modified in place, except its head; do not reuse it.
        samples: Samples to run through it.
        options: How errors are compensated.
        progress: Called before each matrix.
    """
    rounder = Rounder(plan, options, progress)
    tied = None if "lm_head" in model else _compute_tied_moment(model, samples)
    pictures = [one.pixel_values for one in samples if one.pixel_values is not None]
    images = iter(round_encoder(rounder, model, pictures))
    embeds = [None if one.pixel_values is None else next(images) for one in samples]
    model.text_model.embed_tokens = embeddings = copy(model.text_model.embed_tokens)
    rounder.round_matrix(EMBEDDINGS, embeddings, tied)
    states = [model.embed(one.input_ids, e) for one, e in zip(samples, embeds, strict=True)]
    hidden = round_decoder(rounder, model, states)
    if "lm_head" in model:
        rounder.round_matrix("lm_head", copy(model.lm_head), compute_moment(hidden))
    return rounder.arrays


def round_encoder(rounder: Rounder, model: Model, pictures: Sequence[mx.array]) -> list[mx.array]:
    """Round encoder and connector, and return image embeddings (N, I, D) of each picture.

    `pictures` are tiles (N, H, W, 3).
    """
    if not pictures:
        return []
    vision, connector = model.vision_model, model.connector
    states = [vision.embeddings(tile[None]) for one in pictures for tile in one]  # (1, P, V)
    layers, vision.encoder.layers = list(vision.encoder.layers), []
    states = rounder.round_layers("vision_model.encoder.layers", layers, states, lambda f, x: f(x))
    features = [vision.post_layernorm(state) for state in states]
    tiles = iter(rounder.round_module("connector", connector, features, lambda f, x: f(x)))
    return [mx.concatenate([next(tiles) for _ in one]) for one in pictures]


def round_decoder(rounder: Rounder, model: Model, states: list[mx.array]) -> list[mx.array]:
    """Round the decoder, and return its last hidden states (1, L, D).

    `states` are `inputs_embeds` (1, L, D) of each sample.
    """
    text = model.text_model
    layers, text.layers = list(text.layers), []

    def run(layer: Any, state: mx.array) -> mx.array:
        text.layers = [layer]
        with record_outputs(text.layers) as outputs:
            text(state)
        return outputs[0]

    states = rounder.round_layers("text_model.layers", layers, states, run)
    text.layers = []
    return [text(state) for state in states]


class Rounder:
    """Rounds modules in order; `arrays` holds the packed arrays by path."""

    def __init__(self, plan: Plan, options: GptqOptions, progress: Progress) -> None:
        self._steps = {s.entry.path: s for s in plan.steps if s.entry.quantizable}
        self._dtype: mx.Dtype = getattr(mx, plan.config.dtype)
        self._options, self._progress = options, progress
        self._count = 0
        self.arrays: PackedArrays = {}

    def round_layers(
        self, path: str, layers: list[Any], states: list[mx.array], run: RunModule
    ) -> list[mx.array]:
        """Round `layers` one by one, emptying the list, and return their outputs for `states`."""
        mx.eval(states)
        for number in range(len(layers)):
            states = self.round_module(f"{path}.{number}", layers.pop(0), states, run)
            mx.clear_cache()
        return states

    def round_module(
        self, path: str, module: nn.Module, inputs: list[mx.array], run: RunModule
    ) -> list[mx.array]:
        """Round the matrices of `module` in order, and return its outputs for `inputs`."""
        leaves = dict(module.named_modules())
        for full in [one for one in self._steps if one.startswith(f"{path}.")]:
            name, moment = full.removeprefix(f"{path}."), None
            if is_compensated(self._steps[full]):
                moment = compute_moment(_record_inputs(name, module, inputs, run))
            self.round_matrix(full, leaves[name], moment)
        outputs = []
        for state in inputs:
            outputs.append(run(module, state))
            mx.eval(outputs[-1])
        return outputs

    def round_matrix(self, path: str, module: nn.Module, moment: mx.array | None) -> None:
        """Round the weight of `module` as planned, by GPTQ if `moment` of its inputs is given."""
        self._progress(self._count, len(self._steps), path)
        self._count += 1
        step = self._steps[path]
        if step.target is None:
            return
        rows, width = module.weight.shape
        padding = [(0, step.extra_rows), (0, step.extra_columns)]
        weight = mx.pad(module.weight.astype(self._dtype), padding)
        if moment is None or not is_compensated(step):
            packed = pack(weight, step.target)
        else:
            moment = mx.pad(moment, [(0, step.extra_columns)] * 2)
            packed = compensate(weight, moment, step.target, self._dtype, self._options)
            self.arrays[path] = packed
        module.weight = Matrix(packed, step.target).get_rows(0, rows)[:, :width]
        mx.eval(module.weight)


def is_compensated(step: Step) -> bool:
    """Whether GPTQ is used for the matrix of `step`."""
    target = step.target
    if target is None or target.mode != "affine" or target.bits >= COMPENSATE_BELOW_BITS:
        return False
    return {member.quantization for member in step.members} != {target}


def compute_moment(inputs: Iterable[mx.array]) -> mx.array:
    """Return the sum of x x' (width, width) over all vectors x of `inputs` (..., width)."""
    total = mx.array(0.0)
    for one in inputs:
        flat = one.reshape(-1, one.shape[-1]).astype(mx.float32)
        total = total + flat.T @ flat
        mx.eval(total)
    return total


def _record_inputs(
    name: str, module: nn.Module, inputs: list[mx.array], run: RunModule
) -> Iterator[mx.array]:
    """Yield the input of the linear layer `name` in `module` for each of `inputs`.

    MLX is lazy, so the layers after it are not computed.
    """
    leaf = dict(module.named_modules())[name]
    recorder = _InputRecorder(leaf)
    module.update_modules(tree_unflatten([(name, recorder)]))
    try:
        for state in inputs:
            run(module, state)
            yield recorder.pop_input()
    finally:
        module.update_modules(tree_unflatten([(name, leaf)]))


class _InputRecorder(nn.Module):
    """A linear layer that keeps its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._inputs: list[mx.array] = []

    def pop_input(self) -> mx.array:
        """Return the last input, and forget it."""
        return self._inputs.pop()

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x)
        result: mx.array = self._layer(x)
        return result


def _compute_tied_moment(model: Model, samples: Sequence[Sample]) -> mx.array:
    """Compute the moment of the inputs of the head, which is tied to the embeddings."""
    embeds = (
        None if s.pixel_values is None else encode_tiles(model, s.pixel_values) for s in samples
    )
    pairs = zip(samples, embeds, strict=True)
    return compute_moment(model.text_model(model.embed(one.input_ids, e)) for one, e in pairs)
