"""Scales and biases of packed matrices, tuned so that the model says what the floats said.

The packed integers stay. The decoder is tuned to the float model's predictions (KL
divergence), the vision encoder and connector to its image embeddings. The idea is mlx-lm's
DWQ, distilled weight quantization (mlx_lm/quant/dwq.py); what differs is written in
docs/decisions/precision.md.

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

LEARN_BELOW_BITS = 8  # 8 bits lose next to nothing; mlx-lm leaves them alone too
PICTURE_PARTS = ("vision_model", "connector")
BETAS = [0.9, 0.99]
CHECKS = 6  # at what is held back, evenly spread over the steps
MAX_HELD_BACK = 16  # samples

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is at hand
PackedArrays = dict[str, dict[str, mx.array]]  # module path -> "scales" and "biases"


@dataclass(frozen=True)
class LearnOptions:
    """How scales and biases are tuned.

    Attributes:
        steps: Samples that the decoder is tuned on, one a step; each is taken again and
            again if there are fewer.
        picture_steps: Likewise of the vision encoder; it is left alone without pictures.
        rate: The most that Adam moves a scale of up to 4 bits in a step, as a share of it; a bias
            moves by as many quantization steps. See `Tunable` for more bits.
        seed: Of the order of the samples.

    Raises:
        ValueError: A number that is below 1, or a rate that is not above 0.
    """

    steps: int = 120
    picture_steps: int = 60
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "picture_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or above")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Targets:
    """What the float model makes of the samples.

    Attributes:
        hidden: Its last hidden states (L, D) of each sample, of the tokens before targets.
        head: Its output head, which makes predictions of them.
        image_embeds: (N, I, D) of each sample with pictures, else None.
    """

    hidden: list[mx.array]
    head: Head
    image_embeds: list[mx.array | None]


def make_targets(model: Model, samples: Sequence[Sample], progress: Progress) -> Targets:
    """What `model` makes of `samples`; of the model nothing stays but its head."""
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
    """`image_embeds` (N, I, D) of `pixel_values` (N, H, W, 3), tile by tile for little memory."""
    tiles = []
    for tile in pixel_values:
        tiles.append(model.encode(tile[None]))
        mx.eval(tiles[-1])
    return mx.concatenate(tiles)


class Tunable(nn.Module):
    """A packed linear layer or embedding whose scales and biases can be tuned.

    `bias_change` is a number of quantization steps. `scale_change` is a share of the scale up to
    4 bits; at more it is so much less that the largest level moves by as many steps, or the first
    steps would do a matrix of 6 bits more harm than rounding did. So one rate suits every matrix.
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self._packed = packed
        self.scale_change = mx.zeros(packed.scales.shape, mx.float32)
        self.bias_change = mx.zeros(packed.scales.shape, mx.float32)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Scales and biases as they are now, in float32."""
        scales = self._packed.scales.astype(mx.float32)
        biases = self._packed.biases.astype(mx.float32)
        share = self.scale_change * min(1, 15 / (2**self._packed.bits - 1))
        return {
            "scales": scales * (1 + share),
            "biases": biases + scales * self.bias_change,
        }

    @property
    def weight(self) -> mx.array:
        """The float32 matrix that the integers stand for with them."""
        return self._unpack(self._packed.weight, **self.arrays)

    def _unpack(self, levels: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """The float rows of packed `levels`; MLX's own unpacking gives scales no gradient."""
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
        """`x` times the matrix, which is what an embedding does as a head."""
        return x @ self.weight.T


def learn(
    model: Model,
    targets: Targets,
    samples: Sequence[Sample],
    options: LearnOptions,
    progress: Progress,
) -> PackedArrays:
    """Better scales and biases for the packed matrices of `model`, by path; it is used up.

    The encoder is tuned first, then the decoder on what the tuned encoder gives it.

    Args:
        model: Packed, its other weights in float32.
        targets: What the float model makes of `samples`.
        progress: Called before each step.
    """
    tunables = make_tunable(model)
    pictured = [n for n, one in enumerate(samples) if one.pixel_values is not None]
    seen = {path: t for path, t in tunables.items() if path.startswith(PICTURE_PARTS)}
    if seen and pictured:
        loss = partial(compute_picture_loss, model, samples, targets)
        with checkpoint_layers():
            _tune(seen, loss, pictured, options.picture_steps, options, progress)
    embeds = [
        None if s.pixel_values is None else encode_tiles(model, s.pixel_values) for s in samples
    ]
    read = {path: t for path, t in tunables.items() if path not in seen}
    if read:
        loss = partial(compute_text_loss, model, samples, embeds, targets)
        with checkpoint_layers():
            _tune(read, loss, list(range(len(samples))), options.steps, options, progress)
    learned = {path: tunable.arrays for path, tunable in tunables.items()}
    mx.eval(learned)
    return learned


