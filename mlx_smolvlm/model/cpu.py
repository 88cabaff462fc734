"""The network in NumPy, for Linux.

MLX's CPU backend there computes exponentials one number at a time and on one core, multiplies
by packed matrices at 2 GFLOP/s, and runs 4,300 graph nodes per token. NumPy has vectorized
exponentials and OpenBLAS, and works in place on small buffers (docs/decisions/cpu.md).

The classes here take and return MLX arrays, as the ones that they replace. Weights are not
copied: NumPy reads the memory of MLX's arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache, Mask
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.products import (
    Function,
    as_numpy,
    bind_linear,
    multiply,
    multiply_packed,
    split_rows,
)
from mlx_smolvlm.model.text import DecoderLayer, Placement, TextModel
from mlx_smolvlm.model.vision import VisionLayer, VisionModel

Attend = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Maps the index of a layer, the queries (B, heads, L, head_dim) of new tokens and their keys and
values (B, 2*kv_heads, L, head_dim) to their attention (B, L, heads*head_dim)."""


def compute_in_numpy(model: Model) -> None:
    """Make `model`, whose type is float32, compute in NumPy.

    Its parameters keep their names and arrays. The model has no gradients any more, and later
    changes of its weights have no effect.
    """
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding = NumpyLinear(embeddings.patch_embedding)
    model.vision_model = NumpyVisionModel(model.vision_model)
    projection = model.connector.modality_projection
    projection.proj = NumpyLinear(projection.proj)
    model.text_model = NumpyTextModel(model.text_model)
    if "lm_head" in model:
        model.lm_head = NumpyLinear(model.lm_head)
    elif type(model.text_model.embed_tokens) is nn.Embedding:
        model.text_model.embed_tokens = NumpyEmbedding(model.text_model.embed_tokens)
    elif isinstance(model.text_model.embed_tokens, nn.QuantizedEmbedding):
        model.text_model.embed_tokens = NumpyPackedEmbedding(  # type: ignore[assignment]
            model.text_model.embed_tokens
        )


class NumpyLinear(nn.Linear):
    """A linear layer; `source` may be quantized."""

    def __init__(self, source: nn.Module) -> None:
        nn.Module.__init__(self)
        dict.update(self, source)
        self._multiply = bind_linear(source)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the product (..., other width) of `x` (..., width)."""
        return mx.array(self._multiply(as_numpy(x)))


class NumpyEmbedding(nn.Embedding):
    """Embeddings of tokens that are also the output head."""

    def __init__(self, source: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.weight = source.weight

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits (..., vocabulary) of `x` (..., D)."""
        return mx.array(multiply(as_numpy(self.weight).T, None, as_numpy(x)))


