"""Tiles and grids against transformers' PIL image processors."""

import importlib.util

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.tiles import Grid, compute_grid, tile_picture
from tests.helpers import media_cases as cases
from tests.helpers import oracle

KINDS = ("idefics3", "smolvlm")


def check(processor, config, picture, theirs=None, detail="high"):
    """Compare `picture`, opened here, with `theirs`, or the same, given to transformers."""
    result = tile_picture(open_image(picture), config, detail)
    expected, grid = oracle.processed(processor, picture if theirs is None else theirs)
    assert result.grid == Grid(*grid)
    assert result.pixel_values.shape == expected.shape
    assert np.abs(result.pixel_values - expected).max() <= 1e-5


@pytest.mark.parametrize("size", cases.SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("tile", "longest_edge"), cases.SCALES)
def test_sizes(size, tile, longest_edge):
    processor = oracle.image_processor("smolvlm", tile, longest_edge)
    check(processor, cases.config(tile, longest_edge), cases.picture(size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splitting", [True, False])
def test_both_families_with_and_without_splitting(kind, splitting):
    processor = oracle.image_processor(kind, 512, 2048, splitting)
    check(processor, cases.config(splitting=splitting), cases.picture((701, 430)))


@pytest.mark.parametrize("size", [(700, 430), (90, 1200), (512, 512)])
def test_low_is_splitting_turned_off(size):
    processor = oracle.image_processor("smolvlm", 512, 2048, splitting=False)
    check(processor, cases.config(), cases.picture(size), detail="low")


@pytest.mark.parametrize(
    ("size", "detail", "longest_edge"),
    [
        ((1100, 430), "auto", 1024),
        ((300, 430), "auto", 512),
        ((1700, 2900), "auto", 2048),
        ((640, 480), 1, 512),
        ((640, 480), 3, 1536),
        ((640, 480), 6, 2048),
    ],
)
def test_other_details_are_another_longest_edge(size, detail, longest_edge):
    processor = oracle.image_processor("smolvlm", 512, longest_edge)
    check(processor, cases.config(), cases.picture(size), detail=detail)


@pytest.mark.parametrize("mode", cases.MODES)
def test_modes_as_transformers_reads_them(mode):
    processor = oracle.image_processor("smolvlm", 128, 256)
    check(processor, cases.config(128, 256), cases.picture((300, 200), mode))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation):
    picture = cases.picture((300, 200))
    picture.getexif()[0x0112] = orientation
    processor = oracle.image_processor("smolvlm", 128, 256)
    check(processor, cases.config(128, 256), picture, ImageOps.exif_transpose(picture))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_gray_is_transformers_on_eight_bits(mode):
    gray = cases.pattern(300, 200, 1)[:, :, 0]
    scale = 1 / 255 if mode == "F" else 257
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    picture = Image.fromarray((gray.astype(np.float64) * scale).astype(dtype))
    assert picture.mode == mode
    processor = oracle.image_processor("smolvlm", 128, 256)
    check(processor, cases.config(128, 256), picture, Image.fromarray(gray))


def test_first_frame_of_a_gif(tmp_path):
    frames = [cases.picture((300, 200)).quantize(64), cases.picture((300, 200)).quantize(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    processor = oracle.image_processor("smolvlm", 128, 256)
    with Image.open(tmp_path / "a.gif") as theirs:
        check(processor, cases.config(128, 256), tmp_path / "a.gif", theirs)


def their_grid(processor, width, height):
    """transformers' grid, with views of one pixel in place of pictures."""

    def resize(image, size, resample=None):
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))

    module = importlib.import_module(type(processor).__module__)
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    new_height, new_width = module.get_resize_output_image_size(image, processor.size.longest_edge)
    image = np.broadcast_to(np.uint8(0), (3, new_height, new_width))
    processor.resize = resize
    tile = processor.max_image_size["longest_edge"]
    image = processor.resize_for_vision_encoder(image, tile)
    _, rows, cols = processor.split_images(image, processor.max_image_size)
    return Grid(rows, cols)


side = st.one_of(st.integers(1, 64), st.integers(1, 6000), st.integers(1, 200_000))
near = st.integers(1, 4096).flatmap(
    lambda n: st.tuples(st.just(n), st.sampled_from([max(1, n - 1), n, n + 1, 2 * n, 4 * n + 1]))
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "longest_edge"), [*cases.SCALES, (384, 1920), (364, 1820), (100, 333), (1024, 6000)]
)
def test_grids(kind, tile, longest_edge):
    config = cases.config(tile, longest_edge)
    processor = oracle.image_processor(kind, tile, longest_edge)

    @given(size=st.one_of(st.tuples(side, side), near))
    @example(size=(200_000, 1))
    @example(size=(1, 200_000))
    @settings(max_examples=400, deadline=None)
    def compare(size):
        assert compute_grid(size, config) == their_grid(processor, *size)

    compare()
