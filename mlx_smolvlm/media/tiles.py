"""Resize pictures, cut them into tiles and normalize the pixels.

The results equal those of transformers' PIL image processors, except for the differences
listed in docs/decisions/images.md. Shapes: N is the number of tiles, H and W are the height
and width of a tile in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mlx_smolvlm.config import Config, ImageConfig
from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.picture import open_image

Detail = Literal["high", "auto", "low"] | int
Size = tuple[int, int]  # width, height

MAX_TILES_PER_SIDE = 6  # the tokenizer has tokens for six rows and six columns
MAX_SIDE = 4096  # pixels of the resized picture, as in transformers


@dataclass(frozen=True)
class Grid:
    """Rows and columns of tiles in a picture; `Grid(0, 0)` means a single tile."""

    rows: int
    cols: int

    @property
    def num_tiles(self) -> int:
        """Number of tiles to encode (N): the crops and the global tile."""
        return self.rows * self.cols + 1


@dataclass(frozen=True)
class Tiles:
    """Encoder input for a picture: `pixel_values` float32 (N, H, W, 3), global tile last."""

    pixel_values: np.ndarray
    grid: Grid


def tile_picture(picture: Image.Image, config: Config, detail: Detail = "high") -> Tiles:
    """Cut `picture` into tiles: the crops row by row, then the whole picture as one tile.

    Args:
        picture: From `open_image`.
        config: Gives tile size, longest edge, mean and std.
        detail: As in `compute_grid`.

    Raises:
        MediaError: As in `compute_grid`.
    """
    grid = compute_grid(picture.size, config, detail)
    return Tiles(_normalize(_cut(picture, config, detail), config), grid)


def iterate_tiles(
    picture: Image.Image, config: Config, detail: Detail = "high"
) -> Iterator[np.ndarray]:
    """Yield the tiles (H, W, 3) of `tile_picture` one by one.

    Only one is in memory as floats, which take four times the memory of the pixels.
    """
    for crop in _cut(picture, config, detail):
        yield _normalize([crop], config)[0]


def _cut(picture: Image.Image, config: Config, detail: Detail) -> list[np.ndarray]:
    """Return the crops of `picture` row by row, then the global tile, uint8 (H, W, 3) each."""
    grid = compute_grid(picture.size, config, detail)
    if picture.mode != "RGB":
        picture = open_image(picture)
    for size in _compute_sizes(picture.size, config, detail):
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
    return [*crops, np.asarray(whole)]


def tile_frame(picture: Image.Image, longest_edge: int, config: Config) -> np.ndarray:
    """Return `pixel_values` float32 (1, H, W, 3) of a video frame, which is always one tile.

    The frame is first resized to `longest_edge` pixels, then squashed to the tile.

    Source: transformers 5.23, SmolVLMVideoProcessor.resize.
    """
    tile = config.tile_size
    for size in (_fit(picture.size, longest_edge), (tile, tile)):
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    return _normalize([np.asarray(picture)], config)


def compute_grid(size: Size, config: Config, detail: Detail = "high") -> Grid:
    """Return the grid for a picture of `size`, without decoding it.

    Args:
        size: (width, height) in pixels.
        config: As in `tile_picture`.
        detail: "high" resizes the longer side to the checkpoint's longest edge, as in
            training, even if that upscales; "auto" never upscales beyond one tile; "low"
            is one tile; a number N is "high" with at most N tiles along the longer side.

    Raises:
        MediaError: The picture is empty, `detail` is invalid, or a side would take more
            than `MAX_TILES_PER_SIDE` tiles.
    """
    if min(size) < 1:
        raise MediaError(f"the picture is {size[0]} x {size[1]} pixels, so it is empty")
    width, height = _compute_sizes(size, config, detail)[-1]
    rows, cols = height // config.tile_size, width // config.tile_size
    if rows * cols == 1:
        return Grid(0, 0)
    if max(rows, cols) > MAX_TILES_PER_SIDE:
        raise MediaError(
            f"the picture would take {rows} x {cols} tiles; the prompt allows at most "
            f"{MAX_TILES_PER_SIDE} a side: use a detail from 1 to {MAX_TILES_PER_SIDE}"
        )
    return Grid(rows, cols)


def _compute_sizes(size: Size, config: Config, detail: Detail) -> tuple[Size, Size]:
    """Return the two sizes that a picture is resized to, one after the other.

    The sides of the second are multiples of the tile size.
    """
    tile = config.tile_size
    longest_edge = _choose_longest_edge(max(size), config, detail)
    width, height = first = _fit(size, longest_edge)
    if detail == "low" or not config.image.do_image_splitting:
        return first, (tile, tile)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return first, (width, height)


def _choose_longest_edge(long_side: int, config: Config, detail: Detail) -> int:
    """Return the pixels that the longer side is resized to first."""
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
    """Scale `size` so that its longer side is `longest_edge`; round the other side to even.

    The order of the float operations is that of transformers; another one gives other sizes.
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


def _normalize(crops: list[np.ndarray], config: Config) -> np.ndarray:
    """Return float32 (N, H, W, 3) of uint8 crops (H, W, 3): (x / 255 - mean) / std."""
    tile = config.tile_size
    # Repeated for a row of pixels: numpy broadcasts rows of three numbers several times slower.
    scale, shift = (
        np.tile(one, (tile, 1)) for one in compute_scale_and_shift(config.image)
    )  # (W, 3)
    pixel_values = np.empty((len(crops), tile, tile, 3), np.float32)
    for out, crop in zip(pixel_values, crops, strict=True):
        np.multiply(crop, scale, out=out)
        out += shift
    return pixel_values


def compute_scale_and_shift(image: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift, float32 (3,) each: a byte x of a channel is x * scale + shift."""
    mean, std = np.array(image.mean), np.array(image.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
