"""The losses of each stage, and the heads that they need beside the model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.model import Model
from mlx_smolvlm.train.batches import Batch, EncoderBatch
from mlx_smolvlm.train.clip_batches import ClipBatch
from mlx_smolvlm.train.encoder import dense_loss, label_head, word_loss
from mlx_smolvlm.train.grounding import hidden_states, referent_head, referent_loss
from mlx_smolvlm.train.motion import (
    BEFORE_LAYERS,
    FRAME_LAYERS,
    WAY_LAYERS,
    WORD_LAYERS,
    MotionHeads,
    SharedPrefix,
    layer_states,
    unit,
)

_DENSE_SHARE = 0.3  # of the dense loss, beside that of the answers
_LOOKUP_SHARE = 0.15  # of the loss of what a question's words refer to
_WORD_SHARE = 0.1  # of the loss that draws image embeddings to the words for what they show
_TOKEN_SHARE = 0.2  # of the loss of what the image tokens of a clip tell
_FRAME_SHARE = 0.2  # of the loss of what the frames of a clip show
_MOTION_SHARE = 0.1  # of the loss of what a question's words refer to in a clip


class Trainee(nn.Module):
    """The model with the heads that labels of patches, words and frames are read from."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Model(config)
        self.dense_head = label_head(config.vision)
        self.referent_head = referent_head(config.text.hidden_size)
        self.motion_head = MotionHeads(config.text.hidden_size)


def encoder_loss(trainee: Trainee, data: EncoderBatch) -> mx.array:
    """Loss of the dense labels."""
    features = trainee.model.vision_model(mx.array(data.pixel_values))
    return dense_loss(trainee.dense_head(features), mx.array(data.labels))


def answer_loss(trainee: Trainee, data: Batch) -> mx.array:
    """Loss of the answers' tokens, with a share of that of the dense labels."""
    model = trainee.model
    features = model.vision_model(mx.array(data.pixel_values))  # (N, P, V)
    logits = trainee.dense_head(features[mx.array(data.global_tiles)])
    dense = dense_loss(logits, mx.array(data.labels))
    image_embeds = model.connector(features)  # (N, I, D)
    named = image_embeds[mx.array(data.global_tiles)]
    words = word_loss(model.text_model.embed_tokens, named, mx.array(data.labels), data.words)
    placed = image_embeds[mx.array(data.tile_order)]
    embeds = model.embed(data.input_ids.reshape(-1), placed)
    middle, hidden = hidden_states(model.text_model, embeds.reshape(*data.input_ids.shape, -1))
    meant = mx.array(data.referents)
    referring = middle.reshape(data.input_ids.size, -1)[meant[:, 0]]  # (S, D)
    lookup = referent_loss(trainee.referent_head, referring, meant[:, 1:])
    hidden = hidden.reshape(data.input_ids.size, -1)[mx.array(data.places)]  # (T, D)
    losses = nn.losses.cross_entropy(model.head(hidden), mx.array(data.targets))
    return (
        (losses * mx.array(data.weights)).sum()
        + _DENSE_SHARE * dense
        + _WORD_SHARE * words
        + _LOOKUP_SHARE * lookup
    )


def clip_loss(trainee: Trainee, data: ClipBatch) -> mx.array:
    """Loss of the answers about clips, with shares of those of what clips show."""
    model, text_model, heads = trainee.model, trainee.model.text_model, trainee.motion_head
    features = model.vision_model(mx.array(data.pixel_values))
    dense = dense_loss(trainee.dense_head(features), mx.array(data.labels))
    embeds = model.embed(data.prefix_ids.reshape(-1), model.connector(features))
    cache = SharedPrefix(len(text_model.layers))
    states = layer_states(text_model, embeds.reshape(*data.prefix_ids.shape, -1), cache)

    def read(layers: int, places: np.ndarray) -> mx.array:
        """States (S, D) at flat `places` after `layers` layers."""
        state = states[layers - 1]
        return unit(state.reshape(-1, state.shape[-1])[mx.array(places)])

    tokens = heads.token_loss(
        read(BEFORE_LAYERS, data.image_places),
        read(WAY_LAYERS, data.image_places),
        mx.array(data.token_labels),
    )
    frames = heads.frame_loss(read(FRAME_LAYERS, data.closings), mx.array(data.frame_labels))
    cache.repeats = len(data.row_ids) // len(data.prefix_ids)
    states = layer_states(text_model, text_model.embed_tokens(mx.array(data.row_ids)), cache)
    words = heads.word_loss(read(WORD_LAYERS, data.words[:, 0]), mx.array(data.words[:, 1:]))
    hidden = states[-1].reshape(data.row_ids.size, -1)[mx.array(data.places)]  # (T, D)
    losses = nn.losses.cross_entropy(model.head(hidden), mx.array(data.targets))
    return (
        (losses * mx.array(data.weights)).sum()
        + _DENSE_SHARE * dense
        + _TOKEN_SHARE * tokens
        + _FRAME_SHARE * frames
        + _MOTION_SHARE * words
    )


def mixed_loss(trainee: Trainee, data: tuple[Batch, ClipBatch]) -> mx.array:
    """Losses of pictures and of clips."""
    pictures, clips = data
    return answer_loss(trainee, pictures) + clip_loss(trainee, clips)
