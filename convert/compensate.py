"""One matrix rounded so that the errors of its columns make up for each other (GPTQ).

What counts is not how far the weights move but how far the products with the layer's inputs do:
the squared error of `inputs @ weight.T` is, for each row of errors d, d H d', with H the second
moment of the inputs. Columns are rounded in order. What rounding did to one is made up for,
as well as that can be, by moving those that are not rounded yet.

Source: GPTQ, arXiv 2210.17323, algorithm 1; mlx-lm has it too (mlx_lm/quant/gptq.py), for models
whose matrices all get the same 2, 4 or 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Quantization

ROWS = 4096  # rows that are rounded at once: a group of them stays in a CPU's cache


@dataclass(frozen=True)
class GptqOptions:
    """How errors are made up for.

    Attributes:
        damping: Added to the diagonal of H, as a share of its mean: the more, the less the
            other columns are moved. Inputs that were never seen are kept from moving anything.
        shrinks: What the range of a group may be scaled by, so that a few large weights are cut
            off and the others lie finer; the best for the group is taken. (1.0,) never cuts.
    """

    damping: float = 0.01
    shrinks: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


PLAIN = GptqOptions()


def compensate(
    weight: mx.array,
    moment: mx.array,
    quantization: Quantization,
    dtype: mx.Dtype,
    options: GptqOptions = PLAIN,
) -> dict[str, mx.array]:
    """`weight` (rows, width) packed in affine mode: "weight", "scales" and "biases".

    Args:
        weight: In floats.
        moment: H (width, width), of the inputs (tokens, width): inputs.T @ inputs. A zero
            matrix makes this plain rounding.
        quantization: Bits and group size; groups divide the width.
        dtype: Of scales and biases; what they lose by it is made up for as well.
    """
    factor = inverse_factor(np.array(moment.astype(mx.float32)), options.damping)
    parts = []
    for start in range(0, weight.shape[0], ROWS):
        columns = np.array(weight[start : start + ROWS].astype(mx.float32).T)
        levels, scales, biases = _round(columns, factor, quantization, dtype, options)
        packed = mx.array(pack_levels(np.ascontiguousarray(levels.T), quantization.bits))
        parts.append({"weight": packed, "scales": scales.T, "biases": biases.T})
    arrays = {suffix: mx.concatenate([one[suffix] for one in parts]) for suffix in parts[0]}
    mx.eval(arrays)
    return arrays


def inverse_factor(moment: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U (width, width), float32, with U'U the inverse of the damped H.

    Row j of U is what is left of columns j and after once those before are rounded: U[j, k] /
    U[j, j] of an error of column j is what column k makes up for.
    """
    damped = moment.astype(np.float64)
    mean = damped.diagonal().mean()
    damped.flat[:: len(damped) + 1] += damping * mean if mean > 0 else 1.0
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)


def _round(
    columns: np.ndarray,
    factor: np.ndarray,
    quantization: Quantization,
    dtype: mx.Dtype,
    options: GptqOptions,
) -> tuple[np.ndarray, mx.array, mx.array]:
    """Levels (width, rows) of the `columns` (width, rows), and scales and biases (groups, rows).

    `columns` are used up.
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
    """Scales and biases (rows,) of type `dtype` for a `group` (group size, rows).

    Args:
        weights: What a squared error counts in each column, (group size,).
        shrinks: Of the range; that of least error is taken, the first of equal ones.
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
    """`levels` (rows, width) of `bits` bits each as MLX packs them, uint32 (rows, words).

    They follow each other from the lowest bit of a row's first word on.
    """
    rows, width = levels.shape
    single = np.unpackbits(levels[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(single.reshape(rows, width * bits), axis=-1, bitorder="little")
    return packed.view("<u4")
