"""Picture to tiles: opening, resizing, cutting, normalizing.

The numbers are those of transformers' PIL image processors; the few deliberate
differences are in docs/decisions/images.md. Letters in shapes: N tiles, H and W
a tile's pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.fetch import is_remote, open_bytes, short_name

Detail = Literal["high", "auto", "low"] | int
Size = tuple[int, int]  # width, height

MAX_PIXELS = 100_000_000  # of an opened picture, read from its header before it is decoded
MAX_TILES_PER_SIDE = 6  # the prompt has a name for six rows and six columns
MAX_SIDE = 4096  # of the resized picture, as in transformers

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


@dataclass(frozen=True)
class Grid:
    """Rows and columns of tiles that a picture is cut into; `Grid(0, 0)` is one single tile."""

    rows: int
    cols: int

    @property
    def num_tiles(self) -> int:
        """Tiles that the encoder sees: the crops and the global tile (N)."""
        return self.rows * self.cols + 1


@dataclass(frozen=True)
class Tiles:
    """A picture for the encoder: `pixel_values` float32 (N, H, W, 3), the global tile last."""

    pixel_values: np.ndarray
    grid: Grid


def tiles(picture: Image.Image, config: Config, detail: Detail = "high") -> Tiles:
    """Tiles of `picture`: crops row by row, then the whole picture as one tile.

    Args:
        picture: From `open_image`.
        config: Tile size, longest edge, mean and std are read from it.
        detail: See `grid_of`.

    Raises:
        MediaError: As `grid_of`.
    """
    grid = grid_of(picture.size, config, detail)
    if picture.mode != "RGB":
        picture = open_image(picture)
    for size in _resizes(picture.size, config, detail):
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    tile = config.tile_size
    whole = picture.resize((tile, tile), Image.Resampling.LANCZOS) if grid.rows else picture
    pixels = np.asarray(picture)  # (rows * H, cols * W, 3), uint8
    crops = [
        pixels[row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    return Tiles(_normalized([*crops, np.asarray(whole)], config), grid)


def grid_of(size: Size, config: Config, detail: Detail = "high") -> Grid:
    """Grid of a picture of `size` (width, height), without looking at pixels.

    Args:
        size: In pixels.
        config: As in `tiles`.
        detail: "high" resizes the longer side to the checkpoint's longest edge, as in
            training, upscaling too; "auto" never upscales beyond one tile; "low" is one
            tile; a number N is "high" with at most N tiles along the longer side.

    Raises:
        MediaError: `detail` is none of these, or a side would take more than
            `MAX_TILES_PER_SIDE` tiles.
    """
    if min(size) < 1:
        raise MediaError(f"the picture is {size[0]} x {size[1]} pixels; it has nothing to look at")
    width, height = _resizes(size, config, detail)[-1]
    rows, cols = height // config.tile_size, width // config.tile_size
    if rows * cols == 1:
        return Grid(0, 0)
    if max(rows, cols) > MAX_TILES_PER_SIDE:
        raise MediaError(
            f"the picture would take {rows} x {cols} tiles; at most {MAX_TILES_PER_SIDE} a side "
            f"have a name in the prompt: use a detail from 1 to {MAX_TILES_PER_SIDE}"
        )
    return Grid(rows, cols)


def _resizes(size: Size, config: Config, detail: Detail) -> tuple[Size, Size]:
    """Sizes that a picture of `size` is resized to, one after the other.

    The second has sides that are multiples of the tile.
    """
    tile = config.tile_size
    longest_edge = _longest_edge(max(size), config, detail)
    width, height = first = _fit(size, longest_edge)
    if detail == "low" or not config.image.do_image_splitting:
        return first, (tile, tile)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(max(1, int(width / aspect)) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(max(1, int(height * aspect)) / tile) * tile
    return first, (width, height)


def _longest_edge(long_side: int, config: Config, detail: Detail) -> int:
    """Pixels that the longer side of a picture is resized to first."""
    trained, tile = config.image.longest_edge, config.tile_size
    if isinstance(detail, str) and detail in ("high", "auto", "low"):
        if detail == "auto" and config.image.do_image_splitting:
            return min(trained, max(1, long_side // tile) * tile)
        return trained
    if isinstance(detail, int) and type(detail) is not bool and 1 <= detail <= MAX_TILES_PER_SIDE:
        return min(trained, detail * tile) if config.image.do_image_splitting else trained
    raise MediaError(
        f"detail is {detail!r}; it must be 'high', 'auto', 'low' or a number of tiles "
        f"from 1 to {MAX_TILES_PER_SIDE}"
    )


def _fit(size: Size, longest_edge: int) -> Size:
    """`size` scaled so that its longer side is `longest_edge`; the other is made even.

    The division and the truncation are transformers', float for float: another
    order of operations gives other sizes.
    """
    width, height = size
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MAX_SIDE:
        aspect = width / height
        if width >= height:
            width, height = MAX_SIDE, int(MAX_SIDE / aspect)
        else:
            width, height = int(MAX_SIDE * aspect), MAX_SIDE
    return max(width, 1), max(height, 1)


def _normalized(crops: list[np.ndarray], config: Config) -> np.ndarray:
    """`pixel_values` float32 (N, H, W, 3) of uint8 crops (H, W, 3): (x / 255 - mean) / std."""
    tile = config.tile_size
    mean, std = np.array(config.image.mean), np.array(config.image.std)
    # As wide as a row of pixels: numpy is several times slower with rows of three numbers.
    scale = np.tile((1 / (255 * std)).astype(np.float32), (tile, 1))  # (W, 3)
    shift = np.tile((-mean / std).astype(np.float32), (tile, 1))
    pixel_values = np.empty((len(crops), tile, tile, 3), np.float32)
    for out, crop in zip(pixel_values, crops, strict=True):
        np.multiply(crop, scale, out=out)
        out += shift
    return pixel_values


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """The picture in `source` as RGB, turned as its EXIF orientation says.

    Args:
        source: A path, an http(s) URL, a data URI, "-" for standard input, the bytes of
            a file, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4),
            uint8 or float in 0..1. Transparency is laid on white; 16 bits become 8.

    Raises:
        MediaError: It cannot be read or decoded, or has more than `MAX_PIXELS`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, "the image")
        return _guarded(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "the data")
    if not isinstance(source, str | Path):
        raise MediaError(
            f"a picture cannot be of type {type(source).__name__}; "
            "give a path, URL, data URI, bytes, PIL image or numpy array"
        )
    if is_remote(source):
        return _decode(open_bytes(source), short_name(source))
    with open_bytes(source) as stream:
        return _decode(stream, short_name(source))


