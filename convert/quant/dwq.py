"""DWQ: tunes the scales and biases of a packed model to the outputs of the float model.

The packed integers do not change. The decoder is tuned to the float model's predictions (KL
divergence), the vision encoder and the connector to its image embeddings. The method is mlx-lm's
DWQ, distilled weight quantization (mlx_lm/quant/dwq.py); docs/decisions/precision.md states the
differences.

Letters in shapes: N tiles, H and W a tile's pixels, I tokens per tile, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_smolvlm.convert.compare.observe import HEAD_ROWS, Head, get_head
from mlx_smolvlm.convert.quant.calibration import Sample
from mlx_smolvlm.generate.sampling import log_softmax, sum_last
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.train.loss import checkpoint_layers

LEARN_BELOW_BITS = 8  # 8 bits lose almost nothing; mlx-lm does not tune them either
PICTURE_PARTS = ("vision_model", "connector")
BETAS = [0.9, 0.99]
CHECKS = 6  # evaluations of the samples held back, evenly spread over the steps
MAX_HELD_BACK = 16  # samples

Progress = Callable[[int, int, str], None]  # steps done, steps in all, name of the step
PackedArrays = dict[str, dict[str, mx.array]]  # module path -> arrays by suffix, such as "scales"


@dataclass(frozen=True)
class LearnOptions:
    """How scales and biases are tuned.

    Attributes:
        steps: Optimizer steps for the decoder, one sample each; samples repeat if there are
            fewer.
        picture_steps: Likewise for the vision encoder; without pictures it is not tuned.
        rate: The maximum change of a scale of up to 4 bits by a step of Adam, as a share of the
            scale; a bias changes by as many quantization steps. See `Tunable` for more bits.
        seed: The seed of the order of the samples.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 120
    picture_steps: int = 60
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "picture_steps"):
            if not _is_whole(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of 1 or above")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate!r}; it must be between 0 and 1")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number of 0 or above")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Targets:
    """The outputs of the float model for the samples.

    Attributes:
        hidden: Last hidden states (L, D) of each sample, from which its tokens are predicted.
        head: The output head, which turns them into logits.
        image_embeds: Image embeddings (N, I, D) of each sample; None without pictures.
    """

    hidden: list[mx.array]
    head: Head
    image_embeds: list[mx.array | None]


def make_targets(model: Model, samples: Sequence[Sample], progress: Progress) -> Targets:
    """Compute the outputs of the float `model` for `samples`; only its head stays in memory."""
    hidden, pictures = [], []
    for number, sample in enumerate(samples):
        progress(number, len(samples), "float model")
        embeds = None if sample.pixel_values is None else encode_tiles(model, sample.pixel_values)
        states = model.text_model(model.embed(sample.input_ids, embeds))[0, sample.start - 1 : -1]
        mx.eval(states)
        hidden.append(states)
        pictures.append(embeds)
    return Targets(hidden, get_head(model), pictures)


def encode_tiles(model: Model, pixel_values: mx.array) -> mx.array:
    """Compute `image_embeds` (N, I, D) of `pixel_values` (N, H, W, 3), one tile at a time."""
    tiles = []
    for tile in pixel_values:
        tiles.append(model.encode(tile[None]))
        mx.eval(tiles[-1])
    return mx.concatenate(tiles)


