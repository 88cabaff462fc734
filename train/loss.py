"""The training loss: the cross-entropy of answer tokens, and gradient checkpointing.

The decoder runs as in a prefill, causal and without a cache. The head runs only at places whose
next token is a target: logits (B, L, vocabulary) of all places would take most of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.generate.sampling import cross_entropy
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.text import DecoderLayer
from mlx_smolvlm.model.vision import VisionLayer


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the tiles they refer to; shape letters as in model/model.py.

    Attributes:
        input_ids: int32 (B, L), padded with 0 at the end of each row.
        places: int32 (T,), indices into the flattened `input_ids` of the tokens before the targets.
        targets: int32 (T,), the tokens to predict.
        pixel_values: float32 (N, H, W, 3), the tiles in the order of their placeholders; None if
            the batch has `image_embeds` or no tiles.
        image_embeds: (N, I, D), the encoded tiles; None if the batch has `pixel_values` or no
            tiles.
        seed: Seeds dropout if layers are checkpointed.
    """

    input_ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    pixel_values: np.ndarray | None
    image_embeds: mx.array | None
    seed: int


def answer_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the summed cross-entropy of the targets and their count, both float32 ()."""
    hidden = compute_hidden_states(model, batch)  # (B, L, D)
    logits = model.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.places)])
    losses = cross_entropy(logits, mx.array(batch.targets))
    return losses.sum(), mx.array(float(batch.targets.size))


def compute_hidden_states(model: Model, batch: Batch) -> mx.array:
    """Return the decoder's hidden states (B, L, D) for `batch`."""
    b, length = batch.input_ids.shape
    image_embeds = batch.image_embeds
    if batch.pixel_values is not None:
        image_embeds = model.encode(mx.array(batch.pixel_values))
    embeds = model.embed(batch.input_ids.reshape(-1), image_embeds)  # (1, B*L, D)
    states: mx.array = model.text_model(embeds.reshape(b, length, -1))
    return states


def checkpointed_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the same as `answer_loss`, with gradient checkpointing of each layer."""
    with checkpoint_layers(batch.seed):
        return answer_loss(model, batch)


@contextmanager
def checkpoint_layers(seed: int | None = None) -> Iterator[None]:
    """Checkpoint gradients inside the context: the backward pass recomputes each layer.

    Layers of the decoder and the encoder keep only their inputs for the backward pass. Not safe
    with threads: the layer classes are changed.

    Args:
        seed: Each call of a layer seeds MLX's random numbers with a number that depends on it, so
            that dropout drops the same values when the layer is recomputed. None is for models
            without dropout and leaves the random state alone.
    """
    kinds: tuple[Any, ...] = (DecoderLayer, VisionLayer)
    originals = [kind.__call__ for kind in kinds]
    count = 0

    def wrap(original: Any) -> Any:
        def call(layer: nn.Module, *inputs: Any) -> mx.array:
            nonlocal count
            count += 1
            call_seed = None if seed is None else (seed * 1009 + count) % 2**63

            def run(*again: Any) -> mx.array:
                if call_seed is not None:
                    mx.random.seed(call_seed)
                states: mx.array = original(layer, *again)
                return states

            states: mx.array = nn.utils.checkpoint(layer, run)(*inputs)
            return states

        return call

    try:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = wrap(original)
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original
