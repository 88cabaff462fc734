"""The whole network: vision encoder, connector and text decoder.

Shape letters, here and in the rest of the package: B batch, N tiles, H and W height and
width of a tile in pixels, P patches per tile, V width of the vision encoder, I tokens per
tile, L tokens, D width of the text decoder.

A forward pass never waits for the device: all counts and positions are computed on the host.
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

PREFILL_CHUNK = 512  # tokens; bounds the memory that a long prompt takes


class Model(nn.Module):
    """The network of one checkpoint.

    Attributes:
        prefill_chunk: Most tokens of a prompt that go through the decoder together.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image_token_id = config.image_token_id
        self.prefill_chunk = PREFILL_CHUNK
        self.vision_model = VisionModel(config.vision)
        self.connector = Connector(config)
        self.text_model = TextModel(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """Data type of the computations."""
        dtype: mx.Dtype = self.text_model.norm.weight.dtype
        return dtype

    def make_cache(self, options: CacheOptions = DEFAULT_OPTIONS) -> KVCache:
        """Return an empty cache; by default it keeps every token, in full precision."""
        return options.make_cache(len(self.text_model.layers))

    def encode(self, pixel_values: mx.array) -> mx.array:
        """Return the `image_embeds` (N, I, D) of `pixel_values` (N, H, W, 3), in one batch."""
        image_embeds: mx.array = self.connector(self.vision_model(pixel_values.astype(self.dtype)))
        return image_embeds

    def embed(self, input_ids: np.ndarray, image_embeds: mx.array | None = None) -> mx.array:
        """Embed a prompt, with image embeddings in place of the image placeholders.

        Args:
            input_ids: (L,), a NumPy array, since the host looks for the placeholders.
            image_embeds: (N, I, D) in the order of the placeholders; None without images.

        Returns:
            `inputs_embeds` (1, L, D).

        Raises:
            PromptError: The numbers of placeholders and of image embeddings differ.
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
        """Return the `logits` (B, L, vocabulary) of `inputs_embeds` (B, L, D)."""
        return self.head(self.text_model(inputs_embeds, cache))

    def head(self, hidden_states: mx.array) -> mx.array:
        """Return the `logits` (..., vocabulary) of `hidden_states` (..., D)."""
        if "lm_head" in self:
            logits: mx.array = self.lm_head(hidden_states)
        else:
            logits = self.text_model.embed_tokens.as_linear(hidden_states)
        return logits

    def step(self, token_id: mx.array, cache: KVCache) -> mx.array:
        """Feed `token_id` (1,) and return the `logits` (vocabulary,) of the next token."""
        embeds: mx.array = self.text_model.embed_tokens(token_id)[None]  # (1, 1, D)
        return self(embeds, cache)[0, -1]


def compile_encoder(model: Model) -> Callable[[mx.array], mx.array]:
    """Return `model.encode`, compiled with `mx.compile` where that is possible.

    Compilation fuses the biases of quantized layers into the kernels that follow them.

    The weights are passed as arguments. As constants of the compiled function, later changes of
    the weights would have no effect. As `inputs=` of `mx.compile`, they would remain placeholders
    if the first call is interrupted, since MLX does not restore them.

    Only one thread at a time may call the result: each thread compiles every shape itself, and
    while it does, the model's weights are placeholders.
    """
    if not model.vision_model.is_compilable:
        return model.encode
    lock = threading.Lock()

    def read_weights() -> dict[str, Any]:
        return {name: model[name].parameters() for name in ("vision_model", "connector")}

    def run(weights: dict[str, Any], pixel_values: mx.array) -> mx.array:
        original = read_weights()
        try:
            model.update(weights)
            return model.encode(pixel_values)
        finally:
            model.update(original)

    compiled = mx.compile(run)

    def encode(pixel_values: mx.array) -> mx.array:
        with lock:
            image_embeds: mx.array = compiled(read_weights(), pixel_values)
        return image_embeds

    return encode