class NumpyPackedEmbedding(nn.QuantizedEmbedding):
    """Packed embeddings of tokens that are also the output head."""

    def __init__(self, source: nn.QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        dict.update(self, source)
        self.group_size, self.bits, self.mode = source.group_size, source.bits, source.mode

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits (..., vocabulary) of `x` (..., D)."""
        return mx.array(multiply_packed(self, as_numpy(x)))


class NumpyVisionModel(VisionModel):
    """A vision encoder that computes one tile after the other."""

    is_compilable = False

    def __init__(self, source: VisionModel) -> None:
        nn.Module.__init__(self)
        self.embeddings, self.encoder = source.embeddings, source.encoder
        self.post_layernorm = source.post_layernorm
        self._layers = tuple(EncoderLayer(layer) for layer in source.encoder.layers)
        self._normalize = bind_layer_norm(source.post_layernorm)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Return the `patch_features` (N, P, V) of `pixel_values` (N, H, W, 3)."""
        tiles = np.array(self.embeddings(pixel_values))  # (N, P, V), modified in place
        with np.errstate(over="ignore"):
            for x in tiles:
                for layer in self._layers:
                    layer.add_to(x)
                x[:] = self._normalize(x)
        return mx.array(tiles)


class EncoderLayer:
    """A layer of the vision encoder."""

    def __init__(self, layer: VisionLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.scale = attention.heads, np.float32(attention.scale)
        self.norm1 = bind_layer_norm(layer.layer_norm1)
        self.norm2 = bind_layer_norm(layer.layer_norm2)
        self.qkv_proj = bind_linear(attention.qkv_proj)
        self.out_proj = bind_linear(attention.out_proj)
        self.fc1, self.fc2 = bind_linear(mlp.fc1), bind_linear(mlp.fc2)

    def add_to(self, x: np.ndarray) -> None:
        """Apply the layer to `x` (P, V), in place."""
        x += self.out_proj(self.attend(self.qkv_proj(self.norm1(x))))
        x += self.fc2(apply_gelu_tanh(self.fc1(self.norm2(x))))

    def attend(self, qkv: np.ndarray) -> np.ndarray:
        """Return the attention (P, V) among the patches of `qkv` (P, 3*V), which is modified."""
        patches, width = qkv.shape[0], qkv.shape[1] // 3
        split = qkv.reshape(patches, 3, self.heads, width // self.heads).transpose(1, 2, 0, 3)
        split[0] *= self.scale
        output = np.empty((patches, self.heads, width // self.heads), np.float32)
        for head in range(self.heads):
            queries, keys, values = split[:, head]  # (P, V/heads) each
            for rows in split_rows(patches, patches):
                output[rows, head] = weight_values(queries[rows] @ keys.T, values)
        return output.reshape(patches, width)


class NumpyTextModel(TextModel):
    """The decoder without its output head."""

    def __init__(self, source: TextModel) -> None:
        nn.Module.__init__(self)
        self.embed_tokens, self.layers, self.norm = source.embed_tokens, source.layers, source.norm
        self.rotary_rows, self.value_rows = source.rotary_rows, source.value_rows
        self._layers = tuple(NumpyDecoderLayer(layer) for layer in source.layers)
        self._normalize = bind_rms_norm(source.norm)
        attention = source.layers[0].self_attn
        exponents = np.arange(0, attention.head_dim, 2, dtype=np.float32) / attention.head_dim
        self._frequencies = 1 / np.float32(attention.theta) ** exponents

    def __call__(
        self,
        inputs_embeds: mx.array,
        cache: KVCache | None = None,
        placement: Placement | None = None,
    ) -> mx.array:
        """Return the normalized hidden states (B, L, D) of `inputs_embeds` (B, L, D).

        Arguments are as in `TextModel`.
        """
        length = inputs_embeds.shape[1]
        start = 0 if cache is None else cache.offset
        positions = np.arange(start, start + length) if placement is None else placement.positions
        angles = positions.astype(np.float32)[..., None, None] * self._frequencies
        rotation = np.cos(angles), np.sin(angles)  # (L, 1, head_dim/2) each
        attend = choose_attention(cache, None if placement is None else placement.mask)
        x = np.array(inputs_embeds)  # modified in place
        with np.errstate(over="ignore"):
            for number, layer in enumerate(self._layers):
                layer.add_to(x, rotation, partial(attend, number))
            if cache is not None:
                cache.advance(length)
            return mx.array(self._normalize(x))


class NumpyDecoderLayer:
    """A layer of the decoder."""

    def __init__(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim = attention.head_dim
        self.norm1 = bind_rms_norm(layer.input_layernorm)
        self.norm2 = bind_rms_norm(layer.post_attention_layernorm)
        self.qkv_proj, self.o_proj = bind_linear(attention.qkv_proj), bind_linear(attention.o_proj)
        self.gate_up_proj = bind_linear(mlp.gate_up_proj)
        self.down_proj = bind_linear(mlp.down_proj)

    def add_to(
        self,
        x: np.ndarray,
        rotation: tuple[np.ndarray, np.ndarray],
        attend: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        """Apply the layer to `x` (B, L, D), in place."""
        qkv = self.qkv_proj(self.norm1(x)).reshape(*x.shape[:2], -1, self.head_dim)
        rotate(qkv[:, :, : self.heads + self.kv_heads], *rotation)
        qkv = qkv.transpose(0, 2, 1, 3)  # (B, heads + 2*kv_heads, L, head_dim)
        x += self.o_proj(attend(qkv[:, : self.heads], qkv[:, self.heads :]))
        x += self.down_proj(apply_swiglu(self.gate_up_proj(self.norm2(x))))


def choose_attention(cache: KVCache | None, mask: mx.array | None) -> Attend:
    """Return the function that stores new tokens in `cache` and computes their attention.

    Args:
        cache: The cache; None if the new tokens are all tokens.
        mask: bool (L, offset + L), True where a new token sees another; None for causal
            attention.
    """
    is_known = type(cache) in (KVCache, BatchedKVCache)
    if cache is not None and not (is_known and cache.storage is FLOAT_STORAGE):
        return partial(attend_in_mlx, cache, mask)
    penalties = None if mask is None else np.where(as_numpy(mask), np.float32(0), -np.inf)
    if isinstance(cache, BatchedKVCache):
        assert penalties is not None
        return partial(attend_to_rows, cache, penalties)

    def attend(layer: int, queries: np.ndarray, keys_values: np.ndarray) -> np.ndarray:
        stored = keys_values if cache is None else cache.append(layer, keys_values)
        return attend_to_tokens(queries, stored, penalties)

    return attend


def attend_in_mlx(
    cache: KVCache, mask: mx.array | None, layer: int, queries: np.ndarray, keys_values: np.ndarray
) -> np.ndarray:
    """Return `cache.attend(...)` as an `Attend` function does."""
    b, heads, length, width = queries.shape
    sees: Mask = "causal" if mask is None and length > 1 else mask
    output = cache.attend(layer, mx.array(queries), mx.array(keys_values), sees)
    return as_numpy(output.swapaxes(1, 2)).reshape(b, length, heads * width)


def attend_to_tokens(
    queries: np.ndarray, stored: np.ndarray, penalties: np.ndarray | None
) -> np.ndarray:
    """Return the attention (B, L, heads*head_dim) of the last L tokens.

    Args:
        queries: (B, heads, L, head_dim).
        stored: Keys and values of all tokens, (B, 2*kv_heads, tokens, head_dim).
        penalties: Added to the scores, (L, tokens); None for causal attention.
    """
    b, heads, length, width = queries.shape
    kv_heads, tokens = stored.shape[1] // 2, stored.shape[2]
    queries = queries.reshape(b, kv_heads, heads // kv_heads, length, width) * width**-0.5
    keys, values = stored[:, :kv_heads, None], stored[:, kv_heads:, None]
    output = np.empty((b, length, kv_heads, heads // kv_heads, width), np.float32)
    target = output.transpose(0, 2, 3, 1, 4)  # (B, kv_heads, share, L, head_dim)
    for rows in split_rows(length, b * heads * tokens):
        end = tokens if penalties is not None else tokens - length + rows.stop
        scores = queries[..., rows, :] @ keys[..., :end, :].swapaxes(-1, -2)
        if penalties is not None:
            scores += penalties[rows]
        elif length > 1:
            count = rows.stop - rows.start
            scores[..., end - count :] += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        target[..., rows, :] = weight_values(scores, values[..., :end, :])
    return output.reshape(b, length, heads * width)


def attend_to_rows(
    cache: BatchedKVCache,
    penalties: np.ndarray,
    layer: int,
    queries: np.ndarray,
    keys_values: np.ndarray,
) -> np.ndarray:
    """Return the attention (1, B, heads*head_dim) of a token of each row of `cache`.

    Args:
        cache: The cache, in which the tokens are stored.
        penalties: Added to the scores, (B, 1, 1, tokens).
        layer: Index of the layer.
        queries: (1, heads, B, head_dim).
        keys_values: (1, 2*kv_heads, B, head_dim).
    """
    _, heads, rows, width = queries.shape
    stored = cache.append(layer, keys_values)  # (B, kv_heads, 2, tokens, head_dim)
    grouped = queries[0].reshape(stored.shape[1], -1, rows, width) * width**-0.5
    # Products with the keys on the left, (B, kv_heads, tokens, share), are twice as fast.
    products = stored[:, :, 0] @ grouped.transpose(2, 0, 3, 1)
    scores = np.add(products.swapaxes(-1, -2), penalties, order="C")
    return weight_values(scores, stored[:, :, 1]).reshape(1, rows, heads * width)


def weight_values(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return softmax(scores) @ values; `scores` (..., rows, tokens) is modified."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    output: np.ndarray = scores @ values
    output /= scores.sum(-1, keepdims=True)
    return output


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> None:
    """Rotate `x` (B, L, heads, head_dim) in place, by angles of shape (L, 1, head_dim/2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = first * sines
    first *= cosines
    first -= second * sines
    second *= cosines
    second += turned


def apply_gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Apply the tanh approximation of GELU to `x` (rows, width), in place, and return it."""
    for rows in split_rows(len(x), x.shape[1]):
        part = x[rows]
        exponent = part * part
        exponent *= -0.07135481627260025
        exponent -= 1.5957691216057308
        exponent *= part
        np.exp(exponent, out=exponent)
        exponent += 1
        part /= exponent
    return x


def apply_swiglu(gate_up: np.ndarray) -> np.ndarray:
    """Return silu(gate) * up of `gate_up` (B, L, 2*width), which is modified."""
    x = gate_up.reshape(-1, gate_up.shape[-1])
    width = x.shape[1] // 2
    for rows in split_rows(len(x), width):
        gate, up = x[rows, :width], x[rows, width:]
        up *= gate
        exponent = np.negative(gate, out=gate)
        np.exp(exponent, out=exponent)
        exponent += 1
        up /= exponent
    return gate_up[..., width:]


def bind_layer_norm(norm: nn.LayerNorm) -> Function:
    """Return the function that `norm` computes."""
    weight, bias, eps = as_numpy(norm.weight), as_numpy(norm.bias), norm.eps

    def normalize(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x *= 1 / np.sqrt(mean_square(x) + np.float32(eps))
        x *= weight
        x += bias
        return x

    return normalize


def bind_rms_norm(norm: nn.RMSNorm) -> Function:
    """Return the function that `norm` computes."""
    weight, eps = as_numpy(norm.weight), norm.eps

    def normalize(x: np.ndarray) -> np.ndarray:
        x = x * (1 / np.sqrt(mean_square(x) + np.float32(eps)))
        x *= weight
        return x

    return normalize


def mean_square(x: np.ndarray) -> np.ndarray:
    """Return the mean of the squares of `x` (..., width), (..., 1)."""
    sums: np.ndarray = np.einsum("...i,...i->...", x, x)
    return sums[..., None] / np.float32(x.shape[-1])
