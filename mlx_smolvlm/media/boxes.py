"""Read the boxes of a HEIC file: which pictures it holds, where, and what is known of them.

Source: ISO/IEC 23008-12 (HEIF: items and their properties) and 14496-12 (boxes).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from mlx_smolvlm.errors import MediaError

Size = tuple[int, int]  # width, height
Box = tuple[bytes, bytes]  # kind, body

MAX_META_BYTES = 4 << 20  # of the boxes that describe the items; a phone's take a few KB
MAX_EXTENTS = 1 << 16  # of all items; a phone's have one each
_READ_RATIO = 2  # bytes of items that are read, as a multiple of the file size


@dataclass
class Item:
    """A picture in the file, or a recipe for one.

    Attributes:
        kind: hvc1 for HEVC, grid, iden, ...
        extents: (place, length) of its bytes, a length of 0 up to the end; places count from the
            beginning of `idat` if `is_inside`.
        is_inside: Whether its bytes are in the box `idat`.
        properties: Boxes that describe it, in their order.
        links: Numbers of the items that it refers to, by the kind of the reference.
    """

    kind: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    is_inside: bool = False
    properties: list[Box] = field(default_factory=list)
    links: dict[bytes, list[int]] = field(default_factory=dict)

    def find(self, kind: bytes) -> bytes | None:
        """Return the body of the first property of this kind."""
        return next((body for one, body in self.properties if one == kind), None)

    def find_color(self) -> tuple[int, bool] | None:
        """Return the matrix of its colors and whether they have the full range, if it says so."""
        for kind, body in self.properties:
            if kind == b"colr" and body[:4] == b"nclx":
                return int.from_bytes(body[8:10], "big"), bool(body[10] & 0x80)
        return None

    @property
    def size(self) -> Size:
        """Width and height before it is turned.

        Raises:
            ValueError: They are missing.
        """
        body = self.find(b"ispe")
        if body is None:
            raise ValueError("a picture has no size")
        width, height = struct.unpack_from(">II", body, 4)
        return width, height


class ItemFile:
    """The items of an open HEIC file.

    Attributes:
        name: The file's name in messages.
        main: The number of the main picture.
        items: All items by their numbers.

    Raises:
        MediaError: The description of the items is too long.
        Exception: Any other, if the file is damaged.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self.name = stream, name
        self._file_size = stream.seek(0, io.SEEK_END)
        self._bytes_left = _READ_RATIO * self._file_size
        self.items: dict[int, Item] = {}
        self._inside = b""
        self.main = 0
        self._read_meta()

    def get(self, number: int) -> Item:
        """Return an item.

        Raises:
            ValueError: There is none of this number.
        """
        if number not in self.items:
            raise ValueError(f"there is no item {number}")
        return self.items[number]

    def _read_meta(self) -> None:
        """Read the boxes that describe the items."""
        for kind, body in _split_boxes(self._find_meta()):
            version = body[0] if body else 0
            if kind == b"pitm":
                self.main = int.from_bytes(body[4 : 6 if version == 0 else 8], "big")
            elif kind == b"iinf":
                for one, entry in _split_boxes(body[6 if version == 0 else 8 :]):
                    if one == b"infe" and entry[0] >= 2:
                        width = 2 if entry[0] == 2 else 4
                        number = int.from_bytes(entry[4 : 4 + width], "big")
                        self._add(number).kind = entry[6 + width : 10 + width]
            elif kind == b"iloc":
                self._read_places(_Fields(body))
            elif kind == b"iref":
                for one, entry in _split_boxes(body[4:]):
                    fields = _Fields(entry, 0)
                    width = 4 if version else 2
                    item = self._add(fields.take(width))
                    count = fields.take(2)
                    item.links.setdefault(one, []).extend(fields.take(width) for _ in range(count))
            elif kind == b"iprp":
                self._read_properties(list(_split_boxes(body)))
            elif kind == b"idat":
                self._inside = body

    def _add(self, number: int) -> Item:
        return self.items.setdefault(number, Item())

    def _find_meta(self) -> bytes:
        """Return the body of the box `meta`, behind its version."""
        place = 0
        while place + 8 <= self._file_size:
            self._stream.seek(place)
            head = self._stream.read(16)
            length, skip = int.from_bytes(head[:4], "big"), 8
            if length == 1:
                length, skip = int.from_bytes(head[8:16], "big"), 16
            length = length or self._file_size - place
            if head[4:8] == b"meta":
                if length > MAX_META_BYTES:
                    raise MediaError(
                        f"{self.name} describes its picture in {length:,} bytes, above the limit "
                        f"of {MAX_META_BYTES:,}; save it again as PNG or JPEG"
                    )
                self._stream.seek(place + skip)
                return self._stream.read(length - skip)[4:]
            place += max(length, 8)
        raise ValueError("it has no box 'meta'")

    def _read_places(self, fields: _Fields) -> None:
        """Read where the bytes of each item are (the box iloc)."""
        sizes, more = fields.take(1), fields.take(1)
        offset_size, length_size, base_size = sizes >> 4, sizes & 15, more >> 4
        index_size = more & 15 if fields.version else 0
        extents_left = MAX_EXTENTS
        for _ in range(fields.take(4 if fields.version == 2 else 2)):
            item = self._add(fields.take(4 if fields.version == 2 else 2))
            method = fields.take(2) & 15 if fields.version else 0
            reference, base = fields.take(2), fields.take(base_size)
            item.is_inside = method == 1
            count = fields.take(2)
            extents_left -= count  # fields of no width would take no bytes of the box
            if extents_left < 0:
                raise ValueError("its pictures are in too many parts")
            for _ in range(count):
                fields.take(index_size)
                place, length = base + fields.take(offset_size), fields.take(length_size)
                item.extents.append((place, length))
            if method > 1 or reference:
                item.extents.clear()  # in another item or file

    def _read_properties(self, boxes: Sequence[Box]) -> None:
        """Read the properties, and which items have them (the boxes ipco and ipma)."""
        known = [one for kind, body in boxes if kind == b"ipco" for one in _split_boxes(body)]
        for _, body in (one for one in boxes if one[0] == b"ipma"):
            fields = _Fields(body)
            width = 2 if body[3] & 1 else 1
            for _ in range(fields.take(4)):
                item = self._add(fields.take(4 if fields.version else 2))
                for _ in range(fields.take(1)):
                    index = fields.take(width) & (0x7FFF if width == 2 else 0x7F)
                    if 0 < index <= len(known):
                        item.properties.append(known[index - 1])

    def read_bytes(self, item: Item) -> bytes:
        """Return the bytes of an item."""
        size = len(self._inside) if item.is_inside else self._file_size
        extents = [(place, length or max(size - place, 0)) for place, length in item.extents]
        self._bytes_left -= sum(length for _, length in extents)
        if self._bytes_left < 0:
            raise ValueError("its parts are longer than the file")
        parts = []
        for place, length in extents:
            if item.is_inside:
                parts.append(self._inside[place : place + length])
            else:
                self._stream.seek(place)
                parts.append(self._stream.read(length))
            if len(parts[-1]) < length:
                raise ValueError("it ends within a picture")
        return b"".join(parts)


class _Fields:
    """Reads big-endian integers from a box, one after another."""

    def __init__(self, body: bytes, place: int = 4) -> None:
        self._body, self._place = body, place
        self.version = body[0] if place else 0

    def take(self, width: int) -> int:
        """Return the next integer, of `width` bytes; 0 if it has none."""
        value = self._body[self._place : self._place + width]
        if len(value) < width:
            raise ValueError("a box ends too early")
        self._place += width
        return int.from_bytes(value, "big")


def _split_boxes(data: bytes) -> Iterator[Box]:
    """Yield the boxes in `data`."""
    place = 0
    while place + 8 <= len(data):
        length, skip = int.from_bytes(data[place : place + 4], "big"), 8
        if length == 1:
            length, skip = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        end = place + length if length else len(data)
        if end < place + skip or end > len(data):
            raise ValueError("a box is longer than the one around it")
        yield data[place + 4 : place + 8], data[place + skip : end]
        place = end
