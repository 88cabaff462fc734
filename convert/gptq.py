"""A model rounded matrix by matrix, each to the inputs that the rounded ones before give it.

The order is that of a forward pass: encoder, connector, embeddings, decoder, head. Hidden states of
all samples are kept from one layer to the next, and a layer is let go of once they are known.

Letters in shapes: N tiles, I tokens of a tile, P patches, V vision width, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_smolvlm.convert.calibration import Sample
from mlx_smolvlm.convert.compensate import GptqOptions, compensate
from mlx_smolvlm.convert.learn import Learned, Progress, encode
from mlx_smolvlm.convert.observe import recorded
from mlx_smolvlm.convert.opened import Matrix
from mlx_smolvlm.convert.plan import Step
from mlx_smolvlm.convert.quantize import pack
from mlx_smolvlm.convert.run import Plan
from mlx_smolvlm.model import Model

COMPENSATED_BELOW_BITS = 8  # 8 bits lose next to nothing
EMBEDDINGS = "text_model.embed_tokens"

Through = Callable[[Any, mx.array], mx.array]  # a module and its input -> its output


def compensate_model(
    plan: Plan,
    model: Model,
    samples: Sequence[Sample],
    options: GptqOptions,
    progress: Progress,
) -> Learned:
    """The arrays of the packed matrices of `plan`, by path, where they differ from plain rounding.

    Those of 8 bits, of modes that are not affine, and those that the source has packed in the
    same way already stay as they are; so do the encoder's without pictures.

    Args:
        plan: What is to be written.
        model: The source as floats; it is used up, but for the modules of its head.
        samples: What is run through it.
        progress: Called before each matrix.
    """
    rounder = Rounder(plan, options, progress)
    tied = None if "lm_head" in model else _tied_moment(model, samples)
    pictures = [one.pixel_values for one in samples if one.pixel_values is not None]
    images = iter(see(rounder, model, pictures))
    embeds = [None if one.pixel_values is None else next(images) for one in samples]
    model.text_model.embed_tokens = embeddings = copy(model.text_model.embed_tokens)
    rounder.settle(EMBEDDINGS, embeddings, tied)
    states = [model.embed(one.input_ids, e) for one, e in zip(samples, embeds, strict=True)]
    hidden = read(rounder, model, states)
    if "lm_head" in model:
        rounder.settle("lm_head", copy(model.lm_head), moment_of(hidden))
    return rounder.done


def see(rounder: Rounder, model: Model, pictures: Sequence[mx.array]) -> list[mx.array]:
    """Image embeddings (N, I, D) of `pictures` (N, H, W, 3), encoder and connector rounded."""
    if not pictures:
        return []
    vision, connector = model.vision_model, model.connector
    states = [vision.embeddings(tile[None]) for one in pictures for tile in one]  # (1, P, V)
    layers, vision.encoder.layers = list(vision.encoder.layers), []
    states = rounder.stack("vision_model.encoder.layers", layers, states, lambda f, x: f(x))
    features = [vision.post_layernorm(state) for state in states]
    tiles = iter(rounder.module("connector", connector, features, lambda f, x: f(x)))
    return [mx.concatenate([next(tiles) for _ in one]) for one in pictures]


def read(rounder: Rounder, model: Model, states: list[mx.array]) -> list[mx.array]:
    """Last hidden states (1, L, D) of `inputs_embeds` (1, L, D) by the decoder rounded."""
    text = model.text_model
    layers, text.layers = list(text.layers), []

    def through(layer: Any, state: mx.array) -> mx.array:
        text.layers = [layer]
        with recorded(text.layers) as given:
            text(state)
        return given[0]

    states = rounder.stack("text_model.layers", layers, states, through)
    text.layers = []
    return [text(state) for state in states]


class Rounder:
    """What goes from matrix to matrix; `done` holds the packed arrays by path."""

    def __init__(self, plan: Plan, options: GptqOptions, progress: Progress) -> None:
        self._steps = {s.entry.path: s for s in plan.steps if s.entry.quantizable}
        self._dtype: mx.Dtype = getattr(mx, plan.config.dtype)
        self._options, self._progress = options, progress
        self._count = 0
        self.done: Learned = {}

    def stack(
        self, path: str, layers: list[Any], states: list[mx.array], through: Through
    ) -> list[mx.array]:
        """What the `layers` at `path` make of `states`, rounded one by one; they are used up."""
        mx.eval(states)
        for number in range(len(layers)):
            states = self.module(f"{path}.{number}", layers.pop(0), states, through)
            mx.clear_cache()
        return states

    def module(
        self, path: str, module: nn.Module, inputs: list[mx.array], through: Through
    ) -> list[mx.array]:
        """What the `module` at `path` makes of `inputs` after its matrices are rounded in order."""
        leaves = dict(module.named_modules())
        for full in [one for one in self._steps if one.startswith(f"{path}.")]:
            name, moment = full.removeprefix(f"{path}."), None
            if gains(self._steps[full]):
                moment = moment_of(_inputs_of(name, module, inputs, through))
            self.settle(full, leaves[name], moment)
        outputs = []
        for state in inputs:
            outputs.append(through(module, state))
            mx.eval(outputs[-1])
        return outputs

    def settle(self, path: str, module: nn.Module, moment: mx.array | None) -> None:
        """Round the weight of `module` as the plan says, to inputs of `moment` if it is given."""
        self._progress(self._count, len(self._steps), path)
        self._count += 1
        step = self._steps[path]
        if step.target is None:
            return
        rows, width = module.weight.shape
        padding = [(0, step.extra_rows), (0, step.extra_columns)]
        weight = mx.pad(module.weight.astype(self._dtype), padding)
        if moment is None or not gains(step):
            packed = pack(weight, step.target)
        else:
            moment = mx.pad(moment, [(0, step.extra_columns)] * 2)
            packed = compensate(weight, moment, step.target, self._dtype, self._options)
            self.done[path] = packed
        module.weight = Matrix(packed, step.target).rows(0, rows)[:, :width]
        mx.eval(module.weight)


def gains(step: Step) -> bool:
    """Whether the matrix of `step` is rounded so that it is worth the work."""
    target = step.target
    if target is None or target.mode != "affine" or target.bits >= COMPENSATED_BELOW_BITS:
        return False
    return {member.packed for member in step.members} != {target}


def moment_of(inputs: Iterable[mx.array]) -> mx.array:
    """The sum over tokens of x x' (width, width), of `inputs` (..., width)."""
    total = mx.array(0.0)
    for one in inputs:
        flat = one.reshape(-1, one.shape[-1]).astype(mx.float32)
        total = total + flat.T @ flat
        mx.eval(total)
    return total


def _inputs_of(
    name: str, module: nn.Module, inputs: list[mx.array], through: Through
) -> Iterator[mx.array]:
    """What the linear layer called `name` in `module` is given when that is given `inputs`.

    Nothing after it is computed, since nobody asks for it.
    """
    leaf = dict(module.named_modules())[name]
    watched = _Watched(leaf)
    module.update_modules(tree_unflatten([(name, watched)]))
    try:
        for state in inputs:
            through(module, state)
            yield watched.take()
    finally:
        module.update_modules(tree_unflatten([(name, leaf)]))


class _Watched(nn.Module):
    """A linear layer that notes what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._seen: list[mx.array] = []

    def take(self) -> mx.array:
        """What came last."""
        return self._seen.pop()

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        result: mx.array = self._layer(x)
        return result


def _tied_moment(model: Model, samples: Sequence[Sample]) -> mx.array:
    """The moment of what the float `model` gives its head, which is its embeddings as well."""
    embeds = (None if s.pixel_values is None else encode(model, s.pixel_values) for s in samples)
    pairs = zip(samples, embeds, strict=True)
    return moment_of(model.text_model(model.embed(one.input_ids, e)) for one, e in pairs)
