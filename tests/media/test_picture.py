"""`open_image`: every source and pixel format, and one clear line for each failure."""

import base64
import io
import os
import stat
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import fetch
from mlx_smolvlm.media.picture import open_image
from tests.helpers import media_cases as cases
from tests.helpers import web_server as web

PICTURE = cases.picture((37, 23))


def encoded(image=PICTURE, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


PNG = encoded()


def same(image, expected=PICTURE):
    return image.mode == "RGB" and image.size == expected.size and pixels(image) == pixels(expected)


def pixels(image):
    return image.convert("RGB").tobytes()


def refused(source):
    """The message of the MediaError that `source` gives."""
    with pytest.raises(MediaError) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# Sources


def test_path_string_bytes_and_image(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    for source in (path, str(path), PNG, bytearray(PNG), memoryview(PNG), PICTURE):
        assert same(open_image(source))


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PNG)
    assert same(open_image("~/a.png"))


def test_a_file_is_closed_and_can_be_removed(tmp_path):
    path = tmp_path / "a.gif"
    PICTURE.quantize(8).save(path, save_all=True, append_images=[PICTURE.quantize(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        picture = open_image(path)
    path.unlink()
    assert picture.resize((5, 5)).size == (5, 5)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PNG)))
    assert same(open_image("-"))
    assert refused("-") == "standard input is empty"


def test_a_pipe_is_read_like_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(PNG))
    writer.start()
    assert same(open_image(path))
    writer.join()


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "DATA:;BASE64," + base64.b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64,\n  " + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
def test_data_uri(uri):
    assert same(open_image(uri))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_data_uri_without_padding(extra):
    text = base64.b64encode(PNG + bytes(extra)).decode().rstrip("=")
    assert same(open_image(f"data:image/png;base64,{text}"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64," + base64.b64encode(PNG).decode() + "!!!!", "not valid base64"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,a!!!", "not valid base64"),
        ("data:image/png;base64,", "data URI is empty"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
    ],
)
def test_bad_data_uri(uri, message):
    assert message in refused(uri)


