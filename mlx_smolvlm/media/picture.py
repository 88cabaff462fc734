"""Pictures opened: any source and pixel format to upright RGB.

What differs from transformers on purpose is in docs/decisions/images.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlx_smolvlm.errors import MediaError, format_error
from mlx_smolvlm.media.budget import MAX_EXIF_BYTES, PictureStream, check_size
from mlx_smolvlm.media.fetch import describe_source, is_remote, open_bytes

Size = tuple[int, int]  # width, height

# What Pillow may take a file for. Others start programs (EPS), name further files, or are
# old formats that nobody sends and few people test. TGA has no signature, so it comes last.
FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"),
    *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),  # from 11.3 on
    "TGA",
)

_BAND_PIXELS = 1 << 20  # that are brought to 8 bits, or laid on white, at a time

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """The picture in `source` as RGB, turned as its EXIF orientation says.

    Args:
        source: A path, an http(s) URL, a data URI, "-" for standard input, the bytes of
            a file, a PIL image, a matplotlib figure, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 or float in 0..1. Transparency is laid on white;
            16 bits become 8.

    Raises:
        MediaError: It cannot be read or decoded, or exceeds a limit of `budget`.
    """
    if isinstance(source, np.ndarray):
        return _convert_array(source)
    if isinstance(source, Image.Image):
        check_size(source.size, "the image")
        return _load_rgb(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode_stream(io.BytesIO(source), "the data")
    if hasattr(source, "savefig"):
        return _decode_stream(_draw_figure(source), "the figure")
    if not isinstance(source, str | Path):
        raise MediaError(
            f"a picture cannot be of type {type(source).__name__}; "
            "give a path, URL, data URI, bytes, PIL image, numpy array or matplotlib figure"
        )
    if is_remote(source):
        return _decode_stream(open_bytes(source), describe_source(source))
    with open_bytes(source) as stream:
        return _decode_stream(stream, describe_source(source))


def _draw_figure(figure: Any) -> io.BytesIO:
    """The PNG file that a matplotlib figure, or what saves itself like one, writes."""
    buffer = io.BytesIO()
    with convert_errors("the figure"):
        figure.savefig(buffer, format="png")
    buffer.seek(0)
    return buffer


def read_upright_size(source: str | Path) -> Size:
    """Size of the picture in the file `source` as `open_image` gives it, from its header alone.

    Raises:
        MediaError: It is no picture, or exceeds a limit of `budget`.
    """
    with open_bytes(source) as stream, ignore_warnings():
        image = _open_header(stream, describe_source(source))
        width, height = image.size
        is_turned = _read_orientation(image) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def _decode_stream(stream: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file."""
    with ignore_warnings():
        return _load_rgb(_open_header(stream, name), name)


def _open_header(stream: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file, not decoded yet."""
    if not stream.read(1):
        raise MediaError(f"{name} is empty")
    limited: Any = PictureStream(stream, name)
    with convert_errors(name):
        image = open_lazily(limited, name)
    limited.end_header()
    check_size(image.size, name)
    return image


def open_lazily(stream: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file, if it is in one of `FORMATS`; not decoded yet.

    Raises:
        MediaError: It is in none of them, or is larger than Pillow takes.
    """
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise MediaError(
            f"{name} is not a picture in a format that can be read; convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large: {error}") from None


def _load_rgb(image: Image.Image, name: str) -> Image.Image:
    """`_to_upright_rgb` with any failure of the decoder as a MediaError."""
    with convert_errors(name):
        image.load()
        return _to_upright_rgb(image, name)


@contextlib.contextmanager
def convert_errors(name: str) -> Iterator[None]:
    """Any failure of a decoder as a MediaError that names the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # a format plugin raises anything on damaged data
        raise MediaError(
            f"{name} cannot be decoded; it may be truncated or damaged ({format_error(error)})"
        ) from None


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Pillow warns of large pictures and damaged metadata; that would reach the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """`image`, decoded, as RGB and turned; the same object if there is nothing to do."""
    rgb = _to_rgb(image, name)
    turn = _TURNS.get(_read_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # else the orientation would be applied again by the next reader
    return rgb


def _read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where it is absent or the metadata is damaged."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make a picture unreadable
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """`image` as RGB: transparency on white, 16 bits and floats brought to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _convert_deep_gray(image, name)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _convert_bands(image, _put_on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_bands(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """RGB of `image`, converted some rows at a time: only two pictures are in memory."""
    rgb = Image.new("RGB", image.size)
    for top, band in _split_bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _split_bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The number of the first row, and the rows, of pieces of about `_BAND_PIXELS`."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _put_on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparency."""
    if image.mode == "La":  # Pillow has no direct way from here to RGBA
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _convert_deep_gray(image: Image.Image, name: str) -> Image.Image:
    """RGB of a gray picture with more than 8 bits.

    Integers are 16 bits; floats are 0..1, 0..255 or 0..65535, whichever is the
    first that holds them all. Pillow and transformers clip at 255 instead.
    """
    extremes = [f(np.asarray(band)) for _, band in _split_bands(image) for f in (np.min, np.max)]
    low, high = float(np.min(extremes)), float(np.max(extremes))
    peaks = (1, 255, 65535) if image.mode == "F" else (65535,)
    peak = next((peak for peak in peaks if low >= 0 and high <= peak), None)
    if peak is None:  # also if a value is not a number
        raise MediaError(
            f"{name} holds gray values from {low:g} to {high:g}; "
            "bring them to 0..1 (float), 0..255 or 0..65535 first"
        )
    transparent: Any = image.info.get("transparency")

    def to_8_bits(band: Image.Image) -> Image.Image:
        values = np.asarray(band).astype(np.float64)
        gray = np.rint(values * (255 / peak)).astype(np.uint8)
        if isinstance(transparent, int):
            gray[values == transparent] = 255
        return Image.fromarray(gray).convert("RGB")

    return _convert_bands(image, to_8_bits)


def _convert_array(array: np.ndarray) -> Image.Image:
    """RGB of an array of pixels."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise MediaError(
            f"an array of shape {array.shape} is not a picture; "
            "give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last"
        )
    check_size((array.shape[1], array.shape[0]), "the array")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is neither
            raise MediaError(
                f"a float array must hold finite values in 0..1, not {low:g}..{high:g}; "
                "divide by the largest possible value, or give uint8"
            )
        array = _to_uint8(array)
    elif array.dtype != np.uint8:
        raise MediaError(
            f"an array of dtype {array.dtype} is not a picture; give uint8, or float in 0..1"
        )
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the array")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """uint8 of floats in 0..1, some rows at a time."""
    result = np.empty(array.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // array.shape[1])
    for top in range(0, len(array), rows):
        values = array[top : top + rows].astype(np.float32).clip(0, 1)
        result[top : top + rows] = np.rint(values * 255)
    return result