class Tunable(nn.Module):
    """A packed linear layer or embedding whose scales and biases can be tuned.

    `bias_change` is a number of quantization steps. `scale_change` is a share of the scale up to
    4 bits. With more bits it is reduced so that the largest level moves by as many steps as with
    4: otherwise the first steps harm a matrix of 6 bits more than rounding did. So one rate works
    for every matrix.
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self._packed = packed
        self.scale_change = mx.zeros(packed.scales.shape, mx.float32)
        self.bias_change = mx.zeros(packed.scales.shape, mx.float32)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The current scales and biases, in float32."""
        scales = self._packed.scales.astype(mx.float32)
        biases = self._packed.biases.astype(mx.float32)
        share = self.scale_change * min(1, 15 / (2**self._packed.bits - 1))
        return {
            "scales": scales * (1 + share),
            "biases": biases + scales * self.bias_change,
        }

    @property
    def weight(self) -> mx.array:
        """The float32 matrix with the current scales and biases."""
        return self._unpack(self._packed.weight, **self.arrays)

    def _unpack(self, levels: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """Unpack `levels` into float rows; MLX's own unpacking has no gradient for scales."""
        packed, ones = self._packed, mx.ones(scales.shape, mx.float32)
        whole = mx.dequantize(levels, ones, mx.zeros_like(ones), packed.group_size, packed.bits)
        whole = whole.reshape(*scales.shape, packed.group_size)
        return (whole * scales[..., None] + biases[..., None]).reshape(scales.shape[0], -1)

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self._packed, nn.QuantizedEmbedding):
            arrays = {suffix: array[x] for suffix, array in self.arrays.items()}
            return self._unpack(self._packed.weight[x], **arrays)
        product = self.as_linear(x)
        return product + self._packed.bias if "bias" in self._packed else product

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the product of `x` and the matrix, as an embedding does as a head."""
        return x @ self.weight.T


def learn(
    model: Model,
    targets: Targets,
    samples: Sequence[Sample],
    options: LearnOptions,
    progress: Progress,
) -> PackedArrays:
    """Tune the scales and biases of `model`, and return them by path.

    The encoder is tuned first, then the decoder on the outputs of the tuned encoder.

    Args:
        model: The packed model, other weights in float32. Modified in place; do not reuse it.
        targets: The outputs of the float model for `samples`.
        samples: The samples to tune on.
        options: How to tune.
        progress: Called after each step.
    """
    tunables = make_tunable(model)
    with_pictures = [n for n, one in enumerate(samples) if one.pixel_values is not None]
    encoder = {path: t for path, t in tunables.items() if path.startswith(PICTURE_PARTS)}
    if encoder and with_pictures:
        loss = partial(compute_picture_loss, model, samples, targets)
        with checkpoint_layers():
            _tune(encoder, loss, with_pictures, options.picture_steps, options, progress)
    embeds = [
        None if s.pixel_values is None else encode_tiles(model, s.pixel_values) for s in samples
    ]
    decoder = {path: t for path, t in tunables.items() if path not in encoder}
    if decoder:
        loss = partial(compute_text_loss, model, samples, embeds, targets)
        with checkpoint_layers():
            _tune(decoder, loss, list(range(len(samples))), options.steps, options, progress)
    arrays = {path: tunable.arrays for path, tunable in tunables.items()}
    mx.eval(arrays)
    return arrays


def make_tunable(model: Model) -> dict[str, Tunable]:
    """Replace the matrices of `model` to tune by `Tunable`, and return those by path."""
    tunables = {}
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in leaves:
        if getattr(module, "mode", "") == "affine" and module.bits < LEARN_BELOW_BITS:
            tunables[path.removesuffix(".packed")] = Tunable(module)  # inside UnpackingLinear
    model.update_modules(tree_unflatten(list(tunables.items())))
    return tunables


def _tune(
    tunables: dict[str, Tunable],
    loss: Callable[[int], mx.array],
    numbers: list[int],
    steps: int,
    options: LearnOptions,
    progress: Progress,
) -> None:
    """Minimize `loss` over the samples `numbers` by Adam, with a rate that decays to 0.

    Some samples are held back; the parameters with the least loss on them are kept.
    """

    def total(parameters: dict[str, Any], number: int) -> mx.array:
        _set_changes(tunables, parameters)
        return loss(number)

    held_back, numbers = hold_back(numbers)
    gradient = mx.value_and_grad(total)
    optimizer = optim.Adam(optim.cosine_decay(options.rate, steps), BETAS, bias_correction=True)
    random = np.random.default_rng(options.seed)
    order: list[int] = []
    best = parameters = {path: tunable.parameters() for path, tunable in tunables.items()}
    least = _compute_mean_loss(loss, held_back)
    checks = {steps * (part + 1) // CHECKS for part in range(CHECKS)}
    for step in range(steps):
        order = order or random.permutation(numbers).tolist()
        value, gradients = gradient(parameters, order.pop())
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(value, parameters, optimizer.state)
        progress(step, steps, f"loss {value.item():.4f}, held back {least:.4f}")
        if step + 1 in checks:
            _set_changes(tunables, parameters)
            mean = _compute_mean_loss(loss, held_back)
            if mean < least:
                best, least = parameters, mean
    _set_changes(tunables, best)


def hold_back(numbers: list[int]) -> tuple[list[int], list[int]]:
    """Split `numbers` of samples into an eighth to evaluate, evenly spread, and those to tune on.

    A single sample is in both.
    """
    if len(numbers) < 2:
        return numbers, numbers
    count = max(1, min(MAX_HELD_BACK, len(numbers) // 8))
    evaluated = [numbers[(2 * part + 1) * len(numbers) // (2 * count)] for part in range(count)]
    return evaluated, [number for number in numbers if number not in evaluated]


def _set_changes(tunables: dict[str, Tunable], parameters: dict[str, Any]) -> None:
    """Set the changes of `tunables` to `parameters`."""
    for path, tunable in tunables.items():
        tunable.update(parameters[path])


def _compute_mean_loss(loss: Callable[[int], mx.array], numbers: list[int]) -> float:
    """Return the mean of `loss` over the samples `numbers`, computed one by one."""
    return sum(float(loss(number)) for number in numbers) / len(numbers)


def compute_text_loss(
    model: Model,
    samples: Sequence[Sample],
    image_embeds: Sequence[mx.array | None],
    targets: Targets,
    number: int,
) -> mx.array:
    """Return the mean KL divergence in nats from the float model over a sample's targets."""
    sample, expected = samples[number], targets.hidden[number]
    embeds = model.embed(sample.input_ids, image_embeds[number])
    hidden = model.text_model(embeds)[0, sample.start - 1 : -1]
    head = nn.utils.checkpoint(_get_head_module(model), get_head(model))
    total = mx.array(0.0)
    for start in range(0, expected.shape[0], HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        true = mx.stop_gradient(targets.head(expected[part]))
        total = total + _compute_divergence(true, head(hidden[part]))
    return total / expected.shape[0]


def _get_head_module(model: Model) -> nn.Module:
    """Return the module whose parameters the head uses."""
    module: nn.Module = model.lm_head if "lm_head" in model else model.text_model.embed_tokens
    return module


def _compute_divergence(true: mx.array, logits: mx.array) -> mx.array:
    """Return the KL divergence of `logits` (L, vocabulary) from `true`, summed over L."""
    logs = [log_softmax(x) for x in (true, logits)]
    return sum_last(mx.exp(logs[0]) * (logs[0] - logs[1])).sum()


def compute_picture_loss(
    model: Model, samples: Sequence[Sample], targets: Targets, number: int
) -> mx.array:
    """Return the mean squared relative error of a sample's image embeddings."""
    pixels, expected = samples[number].pixel_values, targets.image_embeds[number]
    assert pixels is not None
    assert expected is not None
    errors = ((model.encode(pixels) - expected) ** 2).sum(-1)
    return (errors / (expected**2).sum(-1)).mean()
