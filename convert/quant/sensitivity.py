"""Estimate how much packing a matrix damages the predictions of a model.

To second order, the KL divergence of rounded weights from the float ones is half of d'Fd, with d
the errors and F the Fisher information. Rounding errors are almost independent of each other, so
only the diagonal of F is used: the mean square of the gradient of the log-likelihood of tokens that
are drawn from the model's own predictions. One backward pass for each sample gives it for all
matrices, including those of the vision encoder, because the decoder reads the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.options import pack, unpack
from mlx_smolvlm.convert.quant.calibration import Sample
from mlx_smolvlm.convert.quant.dwq import Progress
from mlx_smolvlm.generate.sampling import cross_entropy
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.train.loss import checkpoint_layers

BLOCK = 32  # weights of a row that share a value of F; divides every group size
SEED = 0

Importance = Mapping[str, mx.array]  # path -> (rows, blocks), means of the diagonal of F


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
