"""Open pictures from any source and in any pixel format as upright RGB.

Deliberate differences from transformers are listed in docs/decisions/images.md.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlx_smolvlm.errors import MediaError, format_error
from mlx_smolvlm.media.budget import MAX_EXIF_BYTES, PictureStream, check_size
from mlx_smolvlm.media.fetch import describe_source, is_remote, open_bytes
from mlx_smolvlm.media.formats import HEAD_BYTES, describe_unknown_picture, is_heic

Size = tuple[int, int]  # width, height

# Formats that Pillow may detect. Others start programs (EPS), refer to further files, or are
# old and little tested. TGA has no signature, so it comes last.
FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF"),
    "TGA",
)

_BAND_PIXELS = 1 << 20  # converted at a time, which bounds memory

# The filters of warnings are global: threads that change and restore them must not overlap.
_FILTERS_LOCK = threading.RLock()

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
    """Open `source` as an RGB picture, turned as its EXIF orientation says.

    Args:
        source: A path, an http(s) URL, a data URI, "-" for standard input, the bytes of
            a file, a PIL image, a matplotlib figure, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 or float in 0..1. Transparent pixels are put on
            white; 16-bit values are scaled to 8 bits.

    Raises:
        MediaError: The source cannot be read or decoded, or exceeds a limit of `budget`.
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
    """Return the PNG file written by a matplotlib figure, or by any object with `savefig`."""
    buffer = io.BytesIO()
    with convert_errors("the figure"):
        figure.savefig(buffer, format="png")
    buffer.seek(0)
    return buffer


def read_upright_size(source: str | Path) -> Size:
    """Return the (width, height) that `open_image` would give for a file, from its header.

    Raises:
        MediaError: The file is not a picture, or exceeds a limit of `budget`.
    """
    with open_bytes(source) as stream, ignore_warnings():
        image = _open_header(stream, describe_source(source))
        width, height = image.size
        is_turned = _read_orientation(image) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def _decode_stream(stream: BinaryIO, name: str) -> Image.Image:
    """Decode the picture in an open file."""
    with ignore_warnings():
        return _load_rgb(_open_header(stream, name), name)


def _open_header(stream: BinaryIO, name: str) -> Image.Image:
    """Read the header of the picture in an open file and check its size."""
    if not stream.read(1):
        raise MediaError(f"{name} is empty")
    limited: Any = PictureStream(stream, name)
    with convert_errors(name):
        image = open_lazily(limited, name)
    limited.end_header()
    check_size(image.size, name)
    return image


def open_lazily(stream: BinaryIO, name: str) -> Image.Image:
    """Open the picture in an open file without decoding it.

    Raises:
        MediaError: The format is neither one of `FORMATS` nor HEIC, or the picture is too large.
    """
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
        if not is_heic(head):
            raise MediaError(f"{name} {describe_unknown_picture(head)}") from None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large: {error}") from None
    from mlx_smolvlm.media.heic import HeicImage  # imports PyAV

    return HeicImage(stream, name)


def _load_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode `image` to upright RGB; errors of the decoder become a MediaError."""
    with convert_errors(name):
        image.load()
        return _to_upright_rgb(image, name)


@contextlib.contextmanager
def convert_errors(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into a MediaError that names the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # plugins raise any exception on damaged data
        raise MediaError(
            f"{name} cannot be decoded; it may be truncated or damaged ({format_error(error)})"
        ) from None


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings of large pictures and damaged metadata."""
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a decoded image to upright RGB; return it unchanged if it already is."""
    rgb = _to_rgb(image, name)
    turn = _TURNS.get(_read_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # else the next reader would apply the orientation again
    return rgb


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or damaged."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels may still be fine
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB: put transparent pixels on white, scale 16 bits and floats to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _convert_deep_gray(image, name)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _convert_bands(image, _put_on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_bands(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert `image` to RGB in bands, so that only two full pictures are in memory."""
    rgb = Image.new("RGB", image.size)
    for top, band in _split_bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _split_bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (first row, band of rows) for bands of about `_BAND_PIXELS`."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _put_on_white(image: Image.Image) -> Image.Image:
    """Composite a transparent image on white."""
    if image.mode == "La":  # Pillow cannot convert it to RGBA directly
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _convert_deep_gray(image: Image.Image, name: str) -> Image.Image:
    """Convert a gray picture with more than 8 bits to RGB.

    Integers range over 0..65535; floats over the first of 0..1, 0..255 and 0..65535 that
    includes all values. Pillow and transformers clip at 255 instead.
    """
    extremes = [f(np.asarray(band)) for _, band in _split_bands(image) for f in (np.min, np.max)]
    low, high = float(np.min(extremes)), float(np.max(extremes))
    peaks = (1, 255, 65535) if image.mode == "F" else (65535,)
    peak = next((peak for peak in peaks if low >= 0 and high <= peak), None)
    if peak is None:  # also for NaN
        raise MediaError(
            f"{name} has gray values from {low:g} to {high:g}; "
            "scale them to 0..1 (float), 0..255 or 0..65535 first"
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
    """Convert an array of pixels to RGB."""
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
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also for NaN
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
    """Convert floats in 0..1 to uint8, in bands."""
    result = np.empty(array.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // array.shape[1])
    for top in range(0, len(array), rows):
        values = array[top : top + rows].astype(np.float32).clip(0, 1)
        result[top : top + rows] = np.rint(values * 255)
    return result
