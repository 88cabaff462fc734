"""HEIC files, written box by box, so that tests can have any kind of them, and damaged ones."""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import av
import numpy as np
import pytest
from PIL import Image

HEVC, GRID = b"hvc1", b"grid"
ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box."""
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    """A box with a version and flags."""
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def irot(quarters: int) -> bytes:
    """Turn so many quarters against the clock."""
    return box(b"irot", bytes([quarters]))


def imir(axis: int) -> bytes:
    """Mirror: 0 exchanges top and bottom, 1 left and right."""
    return box(b"imir", bytes([axis]))


def nclx(matrix: int, is_full: bool) -> bytes:
    """What the values of a picture mean."""
    return box(b"colr", b"nclx", struct.pack(">HHHB", 2, 2, matrix, is_full << 7))


def clap(width: int, height: int, across: int = 0, down: int = 0) -> bytes:
    """Crop to this size, the middle moved by (across, down) pixels."""
    return box(b"clap", struct.pack(">8i", width, 1, height, 1, across, 1, down, 1))


@dataclass
class Item:
    """An item of the file: its bytes and properties, and the items that it refers to."""

    kind: bytes
    data: bytes
    properties: list[bytes] = field(default_factory=list)
    links: list[tuple[bytes, list[int]]] = field(default_factory=list)
    is_inside: bool = False  # in the box idat


def encode(
    image: Image.Image, pix_fmt: str = "yuv444p", *, matrix: str = "ITU601", is_full: bool = True
) -> Item:
    """`image` in HEVC, without loss but for the colors' resolution and rounding."""
    if "libx265" not in av.codecs_available:
        pytest.skip("PyAV has no encoder of HEVC")
    buffer = io.BytesIO()
    frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), "rgb24").reformat(
        format=pix_fmt, dst_colorspace=matrix, dst_color_range="JPEG" if is_full else "MPEG"
    )
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx265", rate=1)
        stream.width, stream.height, stream.pix_fmt = image.width, image.height, pix_fmt
        frame.pts = 0
        shown = "full" if is_full else "limited"
        stream.options = {"x265-params": f"lossless=1:bframes=0:log-level=none:range={shown}"}
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file = buffer.getvalue()
    place = file.index(b"hvcC") - 4
    configuration = file[place : place + int.from_bytes(file[place : place + 4], "big")]
    with av.open(io.BytesIO(file)) as read:
        data = bytes(next(read.demux(video=0)))
    return Item(HEVC, data, [configuration, ispe(*image.size)])


def ispe(width: int, height: int) -> bytes:
    """The size of a picture."""
    return full(b"ispe", struct.pack(">II", width, height))


def make_grid(image: Image.Image, side: int, first: int = 2) -> list[Item]:
    """A grid, then its tiles of `side` pixels, of which the first gets the number `first`."""
    columns, rows = (-(-length // side) for length in image.size)
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(image)
    tiles = [
        encode(canvas.crop((x, y, x + side, y + side)))
        for y in range(0, canvas.height, side)
        for x in range(0, canvas.width, side)
    ]
    recipe = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *image.size)
    numbers = list(range(first, first + len(tiles)))
    return [Item(GRID, recipe, [ispe(*image.size)], [(b"dimg", numbers)], True), *tiles]


def write_heic(
    items: Sequence[Item],
    brands: bytes = b"heic\0\0\0\0mif1heic",
    main: int = 1,
    wide: bool = False,
) -> bytes:
    """A file of `items`, numbered from 1. With `wide`, boxes have their versions for 32 bits."""
    number = ">I" if wide else ">H"
    known = list(dict.fromkeys(one for item in items for one in item.properties))
    inside = b"".join(item.data for item in items if item.is_inside)
    links = [(place + 1, one) for place, item in enumerate(items) for one in item.links]

    def make_meta(start: int) -> bytes:
        """The box meta, if the bytes of items begin at `start`."""
        places, offsets = [], {True: 0, False: start}
        for item in items:
            places.append(offsets[item.is_inside])
            offsets[item.is_inside] += len(item.data)
        infe = [
            full(b"infe", struct.pack(number, place + 1), b"\0\0", item.kind, b"\0",
                 version=3 if wide else 2)
            for place, item in enumerate(items)
        ]  # fmt: skip
        iloc = [
            struct.pack(number, place + 1)
            + struct.pack(">HHHII", item.is_inside, 0, 1, offset, len(item.data))
            for place, (item, offset) in enumerate(zip(items, places, strict=True))
        ]
        ipma = [
            struct.pack(number, place + 1)
            + bytes([len(item.properties), *(known.index(one) + 1 for one in item.properties)])
            for place, item in enumerate(items)
        ]
        iref = [
            box(kind, struct.pack(number, source), struct.pack(">H", len(targets)),
                b"".join(struct.pack(number, one) for one in targets))
            for source, (kind, targets) in links
        ]  # fmt: skip
        return full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(number, main), version=wide),
            full(b"iinf", struct.pack(number, len(items)), *infe, version=wide),
            full(b"iref", *iref, version=wide),
            box(
                b"iprp",
                box(b"ipco", *known),
                full(b"ipma", struct.pack(">I", len(items)), *ipma, version=wide),
            ),
            box(b"idat", inside),
            full(b"iloc", b"\x44\0", struct.pack(number, len(items)), *iloc,
                 version=2 if wide else 1),
        )  # fmt: skip

    head = box(b"ftyp", brands)
    start = len(head) + len(make_meta(0)) + 8
    data = b"".join(item.data for item in items if not item.is_inside)
    return head + make_meta(start) + box(b"mdat", data)