class Handler(web.QuietHandler):
    def do_GET(self):  # noqa: N802  (the name that http.server calls)
        code, headers, body = 200, {}, PNG
        if self.path == "/missing.png":
            code, body = 404, b"no"
        elif self.path.startswith("/to-"):
            target = {"/to-file": "file:///etc/hostname", "/to-ftp": "ftp://127.0.0.1/a"}
            code, body = 302, b""
            headers["Location"] = target.get(self.path, "/ok.png")
        elif self.path == "/loop":
            code, body = 302, b""
            headers["Location"] = "/loop"
        elif self.path == "/text":
            body = b"<html>hello</html>"
        elif self.path == "/short":
            headers["Content-Length"] = str(len(PNG) + 10)
        elif self.path == "/large":
            body = PNG + bytes(5000)
        elif self.path == "/empty":
            body = b""
        elif self.path == "/slow":
            threading.Event().wait(1.5)
        self.send_response(code)
        headers.setdefault("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def site():
    with web.serve(Handler) as address:
        yield address


@pytest.mark.parametrize("path", ["/ok.png", "/to-ok", "/größe und leer.png?a=b#c"])
def test_url(site, path):
    assert same(open_image(site + path))
    assert same(open_image(site.replace("http", "HTTP") + path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing.png", "HTTP 404"),
        ("/to-file", "file"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/loop", "HTTP 302"),
        ("/text", "not a picture"),
        ("/empty", "is empty"),
        ("/short", f"sent {len(PNG)} of {len(PNG) + 10} bytes"),
    ],
)
def test_url_that_fails(site, path, message):
    assert message in refused(site + path)


def test_url_size_cap(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 4000)
    monkeypatch.setattr(fetch, "_CHUNK", 1000)
    assert "larger than" in refused(site + "/large")


def test_url_timeout_and_deadline(site, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    assert "timed out" in refused(site + "/slow") or "sent nothing" in refused(site + "/slow")
    monkeypatch.setattr(fetch, "DEADLINE_S", -1.0)
    assert "took longer" in refused(site + "/ok.png")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/a.png", "scheme 'ftp'"),
        ("file:///etc/hostname", "scheme 'file'"),
        ("http://127.0.0.1:1/a.png", "cannot be fetched: Connection refused"),
        ("http://", "cannot be fetched"),
        ("http://[1/a.png", "cannot be fetched"),
        ("http://127.0.0.1:port/a.png", "cannot be fetched"),
    ],
)
def test_bad_url(url, message):
    assert message in refused(url)


def test_a_url_is_named_without_its_secrets(site):
    message = refused(site.replace("//", "//me:secret@") + "/missing.png?token=hidden")
    assert "secret" not in message
    assert "hidden" not in message
    assert "/missing.png" in message


# Files that cannot be read


def test_missing_folder_empty_and_unreadable(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.png")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty" in refused(tmp_path / "empty.png")
    assert "is empty" in refused(b"")
    assert "path is empty" in refused("")
    assert "cannot be opened" in refused("a\0b")
    assert "cannot be opened" in refused("x" * 5000)
    assert "not a picture" in refused(__file__)
    assert "type int" in refused(3)
    assert "type NoneType" in refused(None)


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def deny(*_):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", deny)
    assert "check its permissions" in refused(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_picture_is_an_error(form, part):
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    assert open_image(data).size == (120, 90)
    message = refused(data[: int(len(data) * part)])
    assert "truncated" in message or "not a picture" in message


def test_truncation_is_found_without_its_last_lines():
    data = encoded(cases.picture((200, 200)), "JPEG")
    assert "truncated" in refused(data[: len(data) - 400])


def png_header(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width // 8 + 1) * 8))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 14_143, 60_000])
def test_a_bomb_is_refused_by_its_header(side, monkeypatch):
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = refused(png_header(side, side))
    assert "megapixels" in message or "too large" in message
    assert not decoded
    assert not caught
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_picture_below_the_limit_warns_of_nothing():
    data = encoded(Image.new("1", (9600, 9600)))  # above Pillow's own threshold
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (9600, 9600)


def test_an_image_object_has_the_same_limit():
    assert "megapixels" in refused(Image.new("1", (10_001, 10_000)))
    assert "0 x 4" in refused(Image.new("RGB", (0, 4)))


# Pixel formats


@pytest.mark.parametrize("mode", cases.MODES)
def test_modes_are_laid_on_white(mode):
    image = cases.picture((40, 30), mode)
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if mode in ("CMYK", "YCbCr"):
        expected = image.convert("RGB")
    assert same(open_image(image), expected)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode):
    straight = cases.picture((40, 30), mode.replace("a", "A"))
    difference = np.subtract(open_image(straight.convert(mode)), open_image(straight), dtype=int)
    assert abs(difference).max() <= 2


def test_transparency_survives_the_file_format():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert open_image(encoded(image)).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert open_image(encoded(palette)).getpixel((1, 1)) == (10, 200, 30)
    assert open_image(encoded(palette, transparency=1)).getpixel((1, 1)) == (255, 255, 255)


def deep(mode="I;16"):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    if mode == "I":
        return Image.fromarray(values.astype(np.int32))
    return Image.fromarray(values.astype(">u2" if mode == "I;16B" else "<u2"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight(mode):
    image = deep(mode)
    assert image.mode == mode
    expected = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert same(open_image(image), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_dark_sixteen_bits_stay_dark(dtype):
    assert open_image(Image.fromarray(np.full((4, 4), 255, dtype))).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_in_a_file(form):
    expected = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert same(open_image(encoded(deep(), form)), expected)


def test_sixteen_bits_with_a_transparent_gray():
    assert open_image(encoded(deep(), transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("peak", [1, 255, 65535])
def test_float_gray(peak):
    values = np.linspace(0, peak, 256, dtype=np.float32).reshape(16, 16)
    expected = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert same(open_image(Image.fromarray(values)), expected)


@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan"), float("inf")])
def test_float_gray_out_of_range(value):
    values = np.zeros((4, 4), np.float32)
    values[1, 1] = value
    assert "gray values" in refused(Image.fromarray(values))


def test_negative_and_wide_integers_are_refused():
    for value in (-5, 70000):
        assert "gray values" in refused(Image.fromarray(np.full((4, 4), value, np.int32)))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((3, 3)) == (255, 0, 0), form


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(form, {})
    data = encoded(PICTURE, form, exif=exif, **options)
    stored = Image.open(io.BytesIO(encoded(PICTURE, form, **options)))
    stored.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(stored)
    result = open_image(data)
    assert same(result, expected)
    assert same(open_image(result), expected), "turned twice"
    assert result.size == ((23, 37) if orientation > 4 else (37, 23))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0\x2a\xff\xff\xff\xff broken",
        b"Exif\0\0garbage that is no header",
        b"Exif\0\0MM",
    ],
)
def test_damaged_metadata_does_not_matter(exif, form):
    data = encoded(PICTURE, form)
    damaged = encoded(PICTURE, form, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(open_image(damaged), open_image(data))


def test_a_given_image_is_left_alone():
    image = cases.picture((20, 10), "RGB+A")
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes(), dict(image.info), image.size
    assert open_image(image).size == (10, 20)
    assert before == (image.tobytes(), dict(image.info), image.size)
    assert open_image(PICTURE) is PICTURE


def test_a_closed_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    image = Image.open(tmp_path / "a.png")
    image.close()
    assert "cannot be decoded" in refused(image)


# Arrays


def test_arrays():
    array = np.asarray(PICTURE)
    assert same(open_image(array))
    assert same(open_image(array[::-1]), ImageOps.flip(PICTURE))
    for dtype in (np.float32, np.float64):
        assert same(open_image((array / 255).astype(dtype)))
    assert (
        abs(np.subtract(open_image((array / 255).astype(np.float16)), array, dtype=int)).max() < 2
    )
    gray = Image.fromarray(array[:, :, 0])
    assert same(open_image(array[:, :, 0]), gray)
    assert same(open_image(array[:, :, :1]), gray)
    rgba = cases.picture((37, 23), "RGBA")
    assert same(open_image(np.asarray(rgba)), open_image(rgba))


def test_float_arrays_are_rounded():
    assert open_image(np.full((2, 2, 3), 0.999, np.float32)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), "shape (5,)"),
        (np.zeros((3, 20, 20), np.uint8), "channels last"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape (1, 4, 4, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4), complex), "dtype complex128"),
        (np.full((4, 4), np.nan), "finite"),
        (np.full((4, 4), np.inf), "finite"),
        (np.full((4, 4), 200.0), "divide"),
        (np.full((4, 4), -0.5), "divide"),
    ],
)
def test_wrong_arrays(array, message):
    assert message in refused(array)


def test_an_array_beyond_the_limit():
    huge = np.broadcast_to(np.uint8(0), (10_001, 10_000, 3))
    assert "megapixels" in refused(huge)
