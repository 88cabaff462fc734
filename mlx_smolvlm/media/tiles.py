"""Picture to tiles: resizing, cutting, normalizing.

The numbers are those of transformers' PIL image processors; the few deliberate
differences are in docs/decisions/images.md. Letters in shapes: N tiles, H and W
a tile's pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mlx_smolvlm.config import Config, ImageConfig
from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.picture import open_image

Detail = Literal["high", "auto", "low"] | int
Size = tuple[int, int]  # width, height

MAX_TILES_PER_SIDE = 6  # the prompt has a name for six rows and six columns
MAX_SIDE = 4096  # of the resized picture, as in transformers


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


def tile_picture(picture: Image.Image, config: Config, detail: Detail = "high") -> Tiles:
    """Tiles of `picture`: crops row by row, then the whole picture as one tile.

    Args:
        picture: From `open_image`.
        config: Tile size, longest edge, mean and std are read from it.
        detail: See `compute_grid`.

    Raises:
        MediaError: As `compute_grid`.
    """
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
    return Tiles(_normalize([*crops, np.asarray(whole)], config), grid)


def tile_frame(picture: Image.Image, longest_edge: int, config: Config) -> np.ndarray:
    """`pixel_values` float32 (1, H, W, 3) of a frame: one tile, whatever `do_image_splitting`.

    It is resized to `longest_edge` first and squashed to the tile then.

    Source: transformers 5.23, SmolVLMVideoProcessor.resize.
    """
    tile = config.tile_size
    for size in (_fit(picture.size, longest_edge), (tile, tile)):
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    return _normalize([np.asarray(picture)], config)


def compute_grid(size: Size, config: Config, detail: Detail = "high") -> Grid:
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
    width, height = _compute_sizes(size, config, detail)[-1]
    rows, cols = height // config.tile_size, width // config.tile_size
    if rows * cols == 1:
        return Grid(0, 0)
    if max(rows, cols) > MAX_TILES_PER_SIDE:
        raise MediaError(
            f"the picture would take {rows} x {cols} tiles; at most {MAX_TILES_PER_SIDE} a side "
            f"have a name in the prompt: use a detail from 1 to {MAX_TILES_PER_SIDE}"
        )
    return Grid(rows, cols)


def _compute_sizes(size: Size, config: Config, detail: Detail) -> tuple[Size, Size]:
    """Sizes that a picture of `size` is resized to, one after the other.

    The second has sides that are multiples of the tile.
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


def _normalize(crops: list[np.ndarray], config: Config) -> np.ndarray:
    """`pixel_values` float32 (N, H, W, 3) of uint8 crops (H, W, 3): (x / 255 - mean) / std."""
    tile = config.tile_size
    # As wide as a row of pixels: numpy is several times slower with rows of three numbers.
    scale, shift = (
        np.tile(one, (tile, 1)) for one in compute_scale_and_shift(config.image)
    )  # (W, 3)
    pixel_values = np.empty((len(crops), tile, tile, 3), np.float32)
    for out, crop in zip(pixel_values, crops, strict=True):
        np.multiply(crop, scale, out=out)
        out += shift
    return pixel_values


def compute_scale_and_shift(image: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """What a byte of each channel is multiplied by, and what is added then; float32 (3,) each."""
    mean, std = np.array(image.mean), np.array(image.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
