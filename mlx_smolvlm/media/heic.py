"""Read HEIC pictures, as iPhones and newer cameras write them.

A HEIC file holds one or many pictures compressed as HEVC, usually tiles of a grid, in boxes as in
a video file. `boxes` reads these, and FFmpeg decodes the HEVC, as it does that of videos. This
module imports PyAV, so it is only imported when such a file is opened.

Source: ISO/IEC 23008-12 (HEIF: items, grids, rotation) and 14496-12 (boxes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from PIL import Image

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.boxes import Item, ItemFile, Size
from mlx_smolvlm.media.budget import check_size

SAVE = "save it as PNG or JPEG"
MAX_NESTING = 4  # of pictures that are made of others
_MARGIN = 128  # pixels by which HEVC may pad a picture
_ALPHA = (b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha")
# MatrixCoefficients of ISO/IEC 23091-2 to FFmpeg's; 2 is unspecified, for which HEIF means 5.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_BT601, _LIMITED, _FULL = 5, 1, 2


class HeicImage(Image.Image):
    """The main picture of a HEIC file, upright, in RGB or RGBA; `load` decodes it.

    Raises:
        MediaError: The picture exceeds a limit of `budget`, or is made in an unsupported way.
        Exception: Any other, if the file is damaged.
    """

    format = "HEIC"

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__()
        self._file: HeicFile | None = HeicFile(stream, name)
        self._mode, self._size = "RGB", self._file.read_size()

    def load(self) -> Any:
        """Decode the picture, once."""
        if self._file is not None:
            picture = self._file.decode()
            self._file, self._mode, self._size = None, picture.mode, picture.size
            self.im = picture.im
        return super().load()


class HeicFile(ItemFile):
    """A HEIC file whose main picture is decoded."""

    def read_size(self) -> Size:
        """Return the upright width and height of the main picture, from its header."""
        item = self.get(self.main)
        check_size(item.size, self.name)
        size = item.size
        for kind, body in item.properties:
            if kind == b"irot" and body[0] & 1:
                size = size[1], size[0]
            elif kind == b"clap":
                left, top, right, lower = _read_crop(body, size)
                size = right - left, lower - top
        return size

    def decode(self) -> Image.Image:
        """Decode the main picture, with its transparency, and turn it upright."""
        item = self.get(self.main)
        picture = self._decode_item(item, "RGB")
        for other in self.items.values():
            if self.main in other.links.get(b"auxl", ()) and _is_alpha(other):
                alpha = self._decode_item(other, "L")
                picture.putalpha(
                    alpha.resize(picture.size) if alpha.size != picture.size else alpha
                )
                break
        return _transform(picture, item)

    def _decode_item(self, item: Item, mode: str, nesting: int = 0) -> Image.Image:
        """Decode an item to a picture that is not turned yet; `mode` is RGB or L."""
        check_size(item.size, self.name)
        if nesting > MAX_NESTING:
            raise ValueError("its pictures are nested too deeply")
        if item.kind == b"hvc1":
            (picture,) = self._decode_hevc([item], mode, item)
            return picture
        parts = [self.get(number) for number in item.links.get(b"dimg", ())]
        if item.kind == b"iden" and len(parts) == 1:
            return _transform(self._decode_item(parts[0], mode, nesting + 1), parts[0])
        if item.kind == b"grid" and parts and all(one.kind == b"hvc1" for one in parts):
            return self._decode_grid(item, parts, mode)
        kind = item.kind.decode("ascii", "replace")
        raise MediaError(f"{self.name} is a HEIC picture of an unsupported kind ({kind}); {SAVE}")

    def _decode_grid(self, item: Item, parts: Sequence[Item], mode: str) -> Image.Image:
        """Decode the tiles of a grid, and put them together."""
        recipe = self.read_bytes(item)
        rows, columns = recipe[2] + 1, recipe[3] + 1
        width, height = struct.unpack_from(">II" if recipe[1] & 1 else ">HH", recipe, 4)
        check_size((width, height), self.name)
        wide, high = parts[0].size
        if (
            len(parts) != rows * columns
            or not (columns - 1) * wide < width <= columns * wide
            or not (rows - 1) * high < height <= rows * high
            or any(one.size != (wide, high) for one in parts)
        ):
            raise ValueError("its tiles do not fill the picture")
        picture = Image.new(mode, (width, height))
        for index, tile in enumerate(self._decode_hevc(parts, mode, item)):
            picture.paste(tile, (index % columns * wide, index // columns * high))
        return picture

    def _decode_hevc(
        self, items: Sequence[Item], mode: str, colored: Item
    ) -> Iterator[Image.Image]:
        """Decode items of one size in HEVC; `colored` may say what their colors mean."""
        color = colored.find_color() or items[0].find_color()
        decoder, configuration, count = None, b"", 0
        for item in (*items, None):
            hvcc = None if item is None else item.find(b"hvcC")
            frames: list[VideoFrame] = []
            if decoder is not None and hvcc != configuration:
                frames += decoder.decode(None)
                decoder = None
            if item is not None:
                if hvcc is None:
                    raise ValueError("a picture has no configuration")
                if decoder is None:
                    decoder, configuration = _make_decoder(hvcc, *items[0].size), hvcc
                frames += decoder.decode(av.Packet(self.read_bytes(item)))
            for frame in frames:
                count += 1
                yield _convert_frame(frame, mode, color, items[0].size)
        if count != len(items):
            raise ValueError(f"{count} of {len(items)} pictures can be decoded")


def _is_alpha(item: Item) -> bool:
    """Return whether an auxiliary picture is the transparency of another one."""
    body = item.find(b"auxC")
    return body is not None and body[4:].partition(b"\0")[0] in _ALPHA


def _make_decoder(configuration: bytes, width: int, height: int) -> VideoCodecContext:
    """Return a decoder of pictures of this size that refuses larger and damaged ones."""
    decoder = av.CodecContext.create("hevc", "r")
    decoder.extradata = configuration
    # A thread of the decoder would wait for the GIL to free a packet of Python's bytes, while
    # PyAV holds it to free the decoder and waits for the thread.
    decoder.thread_count = 1
    limit = (width + _MARGIN) * (height + _MARGIN)
    decoder.options = {"max_pixels": str(limit), "err_detect": "explode"}
    return decoder


def _convert_frame(
    frame: VideoFrame, mode: str, color: tuple[int, bool] | None, size: Size
) -> Image.Image:
    """Convert a decoded frame to RGB or L, 8 bits, of `size`.

    `color` is the matrix and whether values range over all 8 bits; None is as the frame says.
    """
    if frame.width < size[0] or frame.height < size[1]:
        raise ValueError(f"a picture has {frame.width} x {frame.height} pixels, not {size}")
    matrix, is_full = color or (int(frame.colorspace), int(frame.color_range) == _FULL)
    converted = frame.reformat(
        format="rgb24" if mode == "RGB" else "gray",
        src_colorspace=_MATRICES.get(matrix, _BT601),
        src_color_range=_FULL if is_full else _LIMITED,
        dst_color_range=_FULL,
        interpolation="POINT",  # takes the nearest color, as libheif does
    )
    picture = Image.fromarray(converted.to_ndarray())
    return picture if picture.size == size else picture.crop((0, 0, *size))


def _transform(picture: Image.Image, item: Item) -> Image.Image:
    """Crop, turn and mirror a picture as the properties of its item say, in their order.

    Each may be there once (ISO/IEC 23000-22), or a small file could take days.
    """
    kinds = [kind for kind, _ in item.properties if kind in (b"clap", b"irot", b"imir")]
    if len(kinds) > len(set(kinds)):
        raise ValueError("it is cropped, turned or mirrored twice")
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    mirrors = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)
    for kind, body in item.properties:
        if kind == b"irot" and body[0] & 3:
            picture = picture.transpose(turns[(body[0] & 3) - 1])
        elif kind == b"imir":
            picture = picture.transpose(mirrors[body[0] & 1])
        elif kind == b"clap":
            picture = picture.crop(_read_crop(body, picture.size))
    return picture


def _read_crop(body: bytes, size: Size) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, lower) of a clean aperture, within a picture of `size`."""
    values = struct.unpack(">8i", body[:32])
    if not all(values[1::2]):
        raise ValueError("a crop is divided by 0")
    wide, high, across, down = (a / b for a, b in zip(values[::2], values[1::2], strict=True))
    left = round((size[0] - wide) / 2 + across)
    top = round((size[1] - high) / 2 + down)
    box = (
        max(left, 0),
        max(top, 0),
        min(left + round(wide), size[0]),
        min(top + round(high), size[1]),
    )
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("a crop leaves nothing")
    return box
