"""Tensors of GGUF files as MLX's arrays.

Q4_0, Q4_1 and Q8_0 are MLX's affine mode in groups of 32 and stay packed; the K types, which
have scales of their own, become float16.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c (dequantize_row_*)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
GROUP = 32
_FLOATS = {"F32": "<f4", "F16": "<f2"}
_CHUNK = 2**14  # blocks unpacked at a time, which bounds the memory for float32 in between


def arrays_of(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """The tensor of type `kind` and `shape` in `data`, by suffix.

    "weight" alone if it holds floats, else "weight", "scales" and "biases" of MLX's affine mode.
    """
    if kind == "BF16":
        return {"weight": mx.array(np.frombuffer(data, "<u2").reshape(shape)).view(mx.bfloat16)}
    if kind in _FLOATS:
        return {"weight": mx.array(np.frombuffer(data, _FLOATS[kind]).reshape(shape))}
    if kind in PACKED_BITS:
        return _packed(kind, shape, data)
    unpack, block_bytes = _K_TYPES[kind]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block_bytes)
    result = np.empty(math.prod(shape), np.float16)
    for start in range(0, len(blocks), _CHUNK):
        with np.errstate(all="ignore"):  # damaged scales give inf and nan, as they do in ggml
            floats = unpack(blocks[start : start + _CHUNK]).astype(np.float16)
        result[256 * start : 256 * start + floats.size] = floats.reshape(-1)
    return {"weight": mx.array(result.reshape(shape))}


def _packed(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """The arrays of a matrix in groups of 32, as MLX packs them."""
    head = 4 if kind == "Q4_1" else 2
    blocks = np.frombuffer(data, np.uint8).reshape(math.prod(shape) // GROUP, -1)
    scales = _halves(blocks, 0)
    body: np.ndarray = blocks[:, head:]
    with np.errstate(all="ignore"):
        if kind == "Q8_0":  # signed bytes; MLX's are unsigned
            biases, body = np.float16(-128) * scales, body ^ 0x80
        else:  # the first 16 numbers in the low halves of the bytes, MLX has neighbors in a byte
            biases = _halves(blocks, 2) if kind == "Q4_1" else np.float16(-8) * scales
            numbers: np.ndarray = np.concatenate([body & 0x0F, body >> 4], axis=1)
            body = numbers[:, 0::2] | numbers[:, 1::2] << 4
    weight = np.ascontiguousarray(body).view("<u4")
    rows, groups = shape[:-1], shape[-1] // GROUP
    return {
        "weight": mx.array(weight.reshape(*rows, -1)),
        "scales": mx.array(scales.reshape(*rows, groups)),
        "biases": mx.array(biases.reshape(*rows, groups)),
    }


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def _bits(values: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """`values` (..., n) as (..., shifts, n): their bits at each of `shifts`."""
    return values[..., None, :] >> np.array(shifts, np.uint8)[:, None] & mask


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers a block, in groups of 16 with a scale and a minimum of 4 bits each."""
    d, least = _halves(blocks, 80).astype(np.float32), _halves(blocks, 82).astype(np.float32)
    scales, numbers = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    numbers = _bits(numbers, (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    values: np.ndarray = (d * (scales & 15))[..., None] * numbers - (least * (scales >> 4))[
        ..., None
    ]
    return values


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers a block, in groups of 32 with a scale and a minimum of 6 bits each."""
    d, least = _halves(blocks, 0).astype(np.float32), _halves(blocks, 2).astype(np.float32)
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    mins = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    numbers = _bits(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    values: np.ndarray = (d * scales)[..., None] * numbers - (least * mins)[..., None]
    return values


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers a block, in groups of 16 with a signed scale of 8 bits each."""
    d, scales = _halves(blocks, 208).astype(np.float32), blocks[:, 192:208].view(np.int8)
    low = _bits(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    numbers = (low | high << 4).astype(np.int8) - np.int8(32)
    values: np.ndarray = (d * scales)[..., None] * numbers.reshape(-1, 16, 16)
    return values


_K_TYPES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "Q2_K": (_q2_k, 84),
    "Q4_K": (_q4_k, 144),
    "Q6_K": (_q6_k, 210),
}
