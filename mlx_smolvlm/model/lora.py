"""Low-rank adapters: layers that add a small trainable product to a matrix that stays as it is.

Letters: R rank. The product `lora_a` @ `lora_b` is initially zero, since `lora_b` is. The layers
equal those of mlx-lm (docs/decisions/dependencies.md says why they are our own).

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """A linear layer plus scale * (x @ lora_a) @ lora_b.

    Args:
        linear: The layer, which may be quantized.
        rank: Width of the product.
        scale: Factor of the product.
        dropout: Dropout probability of the product's inputs in training.
    """

    def __init__(
        self, linear: nn.Linear | nn.QuantizedLinear, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        outputs = linear.weight.shape[0]
        inputs = count_columns(linear)
        self.linear = linear
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.lora_a = _draw_matrix(inputs, rank)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        product = (self.dropout(x) @ self.lora_a) @ self.lora_b  # (..., R), (..., outputs)
        return self.linear(x) + (self.scale * product).astype(x.dtype)

    def fuse(self) -> nn.Linear:
        """Return a linear layer of floats that computes the same, without dropout."""
        weight = unpack(self.linear, self.lora_b.dtype)
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in self.linear)
        fused.weight = weight + ((self.scale * self.lora_b.T) @ self.lora_a.T).astype(weight.dtype)
        if "bias" in self.linear:
            fused.bias = self.linear.bias
        return fused


class LoRAEmbedding(nn.Module):
    """An embedding plus scale * lora_a @ lora_b, for ids and as the output head.

    Args:
        embedding: The layer, which may be quantized.
        rank: Width of the product.
        scale: Factor of the product.
        dropout: Dropout probability of the product in training.
    """

    def __init__(
        self,
        embedding: nn.Embedding | nn.QuantizedEmbedding,
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        rows = embedding.weight.shape[0]
        self.embedding = embedding
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.lora_a = _draw_matrix(rows, rank)
        self.lora_b = mx.zeros((rank, count_columns(embedding)))

    def __call__(self, input_ids: mx.array) -> mx.array:
        embeds: mx.array = self.embedding(input_ids)
        product = self.dropout(self.lora_a[input_ids] @ self.lora_b)
        return embeds + (self.scale * product).astype(embeds.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the product of `x` (..., D) and the transposed table: logits."""
        product = (self.dropout(x) @ self.lora_b.T) @ self.lora_a.T  # (..., R), (..., vocabulary)
        logits: mx.array = self.embedding.as_linear(x)
        return logits + (self.scale * product).astype(x.dtype)

    def fuse(self) -> nn.Embedding:
        """Return an embedding of floats that computes the same, without dropout."""
        weight = unpack(self.embedding, self.lora_b.dtype)
        fused = nn.Embedding(*weight.shape)
        fused.weight = weight + ((self.scale * self.lora_a) @ self.lora_b).astype(weight.dtype)
        return fused


Adaptable = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding


def adapt(base: Adaptable, rank: int, scale: float, dropout: float) -> LoRALinear | LoRAEmbedding:
    """Return `base` with a new low-rank product, which is zero."""
    if isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        return LoRAEmbedding(base, rank, scale, dropout)
    return LoRALinear(base, rank, scale, dropout)


def count_columns(layer: Adaptable) -> int:
    """Return the number of columns of the layer's matrix; a quantized one packs several."""
    columns: int = layer.weight.shape[1]
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        columns = columns * 32 // int(layer.bits)
    return columns


def unpack(layer: Adaptable, dtype: mx.Dtype, rows: slice = slice(None)) -> mx.array:
    """Return `rows` of the layer's matrix as floats, of `dtype` if it is quantized."""
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return mx.dequantize(
            layer.weight[rows],
            layer.scales[rows],
            None if layer.biases is None else layer.biases[rows],
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
            dtype=dtype,
        )
    return layer.weight[rows]


def _draw_matrix(rows: int, rank: int) -> mx.array:
    """Return random numbers (rows, R) of the size that keeps their products with inputs small."""
    bound = 1 / math.sqrt(rows)
    return mx.random.uniform(-bound, bound, (rows, rank))
