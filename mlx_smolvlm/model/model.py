"""Vision encoder, connector and decoder joined.

Letters in shapes: B batch, N tiles, H and W a tile's pixels, P patches of a tile,
V vision width, I tokens of a tile, L prompt length, D text width.

A forward pass here never waits for the device: what needs a count is known on
the host beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.kv.options import DEFAULT_OPTIONS, CacheOptions
from mlx_smolvlm.model.connector import Connector
from mlx_smolvlm.model.text import TextModel
from mlx_smolvlm.model.vision import VisionModel


class Model(nn.Module):
    """The network of one checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image_token_id = config.image_token_id
        self.vision_model = VisionModel(config.vision)
        self.connector = Connector(config)
        self.text_model = TextModel(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """Type that the network computes in."""
        dtype: mx.Dtype = self.text_model.norm.weight.dtype
        return dtype

    def make_cache(self, options: CacheOptions = DEFAULT_OPTIONS) -> KVCache:
        """An empty cache for one conversation; by default of every token, unpacked."""
        return options.make_cache(len(self.text_model.layers))

    def encode(self, pixel_values: mx.array) -> mx.array:
        """`image_embeds` (N, I, D) of `pixel_values` (N, H, W, 3), all tiles at once."""
        image_embeds: mx.array = self.connector(self.vision_model(pixel_values.astype(self.dtype)))
        return image_embeds

    def embed(self, input_ids: np.ndarray, image_embeds: mx.array | None = None) -> mx.array:
        """`inputs_embeds` (1, L, D) of `input_ids` (L,), with images at their placeholders.

        Args:
            input_ids: On the host, since the placeholders are found there.
            image_embeds: (N, I, D) in the order of the placeholders; None without images.

        Raises:
            PromptError: The placeholders are not as many as the image embeddings.
        """
        embeds: mx.array = self.text_model.embed_tokens(mx.array(input_ids))  # (L, D)
        places = np.flatnonzero(input_ids == self.image_token_id)
        count = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        if count != places.size:
            raise PromptError(
                f"the prompt has {places.size} image placeholders, "
                f"and the pictures have {count} embeddings"
            )
        if image_embeds is not None:
            embeds[mx.array(places)] = image_embeds.reshape(count, -1).astype(embeds.dtype)
        return embeds[None]

    def __call__(self, inputs_embeds: mx.array, cache: KVCache | None = None) -> mx.array:
        """`logits` (B, L, vocabulary) of every position of `inputs_embeds` (B, L, D)."""
        return self.head(self.text_model(inputs_embeds, cache))

    def head(self, hidden_states: mx.array) -> mx.array:
        """`logits` of `hidden_states` (..., D)."""
        if "lm_head" in self:
            logits: mx.array = self.lm_head(hidden_states)
        else:
            logits = self.text_model.embed_tokens.as_linear(hidden_states)
        return logits

    def step(self, token_id: mx.array, cache: KVCache) -> mx.array:
        """`logits` (vocabulary,) after the one token `token_id` (1,)."""
        embeds: mx.array = self.text_model.embed_tokens(token_id)[None]  # (1, 1, D)
        return self(embeds, cache)[0, -1]


def compile_encoder(model: Model) -> Callable[[mx.array], mx.array]:
    """`model.encode`, compiled: a quantized layer's biases join the kernels that follow them.

    The weights are arguments of what is compiled. As constants they would stay what they are at
    the first call; as `inputs=` of `mx.compile` they would stay placeholders if a first call is
    interrupted, since MLX does not put those back.

    One thread at a time: while a shape is compiled, which every thread does by itself, the
    model's weights are placeholders.
    """
    lock = threading.Lock()

    def weights() -> dict[str, Any]:
        return {name: model[name].parameters() for name in ("vision_model", "connector")}

    def run(given: dict[str, Any], pixel_values: mx.array) -> mx.array:
        own = weights()
        try:
            model.update(given)
            return model.encode(pixel_values)
        finally:
            model.update(own)

    compiled = mx.compile(run)

    def encode(pixel_values: mx.array) -> mx.array:
        with lock:
            image_embeds: mx.array = compiled(weights(), pixel_values)
        return image_embeds

    return encode
