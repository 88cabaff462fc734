"""The loss of answers: how unlikely the model finds their tokens, each seeing only those before it.

The decoder is run as it prefills, causal and without a cache, and the head only where a token is
to be predicted: logits of every place would take most of the memory.
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
    """Rows of tokens, and what they show. Letters as in `mlx_smolvlm/model.py`.

    Attributes:
        input_ids: int32 (B, L), filled up with 0 behind each row.
        places: Flat places int32 (T,) in (B, L) whose next token is to be predicted.
        targets: Those tokens, int32 (T,).
        pixel_values: float32 (N, H, W, 3), tiles in the order of the placeholders; None if they
            are encoded already, or there are none.
        image_embeds: (N, I, D) of those that are encoded already; None if none is.
        seed: What its dropout follows from where layers are computed twice.
    """

    input_ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    pixel_values: np.ndarray | None
    image_embeds: mx.array | None
    seed: int


def answer_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropies of the targets, float32, and how many they are."""
    hidden = compute_hidden_states(model, batch)  # (B, L, D)
    logits = model.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.places)])
    losses = cross_entropy(logits, mx.array(batch.targets))
    return losses.sum(), mx.array(float(batch.targets.size))


def compute_hidden_states(model: Model, batch: Batch) -> mx.array:
    """Hidden states (B, L, D) of every place of `batch`."""
    b, length = batch.input_ids.shape
    image_embeds = batch.image_embeds
    if batch.pixel_values is not None:
        image_embeds = model.encode(mx.array(batch.pixel_values))
    embeds = model.embed(batch.input_ids.reshape(-1), image_embeds)  # (1, B*L, D)
    states: mx.array = model.text_model(embeds.reshape(b, length, -1))
    return states


def checkpointed_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """The same as `answer_loss`; for the gradient, layers are computed a second time."""
    with checkpoint_layers(batch.seed):
        return answer_loss(model, batch)


@contextmanager
def checkpoint_layers(seed: int | None = None) -> Iterator[None]:
    """Within it, layers keep only their inputs for the gradient, and are computed again.

    Args:
        seed: Each call of a layer seeds MLX's random numbers with a number that follows from
            this one, so that dropout drops the same values the second time. None for models
            without dropout: the random state is left alone.
    """
    kinds: tuple[Any, ...] = (DecoderLayer, VisionLayer)
    originals = [kind.__call__ for kind in kinds]
    count = 0

    def wrapped(original: Any) -> Any:
        def call(layer: nn.Module, *inputs: Any) -> mx.array:
            nonlocal count
            count += 1
            own = None if seed is None else (seed * 1009 + count) % 2**63

            def run(*again: Any) -> mx.array:
                if own is not None:
                    mx.random.seed(own)
                states: mx.array = original(layer, *again)
                return states

            states: mx.array = nn.utils.checkpoint(layer, run)(*inputs)
            return states

        return call

    try:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = wrapped(original)
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original


LOSSES = {False: answer_loss, True: checkpointed_loss}
