"""The losses of the training stages, and the auxiliary heads that they need."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from demo_recipe.batches import PLACE_BINS, EncoderBatch, PictureBatch
from demo_recipe.clip_batches import ClipBatch
from demo_recipe.labels import dense_loss, make_label_head
from demo_recipe.motion import (
    BEFORE_LAYERS,
    FRAME_LAYERS,
    WAY_LAYERS,
    WORD_LAYERS,
    MotionHeads,
    normalize_states,
)
from demo_recipe.prefix import SharedPrefix, layer_states
from mlx_smolvlm.config import Config, ImageConfig
from mlx_smolvlm.media.tiles import compute_scale_and_shift
from mlx_smolvlm.model.model import Model

_DENSE_SHARE = 0.1  # of the dense loss, beside that of the answers
_POINTER_SHARE = 0.25  # of the loss of where words look, in each of two layers
_PRINT_SHARE = 0.3  # of the dense loss of tiles beside conversations
_TOKEN_SHARE = 0.2  # of the loss of what the image tokens of a clip tell
_FRAME_SHARE = 0.2  # of the loss of what the frames of a clip show
_PLACE_SHARE = 0.1  # of the loss of places and sizes that words tell
PLACE_LAYERS = 3  # after which words tell them
_MOTION_SHARE = 0.1  # of the loss of what a question's words refer to in a clip


class Trainee(nn.Module):
    """The model, and auxiliary heads that predict labels of patches, words and frames."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model, self.image = Model(config), config.image
        self.dense_head = make_label_head(config.vision)
        self.motion_head = MotionHeads(config.text.hidden_size)
        self.place_head = nn.Linear(config.text.hidden_size, 4 * PLACE_BINS)

    def encode(self, pixels: np.ndarray) -> mx.array:
        """Return the encoder's features (N, P, V) of uint8 tiles (N, H, W, 3)."""
        return self.model.vision_model(normalize_pixels(pixels, self.image))


def normalize_pixels(pixels: np.ndarray, image: ImageConfig) -> mx.array:
    """Normalize uint8 `pixels` to `pixel_values`, float32 (N, H, W, 3), as the package does."""
    scale, shift = map(mx.array, compute_scale_and_shift(image))
    return mx.array(pixels).astype(mx.float32) * scale + shift


def encoder_loss(trainee: Trainee, data: EncoderBatch) -> mx.array:
    """Return the loss of the dense labels."""
    features = trainee.encode(data.pixels)
    logits = trainee.dense_head(features)
    return dense_loss(logits, mx.array(data.labels), mx.array(data.extents))


def answer_loss(trainee: Trainee, data: PictureBatch) -> mx.array:
    """Return the loss of the answers, plus weighted losses of labels, attention and places."""
    model, text_model = trainee.model, trainee.model.text_model
    dense, image_embeds = mx.array(0.0), None
    if data.shown is not None:
        features = trainee.encode(data.shown.pixels)  # (N, P, V)
        labels = mx.array(data.shown.labels), mx.array(data.shown.extents)
        dense = dense_loss(trainee.dense_head(features), *labels)
        image_embeds = model.connector(features)  # (N, I, D)
    embeds = model.embed(data.prefix_ids.reshape(-1), image_embeds)
    cache = SharedPrefix(len(text_model.layers))
    layer_states(text_model, embeds.reshape(*data.prefix_ids.shape, -1), cache)
    answers, pointing, states = row_losses(trainee, data, cache)
    places = place_loss(trainee, states[PLACE_LAYERS - 1], data.named)
    total = answers + _DENSE_SHARE * dense + _POINTER_SHARE * pointing
    return total + _PLACE_SHARE * places


def place_loss(trainee: Trainee, states: mx.array, named: np.ndarray) -> mx.array:
    """Return the loss of places and sizes, `named` (S, 5), predicted from states (B, M, D)."""
    if not len(named):
        return mx.array(0.0)
    read = normalize_states(states.reshape(-1, states.shape[-1])[mx.array(named[:, 0])])
    logits = trainee.place_head(read).reshape(-1, 4, PLACE_BINS)
    losses = nn.losses.cross_entropy(logits, mx.array(named[:, 1:]))
    return losses.mean(0).sum()


def row_losses(
    trainee: Trainee, data: PictureBatch | ClipBatch, cache: SharedPrefix
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Return the losses of the answers and of the attention, and the rows' states by layer."""
    model, text_model = trainee.model, trainee.model.text_model
    cache.repeats = len(data.row_ids) // len(data.prefix_ids)
    cache.pointers = data.pointers
    states = layer_states(text_model, text_model.embed_tokens(mx.array(data.row_ids)), cache)
    hidden = states[-1].reshape(data.row_ids.size, -1)[mx.array(data.places)]  # (T, D)
    losses = nn.losses.cross_entropy(model.head(hidden), mx.array(data.targets))
    pointing = sum(cache.losses, mx.array(0.0))
    return (losses * mx.array(data.weights)).sum(), pointing, states


def clip_loss(trainee: Trainee, data: ClipBatch) -> mx.array:
    """Return the loss of answers about clips, plus weighted losses of the auxiliary heads."""
    model, text_model, heads = trainee.model, trainee.model.text_model, trainee.motion_head
    features = trainee.encode(data.pixels)
    labels = mx.array(data.labels), mx.array(data.extents)
    dense = dense_loss(trainee.dense_head(features), *labels)
    embeds = model.embed(data.prefix_ids.reshape(-1), model.connector(features))
    cache = SharedPrefix(len(text_model.layers))
    states = layer_states(text_model, embeds.reshape(*data.prefix_ids.shape, -1), cache)

    def read(layers: int, places: np.ndarray) -> mx.array:
        """States (S, D) at flat `places` after `layers` layers."""
        state = states[layers - 1]
        return normalize_states(state.reshape(-1, state.shape[-1])[mx.array(places)])

    tokens = heads.token_loss(
        read(BEFORE_LAYERS, data.image_places),
        read(WAY_LAYERS, data.image_places),
        mx.array(data.token_labels),
    )
    frames = heads.frame_loss(read(FRAME_LAYERS, data.closings), mx.array(data.frame_labels))
    answers, pointing, states = row_losses(trainee, data, cache)
    words = heads.word_loss(read(WORD_LAYERS, data.words[:, 0]), mx.array(data.words[:, 1:]))
    return (
        answers
        + _POINTER_SHARE * pointing
        + _DENSE_SHARE * dense
        + _TOKEN_SHARE * tokens
        + _FRAME_SHARE * frames
        + _MOTION_SHARE * words
    )


@dataclass(frozen=True)
class PairedBatch:
    """A batch of conversations, and tiles that train only the dense labels."""

    talk: PictureBatch | ClipBatch
    tiles: EncoderBatch


def step_loss(trainee: Trainee, data: PictureBatch | ClipBatch | PairedBatch) -> mx.array:
    """Return the loss of a batch of any kind."""
    if isinstance(data, PairedBatch):
        more = encoder_loss(trainee, data.tiles)
        return step_loss(trainee, data.talk) + _PRINT_SHARE * more
    return (
        answer_loss(trainee, data) if isinstance(data, PictureBatch) else clip_loss(trainee, data)
    )