def make_tunable(model: Model) -> dict[str, Tunable]:
    """The matrices of `model` that are to be tuned, by path, put into it as `Tunable`."""
    found = {}
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in leaves:
        if getattr(module, "mode", "") == "affine" and module.bits < LEARN_BELOW_BITS:
            found[path.removesuffix(".packed")] = Tunable(module)  # inside of UnpackingLinear
    model.update_modules(tree_unflatten(list(found.items())))
    return found


def _tune(
    tunables: dict[str, Tunable],
    loss: Callable[[int], mx.array],
    numbers: list[int],
    steps: int,
    options: LearnOptions,
    progress: Progress,
) -> None:
    """Lower `loss` of the samples `numbers` by `steps` steps of Adam, the rate falling to 0.

    Some samples are held back, and the changes that serve those best are kept.
    """

    def total(parameters: dict[str, Any], number: int) -> mx.array:
        _set_changes(tunables, parameters)
        return loss(number)

    held, numbers = hold_back(numbers)
    gradient = mx.value_and_grad(total)
    optimizer = optim.Adam(optim.cosine_decay(options.rate, steps), BETAS, bias_correction=True)
    random = np.random.default_rng(options.seed)
    order: list[int] = []
    best = parameters = {path: tunable.parameters() for path, tunable in tunables.items()}
    least = _compute_mean_loss(loss, held)
    looks = {steps * (part + 1) // CHECKS for part in range(CHECKS)}
    for step in range(steps):
        order = order or random.permutation(numbers).tolist()
        value, gradients = gradient(parameters, order.pop())
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(value, parameters, optimizer.state)
        progress(step, steps, f"loss {value.item():.4f}, held back {least:.4f}")
        if step + 1 in looks:
            _set_changes(tunables, parameters)
            found = _compute_mean_loss(loss, held)
            if found < least:
                best, least = parameters, found
    _set_changes(tunables, best)


def hold_back(numbers: list[int]) -> tuple[list[int], list[int]]:
    """Of the samples `numbers`, an eighth to look at, evenly spread, and the rest to tune on.

    Of a single sample, both.
    """
    if len(numbers) < 2:
        return numbers, numbers
    count = max(1, min(MAX_HELD_BACK, len(numbers) // 8))
    held = [numbers[(2 * part + 1) * len(numbers) // (2 * count)] for part in range(count)]
    return held, [number for number in numbers if number not in held]


def _set_changes(tunables: dict[str, Tunable], parameters: dict[str, Any]) -> None:
    """Change `tunables` by `parameters`."""
    for path, tunable in tunables.items():
        tunable.update(parameters[path])


def _compute_mean_loss(loss: Callable[[int], mx.array], numbers: list[int]) -> float:
    """The mean of `loss` over the samples `numbers`, one computed after the other."""
    return sum(float(loss(number)) for number in numbers) / len(numbers)


def compute_text_loss(
    model: Model,
    samples: Sequence[Sample],
    image_embeds: Sequence[mx.array | None],
    targets: Targets,
    number: int,
) -> mx.array:
    """Mean KL divergence in nats of `model` from the float model, over a sample's targets."""
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
    """The module whose parameters the head uses."""
    module: nn.Module = model.lm_head if "lm_head" in model else model.text_model.embed_tokens
    return module


def _compute_divergence(true: mx.array, logits: mx.array) -> mx.array:
    """KL divergence of `logits` (L, vocabulary) from `true`, summed over L."""
    logs = [log_softmax(x) for x in (true, logits)]
    return sum_last(mx.exp(logs[0]) * (logs[0] - logs[1])).sum()


def compute_picture_loss(
    model: Model, samples: Sequence[Sample], targets: Targets, number: int
) -> mx.array:
    """Mean squared relative error of a sample's image embeddings."""
    pixels, expected = samples[number].pixel_values, targets.image_embeds[number]
    assert pixels is not None
    assert expected is not None
    errors = ((model.encode(pixels) - expected) ** 2).sum(-1)
    return (errors / (expected**2).sum(-1)).mean()