def _decode(stream: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file."""
    if not stream.read(1):
        raise MediaError(f"{name} is empty")
    stream.seek(0)
    # Pillow warns of large pictures and damaged metadata; the limit here is our own, and
    # a warning would reach the terminal.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(stream)
        except UnidentifiedImageError:
            raise MediaError(
                f"{name} is not a picture in a format that can be read; convert it to PNG or JPEG"
            ) from None
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name} is too large: {error}") from None
        except Exception as error:  # a format plugin raises anything on damaged data
            raise MediaError(_damaged(name, error)) from None
        _check_size(image.size, name)
        return _guarded(image, name)


def _guarded(image: Image.Image, name: str) -> Image.Image:
    """`_upright_rgb` with any failure of the decoder as a MediaError."""
    try:
        image.load()
        return _upright_rgb(image, name)
    except MediaError:
        raise
    except Exception as error:  # a format plugin raises anything on damaged data
        raise MediaError(_damaged(name, error)) from None


def _damaged(name: str, error: Exception) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{name} cannot be decoded; it may be truncated or damaged ({detail})"


def _check_size(size: Size, name: str) -> None:
    """Refuse an empty picture and one with more than `MAX_PIXELS`."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width} x {height} pixels; it has nothing to look at")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} is {width} x {height} pixels, above the limit of "
            f"{MAX_PIXELS // 1_000_000} megapixels; make it smaller first"
        )


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """`image`, decoded, as RGB and turned; the same object if there is nothing to do."""
    rgb = _rgb(image, name)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # else the orientation would be applied again by the next reader
    return rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where it is absent or the metadata is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make a picture unreadable
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """`image` as RGB: transparency on white, 16 bits and floats brought to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep(image, name)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        if image.mode == "La":  # Pillow has no direct way from here to RGBA
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    """RGB of a gray picture with more than 8 bits.

    Integers are 16 bits; floats are 0..1, 0..255 or 0..65535, whichever is the
    first that holds them all. Pillow and transformers clip at 255 instead.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    peaks = (1, 255, 65535) if image.mode == "F" else (65535,)
    peak = next((peak for peak in peaks if low >= 0 and high <= peak), None)
    if peak is None or math.isnan(low):
        raise MediaError(
            f"{name} holds gray values from {low:g} to {high:g}; "
            "bring them to 0..1 (float), 0..255 or 0..65535 first"
        )
    gray = np.rint(values * (255 / peak)).astype(np.uint8)
    transparent: Any = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    """RGB of an array of pixels."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise MediaError(
            f"an array of shape {array.shape} is not a picture; "
            "give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last"
        )
    _check_size((array.shape[1], array.shape[0]), "the array")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is neither
            raise MediaError(
                f"a float array must hold finite values in 0..1, not {low:g}..{high:g}; "
                "divide by the largest possible value, or give uint8"
            )
        array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(
            f"an array of dtype {array.dtype} is not a picture; give uint8, or float in 0..1"
        )
    return _rgb(Image.fromarray(np.ascontiguousarray(array)), "the array")
