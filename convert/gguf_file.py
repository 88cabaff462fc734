"""GGUF files, read strictly: metadata, and the places of tensors, each checked before it is used.

No native code sees the file. Counts, lengths, types, names, alignment, extents and overlaps are
checked against the size of the open file, and what the header may ask for in memory is bounded.

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
_CHUNK = 2**14  # blocks unpacked at a time, which bounds the memory for float32 in between


def decode_tensor(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """The tensor of type `kind` and `shape` in `data`, by suffix.

    "weight" alone if it holds floats, else "weight", "scales" and "biases" of MLX's affine mode.
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
        with np.errstate(all="ignore"):  # damaged scales give inf and nan, as they do in ggml
            floats = unpack(blocks[start : start + _CHUNK]).astype(np.float16)
        result[256 * start : 256 * start + floats.size] = floats.reshape(-1)
    return {"weight": mx.array(result.reshape(shape))}


def _decode_packed(kind: str, shape: tuple[int, ...], data: bytes) -> dict[str, mx.array]:
    """The arrays of a matrix in groups of 32, as MLX packs them."""
    head = 4 if kind == "Q4_1" else 2
    blocks = np.frombuffer(data, np.uint8).reshape(math.prod(shape) // GROUP, -1)
    scales = _read_float16(blocks, 0)
    body: np.ndarray = blocks[:, head:]
    with np.errstate(all="ignore"):
        if kind == "Q8_0":  # signed bytes; MLX's are unsigned
            biases, body = np.float16(-128) * scales, body ^ 0x80
        else:  # the first 16 numbers in the low halves of the bytes, MLX has neighbors in a byte
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
    """The float16 at byte `start` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def _split_bits(values: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """`values` (..., n) as (..., shifts, n): their bits at each of `shifts`."""
    return values[..., None, :] >> np.array(shifts, np.uint8)[:, None] & mask


def _unpack_q2_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers a block, in groups of 16 with a scale and a minimum of 4 bits each."""
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
    """256 numbers a block, in groups of 32 with a scale and a minimum of 6 bits each."""
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
    """256 numbers a block, in groups of 16 with a signed scale of 8 bits each."""
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
MOST_ENTRIES = 2**16  # of metadata, and of tensors
MOST_STRINGS = 2**21  # in all arrays of the metadata
LONGEST_NAME = 2**16 - 1  # bytes of a key, the format's own bound
MOST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

# The codes that struct and array have for the metadata's types of numbers.
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

# Tensor types by their number: name, numbers in a block, bytes of a block.
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
    """Where a tensor lies: its type such as "Q4_0", shape with the rows first, and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        metadata: Numbers, truth values and texts; arrays of texts are lists, others are
            `array.array`, truth values in them bytes.
        tensors: By name, in the order of the file.
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
        """The bytes of `tensor`.

        Raises:
            CheckpointError: The file became shorter.
        """
        self._file.seek(tensor.offset)
        data = self._file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise CheckpointError(f"{self._path} changed while it was read; convert it again")
        return data


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """The GGUF file at `path`, its header read and checked.

    Raises:
        CheckpointError: It cannot be read, is no GGUF file, is damaged, or holds types that
            are not supported.
    """
    try:
        file = open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield GgufFile(path, file)


class _HeaderError(Exception):
    """What is wrong with a header."""


class _HeaderReader:
    """A cursor over the first bytes of a file of `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at, self._strings = data, size, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Metadata and tensors."""
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
        described = [self._read_tensor() for _ in range(tensor_count)]
        return metadata, self._place(described, alignment)

    def _place(self, tensors: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """`tensors` by name, with offsets from the start of the file, one behind the other."""
        start = place = -(-self._at // alignment) * alignment
        result: dict[str, GgufTensor] = {}
        for one in sorted(tensors, key=lambda one: one.offset):
            offset = start + one.offset
            if one.name in result:
                raise _HeaderError(f"it has the tensor {shorten(one.name)} twice")
            if offset != place:
                raise _HeaderError(f"the tensors overlap or leave gaps at {shorten(one.name)}")
            if offset + one.nbytes > self._size:
                raise _HeaderError(
                    f"tensor {shorten(one.name)} ends at byte {offset + one.nbytes:,} of "
                    f"{self._size:,}; fetch it again"
                )
            place = -(-(offset + one.nbytes) // alignment) * alignment
            result[one.name] = GgufTensor(one.name, one.type, one.shape, offset, one.nbytes)
        return {one.name: result[one.name] for one in tensors}

    def _read_tensor(self) -> GgufTensor:
        """A tensor's description; its offset counts from the end of the header."""
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
        """A value of the metadata type `kind`."""
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
