"""Tiles and grids: against recorded numbers of transformers, and by property."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import tiles
from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.tiles import Grid, compute_grid, iterate_tiles, tile_picture
from tests.helpers import media_cases as cases

GOLDENS = cases.load_golden("images")
CONFIG = cases.config()
SMALL = cases.config(tile=16, longest_edge=64)


def name_of(golden):
    width, height = golden["size"]
    return f"{golden['tile']}-{golden['longest_edge']}-{width}x{height}-{golden['mode']}"


@pytest.mark.parametrize("golden", GOLDENS, ids=name_of)
def test_pixel_values_and_grid_are_those_of_transformers(golden):
    config = cases.config(golden["tile"], golden["longest_edge"], golden["splitting"])
    picture = open_image(cases.picture(golden["size"], golden["mode"]))
    result = tile_picture(picture, config)
    assert result.grid == Grid(*golden["grid"])
    assert result.pixel_values.dtype == np.float32
    assert list(result.pixel_values.shape) == golden["shape"]
    np.testing.assert_allclose(cases.sampled(result.pixel_values), golden["values"], atol=1e-5)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (3, 4)),
        ((480, 640), (4, 3)),
        ((512, 512), (4, 4)),
        ((1920, 1080), (3, 4)),
        ((3000, 1000), (2, 4)),
        ((5000, 500), (1, 4)),
        ((1241, 1754), (4, 3)),
        ((1275, 1650), (4, 4)),
        ((1, 1), (4, 4)),
        ((100_000, 1), (1, 4)),
        ((1, 100_000), (4, 1)),
    ],
)
def test_grids_of_the_published_table(size, grid):
    assert compute_grid(size, CONFIG) == Grid(*grid)


def test_global_tile_comes_last_and_crops_go_row_by_row():
    array = np.zeros((32, 48, 3), np.uint8)
    for row in range(2):
        for col in range(3):
            array[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = 40 * (row * 3 + col)
    result = tile_picture(Image.fromarray(array), cases.config(tile=16, longest_edge=48))
    assert result.grid == Grid(2, 3)
    values = np.rint((result.pixel_values + 1) * 127.5)
    assert [np.unique(tile).tolist() for tile in values[:6]] == [[40 * n] for n in range(6)]
    assert len(np.unique(values[6])) > 6


def test_channels_are_normalized_each_on_its_own():
    config = cases.config(16, 16, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixel_values = tile_picture(Image.new("RGB", (16, 16), (255, 51, 0)), config).pixel_values
    np.testing.assert_allclose(pixel_values[0, 3, 5], [1.8, 0.0, -0.15], atol=1e-6)


def test_tiles_do_not_touch_the_picture():
    picture = cases.picture((64, 64))
    before = picture.tobytes()
    tile_picture(picture, SMALL)
    assert picture.tobytes() == before
    assert picture.size == (64, 64)


def test_tiles_take_a_picture_of_any_mode():
    expected = tile_picture(open_image(cases.picture((40, 30), "RGBA")), SMALL).pixel_values
    result = tile_picture(cases.picture((40, 30), "RGBA"), SMALL).pixel_values
    np.testing.assert_array_equal(result, expected)


def test_tiles_can_be_made_one_by_one(monkeypatch):
    picture, made = cases.picture((60, 40)), []
    monkeypatch.setattr(tiles, "_normalize", record_sizes(tiles._normalize, made))
    one_by_one = iterate_tiles(picture, SMALL)
    first = next(one_by_one)
    assert made == [1]
    expected = tile_picture(picture, SMALL).pixel_values
    np.testing.assert_array_equal([first, *one_by_one], expected)


def record_sizes(normalize, made):
    """`normalize`, which also appends the number of its crops to `made`."""

    def call(crops, config):
        made.append(len(crops))
        return normalize(crops, config)

    return call


sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
details = st.sampled_from(["high", "auto", "low", 1, 2, 3, 4, 5, 6])


@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), detail=details)
@settings(max_examples=60, deadline=None)
def test_tiles_are_as_many_as_the_grid_says(size, detail):
    result = tile_picture(Image.new("RGB", size), SMALL, detail)
    assert result.grid == compute_grid(size, SMALL, detail)
    assert result.pixel_values.shape == (result.grid.num_tiles, 16, 16, 3)


@given(size=sizes)
@settings(max_examples=300, deadline=None)
def test_auto_never_upscales_beyond_one_tile(size):
    grid = compute_grid(size, CONFIG, "auto")
    longer = max(grid.rows, grid.cols, 1)
    assert longer == 1 or longer * 512 <= max(size)
    assert longer == min(4, max(1, max(size) // 512))


@given(size=sizes)
@settings(max_examples=300, deadline=None)
def test_a_picture_of_full_size_is_the_same_in_auto_as_in_high(size):
    width, height = size
    large = (2048 * width, 2048 * height)
    assert compute_grid(large, CONFIG, "auto") == compute_grid(large, CONFIG, "high")


@given(size=sizes, count=st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_a_number_caps_the_longer_side(size, count):
    grid = compute_grid(size, CONFIG, count)
    assert max(grid.rows, grid.cols, 1) == min(count, 4)
    if count >= 4:
        assert grid == compute_grid(size, CONFIG, "high")


def test_auto_reads_a_large_picture_at_the_scale_below():
    picture = cases.picture((1100, 600))
    auto = tile_picture(picture, CONFIG, "auto")
    high = tile_picture(picture, cases.config(512, 1024), "high")
    assert auto.grid == Grid(2, 2)
    np.testing.assert_array_equal(auto.pixel_values, high.pixel_values)


def test_low_is_the_picture_as_one_tile():
    picture = cases.picture((1100, 600))
    low = tile_picture(picture, CONFIG, "low")
    unsplit = tile_picture(picture, cases.config(splitting=False), "high")
    assert low.grid == Grid(0, 0)
    np.testing.assert_array_equal(low.pixel_values, unsplit.pixel_values)


@pytest.mark.parametrize("detail", ["high", "auto", "low", 1, 4])
def test_a_checkpoint_without_splitting_has_one_tile(detail):
    config = cases.config(splitting=False)
    assert compute_grid((3000, 2000), config, detail) == Grid(0, 0)
    picture = cases.picture((300, 200))
    np.testing.assert_array_equal(
        tile_picture(picture, config, detail).pixel_values,
        tile_picture(picture, config).pixel_values,
    )


@pytest.mark.parametrize("detail", [0, 7, -1, True, 2.0, "medium", None])
@pytest.mark.parametrize("splitting", [True, False])
def test_an_unknown_detail_is_refused(detail, splitting):
    with pytest.raises(MediaError, match=r"detail is .*'high', 'auto', 'low'.*1 to 6"):
        compute_grid((640, 480), cases.config(splitting=splitting), detail)


def test_more_than_six_tiles_a_side_are_refused():
    config = cases.config(tile=16, longest_edge=16 * 7)
    with pytest.raises(MediaError, match=r"7 x 7 tiles.*at most 6"):
        compute_grid((100, 100), config)
    assert compute_grid((100, 100), config, 6) == Grid(6, 6)


def test_an_empty_picture_has_no_grid():
    with pytest.raises(MediaError, match="0 x 5"):
        compute_grid((0, 5), CONFIG)


def test_sides_are_bounded():
    wide = cases.config(tile=1024, longest_edge=6144)
    assert compute_grid((6144, 3072), wide) == Grid(2, 4)
    assert compute_grid((100_000, 1), wide) == Grid(1, 4)
    assert compute_grid((1, 100_000), wide) == Grid(4, 1)


def test_num_tiles_counts_the_global_tile():
    assert Grid(0, 0).num_tiles == 1
    assert Grid(3, 4).num_tiles == 13
