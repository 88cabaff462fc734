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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.files import open_file

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
        header = _Header(file.read(LARGEST_HEADER), self._size)
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


class _Header:
    """A cursor over the first bytes of a file of `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at, self._strings = data, size, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Metadata and tensors."""
        if self._data[:4] != b"GGUF":
            raise _HeaderError("it does not begin with 'GGUF'")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise _HeaderError(f"its version is {version}; 2 and 3 are known, little-endian")
        tensor_count, entry_count = self._number("Q"), self._number("Q")
        for count, what in ((tensor_count, "tensors"), (entry_count, "metadata entries")):
            if count > MOST_ENTRIES:
                raise _HeaderError(f"it states {count:,} {what}; {MOST_ENTRIES:,} are the most")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string(LONGEST_NAME)
            if key in metadata:
                raise _HeaderError(f"the metadata have {shorten(key)} twice")
            metadata[key] = self._value(self._number("I"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & alignment - 1:
            raise _HeaderError(
                f"its alignment is {shorten(alignment)}, which is not a power of two from 8 on"
            )
        described = [self._tensor() for _ in range(tensor_count)]
        return metadata, self._placed(described, alignment)

    def _placed(self, tensors: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
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

    def _tensor(self) -> GgufTensor:
        """A tensor's description; its offset counts from the end of the header."""
        name = self._string(LONGEST_NAME)
        count = self._number("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise _HeaderError(f"tensor {shorten(name)} has {count} dimensions")
        sides = [self._number("Q") for _ in range(count)]
        number, offset = self._number("I"), self._number("Q")
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

    def _value(self, kind: int) -> Any:
        """A value of the metadata type `kind`."""
        if kind == _STRING:
            return self._string(LARGEST_HEADER)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _HeaderError(f"the metadata have a value of type {kind}, which is not known")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            self._strings += count
            if self._strings > MOST_STRINGS:
                raise _HeaderError(f"the metadata have more than {MOST_STRINGS:,} texts")
            return [self._string(LARGEST_HEADER) for _ in range(count)]
        if inner not in _NUMBERS:
            raise _HeaderError(f"the metadata have an array of type {inner}, which is not read")
        values = array("B" if inner == _BOOL else _NUMBERS[inner])
        values.frombytes(self._bytes(count * values.itemsize))
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def _number(self, code: str) -> Any:
        layout = struct.Struct(f"<{code}")
        return layout.unpack(self._bytes(layout.size))[0]

    def _string(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise _HeaderError(f"it has a text of {length:,} bytes; {longest:,} are the most")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _HeaderError(f"the text before byte {self._at:,} is not UTF-8") from None

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            if len(self._data) < self._size:
                raise _HeaderError(f"its header is larger than {LARGEST_HEADER:,} bytes")
            raise _HeaderError(f"it is cut off or damaged: {self._size:,} bytes; fetch it again")
        part, self._at = self._data[self._at : end], end
        return part
