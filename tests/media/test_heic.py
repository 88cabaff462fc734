"""HEIC, as phones write it, and AVIF."""

import io
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.picture import open_image, read_upright_size
from mlx_smolvlm.media.readers import open_reader
from tests.helpers import heic_writer as heic
from tests.helpers.heic_writer import Item, encode, make_grid, write_heic

T = Image.Transpose


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Four colored quarters and a gray mark, of which no turned or mirrored copy is alike."""
    image = Image.new("RGB", (96, 64), (200, 40, 30))
    draw = ImageDraw.Draw(image)
    draw.rectangle((48, 0, 95, 31), fill=(30, 180, 60))
    draw.rectangle((0, 32, 47, 63), fill=(40, 60, 210))
    draw.rectangle((48, 32, 95, 63), fill=(230, 220, 40))
    draw.rectangle((8, 8, 15, 11), fill=(128, 128, 128))
    return image


@pytest.fixture(scope="module")
def plain(photo: Image.Image) -> Item:
    return encode(photo)


def assert_close(got: Image.Image, expected: Image.Image, tolerance: float = 3) -> None:
    assert got.mode == "RGB"
    assert got.size == expected.size
    difference = np.abs(np.asarray(got).astype(int) - np.asarray(expected.convert("RGB")))
    assert difference.max() <= tolerance


def refuse(data: bytes) -> str:
    with pytest.raises(MediaError) as error:
        open_image(data)
    return str(error.value)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("brands", [b"heic\0\0\0\0", b"mif1\0\0\0\0mif1heic", b"heix\0\0\0\0mif1"])
def test_a_picture(photo: Image.Image, plain: Item, wide: bool, brands: bytes) -> None:
    assert_close(open_image(write_heic([plain], brands, wide=wide)), photo)


def test_the_tiles_of_a_grid(photo: Image.Image) -> None:
    cut = photo.crop((0, 0, 90, 60))  # the last tiles reach beyond it
    assert_close(open_image(write_heic(make_grid(cut, 32))), cut)
    assert_close(open_image(write_heic(make_grid(cut, 64), wide=True)), cut)


def test_a_picture_in_another_one(photo: Image.Image, plain: Item) -> None:
    same = Item(b"iden", b"", [heic.ispe(*photo.size), heic.irot(2)], [(b"dimg", [2])])
    assert_close(open_image(write_heic([same, plain])), photo.transpose(T.ROTATE_180))


@pytest.mark.parametrize(
    ("properties", "turns"),
    [
        ([heic.irot(0)], []),
        ([heic.irot(1)], [T.ROTATE_90]),
        ([heic.irot(2)], [T.ROTATE_180]),
        ([heic.irot(3)], [T.ROTATE_270]),
        ([heic.imir(0)], [T.FLIP_TOP_BOTTOM]),
        ([heic.imir(1)], [T.FLIP_LEFT_RIGHT]),
        ([heic.irot(1), heic.imir(0)], [T.ROTATE_90, T.FLIP_TOP_BOTTOM]),
        ([heic.imir(0), heic.irot(1)], [T.FLIP_TOP_BOTTOM, T.ROTATE_90]),
    ],
)
def test_it_is_turned_upright(
    photo: Image.Image, plain: Item, tmp_path: Path, properties: list[bytes],
    turns: list[Image.Transpose],
) -> None:  # fmt: skip
    item = Item(plain.kind, plain.data, [*plain.properties, *properties])
    expected = photo
    for turn in turns:
        expected = expected.transpose(turn)
    (tmp_path / "a.heic").write_bytes(write_heic([item]))
    assert_close(open_image(tmp_path / "a.heic"), expected)
    assert read_upright_size(tmp_path / "a.heic") == expected.size


def test_it_is_cropped_before_it_is_turned(photo: Image.Image, plain: Item, tmp_path: Path) -> None:
    item = Item(plain.kind, plain.data, [*plain.properties, heic.clap(40, 20, 4, -2), heic.irot(1)])
    (tmp_path / "a.heic").write_bytes(write_heic([item]))
    expected = photo.crop((32, 20, 72, 40)).transpose(T.ROTATE_90)
    assert_close(open_image(tmp_path / "a.heic"), expected)
    assert read_upright_size(tmp_path / "a.heic") == (20, 40)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p10le", "yuv444p12le"])
def test_pictures_of_cameras(photo: Image.Image, pix_fmt: str) -> None:
    got = open_image(write_heic([encode(photo, pix_fmt)]))
    difference = np.abs(np.asarray(got).astype(int) - np.asarray(photo))
    assert difference.mean() < 3  # more at edges, since colors have a lower resolution
    assert np.median(difference) <= 2


def test_a_gray_picture(photo: Image.Image) -> None:
    assert_close(open_image(write_heic([encode(photo, "gray")])), photo.convert("L"))


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize(("matrix", "code"), [("ITU601", 6), ("ITU709", 1)])
def test_colors_are_as_the_file_says(
    photo: Image.Image, matrix: str, code: int, is_full: bool
) -> None:
    item = encode(photo, "yuv444p", matrix=matrix, is_full=is_full)
    item.properties += [
        heic.box(b"colr", b"prof", bytes(40)),  # an ICC profile, as in an iPhone's
        heic.nclx(code, is_full),
    ]
    assert_close(open_image(write_heic([item])), photo)
    without = Item(item.kind, item.data, item.properties[:-1])
    if matrix == "ITU601":  # which HEIF means if a file says nothing
        assert_close(open_image(write_heic([without])), photo)


def test_transparent_pixels_are_put_on_white(photo: Image.Image, plain: Item) -> None:
    mask = Image.new("L", photo.size, 255)
    mask.paste(0, (0, 0, 48, 64))
    alpha = encode(mask, "gray")
    alpha.properties.append(heic.full(b"auxC", heic.ALPHA))
    alpha.links.append((b"auxl", [1]))
    expected = Image.composite(photo, Image.new("RGB", photo.size, "white"), mask)
    assert_close(open_image(write_heic([plain, alpha])), expected)
    alpha.properties[-1] = heic.full(b"auxC", b"urn:mpeg:hevc:2015:auxid:2\0")  # depth
    assert_close(open_image(write_heic([plain, alpha])), photo)


# Files that cannot be read


def test_the_size_is_checked_before_anything_is_decoded(plain: Item) -> None:
    item = Item(plain.kind, b"", [plain.properties[0], heic.ispe(60_000, 60_000)])
    assert "60000 x 60000 pixels, above the limit" in refuse(write_heic([item]))
    recipe = struct.pack(">BBBBII", 0, 1, 255, 255, 60_000, 60_000)
    grid = Item(b"grid", recipe, [heic.ispe(8, 8)], [(b"dimg", [2] * 4)])
    assert "60000 x 60000 pixels, above the limit" in refuse(write_heic([grid, plain]))


def test_a_picture_that_is_larger_than_it_says_is_not_decoded() -> None:
    large = encode(Image.new("RGB", (512, 512)))
    item = Item(large.kind, large.data, [large.properties[0], heic.ispe(64, 64)])
    assert "cannot be decoded" in refuse(write_heic([item]))
    small = encode(Image.new("RGB", (64, 64)))
    item = Item(small.kind, small.data, [small.properties[0], heic.ispe(128, 64)])
    assert "a picture has 64 x 64 pixels, not (128, 64)" in refuse(write_heic([item]))


def test_tiles_must_fill_the_grid(photo: Image.Image) -> None:
    grid, *tiles = make_grid(photo, 32)
    for recipe in ((5, 2, 96, 64), (1, 2, 96, 65), (1, 2, 64, 64), (0, 0, 32, 32)):
        grid.data = struct.pack(">BBBBHH", 0, 0, *recipe)
        assert "its tiles do not fill the picture" in refuse(write_heic([grid, *tiles]))


def test_items_cannot_be_read_again_and_again(photo: Image.Image) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    tile = encode(noise)
    recipe = struct.pack(">BBBBHH", 0, 0, 19, 19, 640, 640)
    grid = Item(b"grid", recipe, [heic.ispe(640, 640)], [(b"dimg", [2] * 400)])
    assert "its parts are longer than the file" in refuse(write_heic([grid, tile]))
    around = Item(b"iden", b"", [heic.ispe(32, 32)], [(b"dimg", [1])])
    assert "nested too deeply" in refuse(write_heic([around]))


@pytest.mark.parametrize(
    ("num_items", "message"), [(1, "its parts are longer"), (2, "in too many parts")]
)
def test_a_few_bytes_do_not_describe_gigabytes(plain: Item, num_items: int, message: str) -> None:
    whole = write_heic([plain])
    place = whole.index(b"iloc") + 4
    # Fields of no width: each item has 65,535 parts, from the beginning of the file to its end.
    places = b"".join(struct.pack(">HHHH", 1, 0, 0, 65535) for _ in range(num_items))
    forged = struct.pack(">IBBH", 1 << 24, 0, 0, num_items) + places
    length = len(whole) - len(plain.data) - 8 - place
    data = whole[:place] + forged.ljust(length, b"\0") + whole[place + length :]
    assert message in refuse(data)


@pytest.mark.parametrize("turn", [heic.irot(1), heic.imir(0), heic.clap(90, 60)])
def test_it_is_turned_once(plain: Item, turn: bytes) -> None:
    item = Item(plain.kind, plain.data, [*plain.properties, turn, turn])
    assert "cropped, turned or mirrored twice" in refuse(write_heic([item]))


def test_a_length_of_0_is_up_to_the_end(photo: Image.Image, plain: Item) -> None:
    for is_inside in (False, True):
        item = Item(plain.kind, plain.data, plain.properties, is_inside=is_inside)
        data = bytearray(write_heic([item]))
        end = len(data) - 8 if is_inside else len(data) - len(plain.data) - 8
        assert data[end - 4 : end] == struct.pack(">I", len(plain.data))
        data[end - 4 : end] = bytes(4)
        assert_close(open_image(bytes(data)), photo)


def test_other_kinds_of_pictures_are_named(plain: Item) -> None:
    overlay = Item(b"iovl", b"", [heic.ispe(96, 64)], [(b"dimg", [2])])
    assert refuse(write_heic([overlay, plain])) == (
        "the data is a HEIC picture of an unsupported kind (iovl); save it as PNG or JPEG"
    )
    meta = heic.box(b"ftyp", b"heic\0\0\0\0") + heic.box(b"meta", bytes(5 << 20))
    assert "describes its picture in 5,242,888 bytes, above the limit" in refuse(meta)


def test_a_truncated_file_is_an_error(photo: Image.Image) -> None:
    whole = write_heic(make_grid(photo, 32))
    for end in range(20, len(whole) - 1, 37):
        assert "cannot be decoded; it may be truncated or damaged" in refuse(whole[:end])


def test_damage_is_a_clear_error_or_none(photo: Image.Image) -> None:
    whole = write_heic(make_grid(photo, 32))
    chance = random.Random(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3))):
            damaged[chance.randrange(20, len(whole))] = chance.randrange(256)
        try:
            open_image(bytes(damaged))
            outcomes.add("read")
        except MediaError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_pyav_is_imported_for_heic_alone(plain: Item, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "a.avif")
    (tmp_path / "a.heic").write_bytes(write_heic([plain]))
    program = """if True:
        import sys
        from mlx_smolvlm.media.picture import open_image
        for name in ("a.png", "a.avif", "a.heic"):
            open_image(name)
            print("av" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert done.stdout.split() == [b"False", b"False", b"True"], done.stderr


# AVIF, which Pillow reads


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_upright(photo: Image.Image, orientation: int) -> None:
    pictures = []
    for form, options in (("AVIF", {"quality": 100, "subsampling": "4:4:4"}), ("PNG", {})):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        photo.save(buffer, form, exif=exif, **options)
        pictures.append(open_image(buffer.getvalue()))
    assert_close(*pictures, 4)


def test_transparent_avif_is_put_on_white(photo: Image.Image) -> None:
    clear = photo.copy()
    clear.putalpha(Image.new("L", photo.size, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "AVIF")
    assert_close(open_image(buffer.getvalue()), Image.new("RGB", photo.size, "white"))
    assert refuse(buffer.getvalue()[:200]) == "the data is a truncated or damaged AVIF picture"


# What is no picture, or no video


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n1 0 obj", "the data is a PDF, whose pages cannot be read yet; save them as"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", "the data is a video, not a picture; give it as a"),
        (b"\x1a\x45\xdf\xa3\x01", "the data is a video, not a picture; give it as a video (-v, "),
        (b"<!DOCTYPE html><html>", "the data is a web page, not a picture"),
        (b'<?xml version="1.0"?>\n<svg>', "the data is an SVG drawing; convert it to PNG"),
        (b"hello", "the data is not a picture, or is in a format that cannot be read"),
    ],
)
def test_other_files_are_named(data: bytes, message: str) -> None:
    assert refuse(data).startswith(message)


def test_a_picture_as_a_video(photo: Image.Image, plain: Item) -> None:
    files = {"HEIC": write_heic([plain])}
    for form in ("JPEG", "BMP", "TIFF", "AVIF"):
        buffer = io.BytesIO()
        photo.save(buffer, form)
        files[form] = buffer.getvalue()
    for data in files.values():
        with pytest.raises(MediaError, match=r"is a picture, not a video; .* \(-i, /image\)"):
            open_reader(lambda data=data: io.BytesIO(data), "the file")
