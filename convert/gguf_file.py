"""Read GGUF files strictly: header and tensors.

No native code parses the file. Counts, lengths, types, names, alignment, extents and overlaps are
checked against the size of the open file, and the memory that a header can claim is bounded.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.files import open_file

PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
GROUP = 32
_FLOATS = {"F32": "<f4", "F16": "<f2"}
_CHUNK = 2**14  # blocks unpacked at a time; bounds the memory for float32 intermediates


def decode_tensor(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """Decode the tensor of type `kind` and `shape` in `data`.

    Returns:
        `weight` for float and K types; `weight`, `scales` and `biases` of MLX's affine mode for
        Q4_0, Q4_1 and Q8_0.
    """
    if kind == "BF16":
        return {"weight": mx.array(np.frombuffer(data, "<u2").reshape(shape)).view(mx.bfloat16)}
    if kind in _FLOATS:
        return {"weight": mx.array(np.frombuffer(data, _FLOATS[kind]).reshape(shape))}
    if kind in PACKED_BITS:
        return _decode_packed(kind, shape, data)
    unpack, block_bytes = _K_TYPES[kind]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block_bytes)
    result = np.empty(math.prod(shape), np.float16)
    for start in range(0, len(blocks), _CHUNK):
        with np.errstate(all="ignore"):  # damaged scales give inf and nan, as in ggml
            floats = unpack(blocks[start : start + _CHUNK]).astype(np.float16)
        result[256 * start : 256 * start + floats.size] = floats.reshape(-1)
    return {"weight": mx.array(result.reshape(shape))}


def _decode_packed(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """Repack a matrix in groups of 32 to MLX's affine mode."""
    head = 4 if kind == "Q4_1" else 2
    blocks = np.frombuffer(data, np.uint8).reshape(math.prod(shape) // GROUP, -1)
    scales = _read_float16(blocks, 0)
    body: np.ndarray = blocks[:, head:]
    with np.errstate(all="ignore"):
        if kind == "Q8_0":  # signed bytes to MLX's unsigned ones
            biases, body = np.float16(-128) * scales, body ^ 0x80
        else:  # low half-bytes hold numbers 0 to 15, high ones 16 to 31; MLX packs neighbors
            biases = _read_float16(blocks, 2) if kind == "Q4_1" else np.float16(-8) * scales
            numbers: np.ndarray = np.concatenate([body & 0x0F, body >> 4], axis=1)
            body = numbers[:, 0::2] | numbers[:, 1::2] << 4
    weight = np.ascontiguousarray(body).view("<u4")
    rows, groups = shape[:-1], shape[-1] // GROUP
    return {
        "weight": mx.array(weight.reshape(*rows, -1)),
        "scales": mx.array(scales.reshape(*rows, groups)),
        "biases": mx.array(biases.reshape(*rows, groups)),
    }


def _read_float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """Read the float16 at byte `start` of each block, as (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def _split_bits(values: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """Extract bits of `values` (..., n) at each of `shifts`, as (..., shifts, n)."""
    return values[..., None, :] >> np.array(shifts, np.uint8)[:, None] & mask


def _unpack_q2_k(blocks: np.ndarray) -> np.ndarray:
    """Unpack blocks of 256 numbers, in groups of 16 with a 4-bit scale and minimum."""
    d, least = (
        _read_float16(blocks, 80).astype(np.float32),
        _read_float16(blocks, 82).astype(np.float32),
    )
    scales, numbers = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    numbers = _split_bits(numbers, (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    values: np.ndarray = (d * (scales & 15))[..., None] * numbers - (least * (scales >> 4))[
        ..., None
    ]
    return values


def _unpack_q4_k(blocks: np.ndarray) -> np.ndarray:
    """Unpack blocks of 256 numbers, in groups of 32 with a 6-bit scale and minimum."""
    d, least = (
        _read_float16(blocks, 0).astype(np.float32),
        _read_float16(blocks, 2).astype(np.float32),
    )
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    mins = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    numbers = _split_bits(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    values: np.ndarray = (d * scales)[..., None] * numbers - (least * mins)[..., None]
    return values


def _unpack_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Unpack blocks of 256 numbers, in groups of 16 with a signed 8-bit scale."""
    d, scales = _read_float16(blocks, 208).astype(np.float32), blocks[:, 192:208].view(np.int8)
    low = _split_bits(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = _split_bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    numbers = (low | high << 4).astype(np.int8) - np.int8(32)
    values: np.ndarray = (d * scales)[..., None] * numbers.reshape(-1, 16, 16)
    return values


_K_TYPES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "Q2_K": (_unpack_q2_k, 84),
    "Q4_K": (_unpack_q4_k, 144),
    "Q6_K": (_unpack_q6_k, 210),
}


VERSIONS = (2, 3)
LARGEST_HEADER = 64 * 2**20  # bytes; a vocabulary of 256,000 with its merges takes 12 MiB
MOST_ENTRIES = 2**16  # metadata entries, and tensors
MOST_STRINGS = 2**21  # in all arrays of the metadata
LONGEST_NAME = 2**16 - 1  # bytes of a key, the format's own bound
MOST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

# struct and array codes of the metadata's number types.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types by number: name, numbers per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 20: "IQ4_NL"}
_OTHER_TYPES |= {23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's type such as "Q4_0", shape with rows first, offset in the file, and size."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        metadata: Numbers, booleans and strings, by key. An array of strings is a list; any other
            array is an `array.array`, in which booleans are bytes.
        tensors: By name, in file order.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        file.seek(0)
        header = _HeaderReader(file.read(LARGEST_HEADER), self._size)
        try:
            self.metadata, self.tensors = header.read()
        except _HeaderError as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from None

    def read(self, tensor: GgufTensor) -> bytes:
        """Read the bytes of `tensor`.

        Raises:
            CheckpointError: The file was truncated since it was opened.
        """
        self._file.seek(tensor.offset)
        data = self._file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise CheckpointError(f"{self._path} changed while it was read; convert it again")
        return data


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """Open the GGUF file at `path` and check its header.

    Raises:
        CheckpointError: The file cannot be read, is damaged or not GGUF, or has tensor types that
            are not supported.
    """
    try:
        file = open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield GgufFile(path, file)


class _HeaderError(Exception):
    """The header is damaged or not supported."""


class _HeaderReader:
    """Parses `data`, the first bytes of a file of `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at, self._strings = data, size, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Read metadata and tensors, by name."""
        if self._data[:4] != b"GGUF":
            raise _HeaderError("it does not begin with 'GGUF'")
        self._at = 4
        version = self._read_number("I")
        if version not in VERSIONS:
            raise _HeaderError(f"its version is {version}; 2 and 3 are known, little-endian")
        tensor_count, entry_count = self._read_number("Q"), self._read_number("Q")
        for count, what in ((tensor_count, "tensors"), (entry_count, "metadata entries")):
            if count > MOST_ENTRIES:
                raise _HeaderError(f"it states {count:,} {what}; {MOST_ENTRIES:,} are the most")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._read_string(LONGEST_NAME)
            if key in metadata:
                raise _HeaderError(f"the metadata have {shorten(key)} twice")
            metadata[key] = self._read_value(self._read_number("I"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & alignment - 1:
            raise _HeaderError(
                f"its alignment is {shorten(alignment)}, which is not a power of two from 8 on"
            )
        tensors = [self._read_tensor() for _ in range(tensor_count)]
        return metadata, self._place(tensors, alignment)

    def _place(self, tensors: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """Return `tensors` by name with offsets in the file, after checking for gaps."""
        start = expected = -(-self._at // alignment) * alignment
        result: dict[str, GgufTensor] = {}
        for one in sorted(tensors, key=lambda one: one.offset):
            offset = start + one.offset
            if one.name in result:
                raise _HeaderError(f"it has the tensor {shorten(one.name)} twice")
            if offset != expected:
                raise _HeaderError(f"the tensors overlap or leave gaps at {shorten(one.name)}")
            if offset + one.nbytes > self._size:
                raise _HeaderError(
                    f"tensor {shorten(one.name)} ends at byte {offset + one.nbytes:,} of "
                    f"{self._size:,}; fetch it again"
                )
            expected = -(-(offset + one.nbytes) // alignment) * alignment
            result[one.name] = GgufTensor(one.name, one.type, one.shape, offset, one.nbytes)
        return {one.name: result[one.name] for one in tensors}

    def _read_tensor(self) -> GgufTensor:
        """Read a tensor's entry; its offset counts from the end of the header."""
        name = self._read_string(LONGEST_NAME)
        count = self._read_number("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise _HeaderError(f"tensor {shorten(name)} has {count} dimensions")
        sides = [self._read_number("Q") for _ in range(count)]
        number, offset = self._read_number("I"), self._read_number("Q")
        if number not in TYPES:
            kind = _OTHER_TYPES.get(number, f"number {number}")
            usable = ", ".join(name for name, _, _ in TYPES.values())
            raise _HeaderError(
                f"tensor {shorten(name)} is of type {kind}; {usable} can be read, or convert the "
                "safetensors that it was made from"
            )
        kind, block, block_bytes = TYPES[number]
        if not all(1 <= side < 2**31 for side in sides) or sides[0] % block:
            raise _HeaderError(f"tensor {shorten(name)} has the dimensions {sides}, type {kind}")
        nbytes = math.prod(sides) // block * block_bytes
        return GgufTensor(name, kind, tuple(reversed(sides)), offset, nbytes)

    def _read_value(self, kind: int) -> Any:
        """Read a value of the metadata type `kind`."""
        if kind == _STRING:
            return self._read_string(LARGEST_HEADER)
        if kind in _NUMBERS:
            return self._read_number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _HeaderError(f"the metadata have a value of type {kind}, which is not known")
        inner, count = self._read_number("I"), self._read_number("Q")
        if inner == _STRING:
            self._strings += count
            if self._strings > MOST_STRINGS:
                raise _HeaderError(f"the metadata have more than {MOST_STRINGS:,} texts")
            return [self._read_string(LARGEST_HEADER) for _ in range(count)]
        if inner not in _NUMBERS:
            raise _HeaderError(f"the metadata have an array of type {inner}, which is not read")
        values = array("B" if inner == _BOOL else _NUMBERS[inner])
        values.frombytes(self._read_bytes(count * values.itemsize))
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def _read_number(self, code: str) -> Any:
        layout = struct.Struct(f"<{code}")
        return layout.unpack(self._read_bytes(layout.size))[0]

    def _read_string(self, longest: int) -> str:
        length = self._read_number("Q")
        if length > longest:
            raise _HeaderError(f"it has a text of {length:,} bytes; {longest:,} are the most")
        try:
            return self._read_bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _HeaderError(f"the text before byte {self._at:,} is not UTF-8") from None

    def _read_bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            if len(self._data) < self._size:
                raise _HeaderError(f"its header is larger than {LARGEST_HEADER:,} bytes")
            raise _HeaderError(f"it is cut off or damaged: {self._size:,} bytes; fetch it again")
        part, self._at = self._data[self._at : end], end
        return part
