"""Small files that describe gigabytes are refused or read within limits."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, MspImagePlugin

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import budget, decode, picture
from mlx_smolvlm.media.animation import AnimationReader
from mlx_smolvlm.media.picture import FORMATS, open_image
from mlx_smolvlm.media.readers import open_reader
from mlx_smolvlm.media.video import open_parts, open_video
from tests.helpers import media_cases as cases
from tests.helpers import video_cases as clips


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def refused(data):
    """The message of the MediaError raised for a picture."""
    with pytest.raises(MediaError) as caught:
        open_image(data)
    return str(caught.value)


def reader_of(data):
    return open_reader(lambda: io.BytesIO(data), "the file")


# Formats


def test_encapsulated_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("started"))
    path = tmp_path / "photo.png"
    path.write_bytes(saved(cases.picture((20, 10)), "EPS"))
    assert "is not a picture, or is in a format that cannot be read" in refused(path)


@pytest.mark.parametrize("form", ["MSP", "PCX", "SGI", "XBM", "DDS", "SPIDER"])
def test_formats_that_nobody_sends(form):
    assert MspImagePlugin.MspImageFile.format == "MSP"
    modes = {"MSP": "1", "XBM": "1", "SPIDER": "F"}
    data = saved(cases.picture((20, 12)).convert(modes.get(form, "RGB")), form)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == form
    assert "is not a picture, or is in a format" in refused(data)


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_formats_that_people_send(form):
    options = (
        {"save_all": True, "append_images": [cases.picture((32, 32))]} if form == "MPO" else {}
    )
    with Image.open(io.BytesIO(saved(cases.picture((32, 32)), form, **options))) as image:
        assert image.format == form
        expected = image.convert("RGB")
    assert open_image(saved(cases.picture((32, 32)), form)).tobytes() == expected.tobytes()


# Pixels


@pytest.fixture
def bands(monkeypatch):
    """Limit bands to 60 pixels; a list of the pixel counts of all bands."""
    monkeypatch.setattr(picture, "_BAND_PIXELS", 60)
    sizes = []

    def counted(function, count):
        def call(*arguments):
            result = function(*arguments)
            sizes.append(count(result))
            return result

        return call

    monkeypatch.setattr(picture.np, "rint", counted(np.rint, np.size))
    composite = counted(Image.alpha_composite, lambda image: image.width * image.height)
    monkeypatch.setattr(picture.Image, "alpha_composite", composite)
    return sizes


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_gray_is_converted_in_bands(mode, bands):
    values = np.random.default_rng(0).integers(0, 65536, (37, 23))
    image = Image.fromarray(values.astype({"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]))
    image.info["transparency"] = int(values[20, 7])
    got = np.asarray(open_image(image))
    expected = (values / 257 + 0.5).astype(np.uint8)  # no value lies halfway
    expected[values == values[20, 7]] = 255
    assert (got == expected[:, :, None]).all()
    assert len(bands) > 10
    assert max(bands) <= 60


@pytest.mark.parametrize("place", [(0, 0), (36, 22)])
@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan")])
def test_a_bad_value_in_any_band_is_found(place, value, bands):
    values = np.zeros((37, 23), np.float32)
    values[place] = value
    with pytest.raises(MediaError, match="gray values"):
        open_image(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P+A", "RGB+A", "L+A"])
def test_transparency_is_laid_on_white_in_bands(mode, bands):
    image = cases.picture((23, 37), mode)
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    bands.clear()
    assert open_image(image).tobytes() == expected.tobytes()
    assert len(bands) > 10
    assert max(bands) <= 60


def test_float_arrays_are_converted_in_bands(bands):
    values = np.random.default_rng(0).random((37, 23, 3))
    got = np.asarray(open_image(values))
    assert len(bands) > 10
    assert max(bands) <= 60 * 3
    assert (got == np.rint(values.astype(np.float32) * 255).astype(np.uint8)).all()


# Headers


def with_segments(*bodies):
    """A JPEG with these APP1 segments behind its first marker."""
    data = saved(cases.picture((20, 10)), "JPEG")
    made = b"".join(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body for body in bodies)
    return data[:2] + made + data[2:]


def test_many_exif_segments_are_refused():
    """Pillow concatenates them one by one, which takes quadratic time."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes() + bytes(60_000)
    assert open_image(with_segments(body)).size == (10, 20)
    assert open_image(with_segments(body, b"Exif\0\0" + bytes(60_000))).size == (10, 20)
    many = with_segments(body, *[b"Exif\0\0" + bytes(65_000)] * 500)
    assert "too much Exif data; save it again" in refused(many)


def test_other_segments_may_be_many():
    """Depth maps and panoramas use hundreds of them."""
    body = b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)
    assert open_image(with_segments(*[body] * 100)).size == (20, 10)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_header_of_very_many_pieces_is_refused(monkeypatch):
    data = saved(cases.picture((20, 10)), "PNG")
    many = data[:33] + chunk(b"abCd", b"") * 2000 + data[33:]
    assert open_image(many).size == (20, 10)
    monkeypatch.setattr(budget, "MAX_READS", 1000)
    assert "takes too long to read" in refused(many)
    assert open_image(data).size == (20, 10)
    jpeg = saved(cases.picture((20, 10)), "JPEG")
    assert "takes too long to read" in refused(jpeg[:2] + b"\xff" * 5000 + jpeg[2:])


def test_a_header_that_is_read_over_and_over(monkeypatch):
    """Such as TIFF tags that all refer to the same bytes. Pixels may be read several times."""
    monkeypatch.setattr(budget, "_READ_SLACK", 0)
    stream = budget.PictureStream(io.BytesIO(bytes(1000)), "it")
    for _ in range(budget.MAX_HEADER_RATIO):
        assert len(stream.read()) == 1000
        stream.seek(0)
    with pytest.raises(MediaError, match="it is built in a way that takes too long"):
        stream.read()
    stream.end_header()
    assert len(stream.read()) == 0
    stream.seek(0)
    assert len(stream.read()) == 1000


def test_a_picture_in_thousands_of_strips(monkeypatch):
    """Only what is read before the pixels is limited: Pillow may read 64 KiB for each strip."""
    monkeypatch.setattr(budget, "_READ_SLACK", 0)
    monkeypatch.setattr(budget, "MAX_HEADER_RATIO", 1)
    image = cases.picture((40, 3000), "L")
    data = saved(image, "TIFF", tiffinfo={278: 1})
    with Image.open(io.BytesIO(data)) as opened:
        assert len(opened.tile) == 3000
    assert open_image(data).tobytes() == image.convert("RGB").tobytes()


def test_a_file_above_the_limit(monkeypatch):
    data = saved(cases.picture((20, 10)), "PNG")
    monkeypatch.setattr(budget, "MAX_PICTURE_BYTES", len(data) - 1)
    assert f"has {len(data):,} bytes, above the limit" in refused(data)


def test_an_icon_that_is_larger_than_its_directory_says(monkeypatch):
    inner = saved(Image.new("RGB", (300, 300)), "PNG")
    head = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    assert open_image(head + inner).size == (300, 300)
    monkeypatch.setattr(budget, "MAX_PIXELS", 1000)
    assert "300 x 300 pixels, above the limit" in refused(head + inner)


# Animations


def gif(size, frames):
    """A GIF whose frames paint one pixel each."""
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\x04\x04\x0a\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    return head + frame * frames + b";"


def apng(size, frames):
    """A PNG with frames of one pixel after the first one."""
    control = lambda n, w, h: chunk(  # noqa: E731
        b"fcTL", struct.pack(">IIIIIHHBB", n, w, h, 0, 0, 1, 10, 0, 0)
    )
    rows = zlib.compress(bytes((size[0] + 1) * size[1]), 9)
    dot = zlib.compress(bytes(2))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    data += chunk(b"acTL", struct.pack(">II", frames, 0)) + control(0, *size) + chunk(b"IDAT", rows)
    for n in range(1, frames):
        data += control(2 * n - 1, 1, 1) + chunk(b"fdAT", struct.pack(">I", 2 * n) + dot)
    return data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "size", "frames"),
    [
        (gif, (9999, 9999), 200),
        (gif, (500, 500), 20_000),
        (apng, (600, 600), 5000),
        (gif, (1, 1), 50_001),
    ],
)
def test_animations_that_would_take_minutes_are_refused_before_a_frame(
    make, size, frames, monkeypatch
):
    data = make(size, frames)
    assert len(data) < 2_000_000
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MediaError, match=r"frames or more of .* make it a video"):
        reader_of(data)


def test_frames_that_paint_beyond_the_canvas_count_with_their_size():
    data = bytearray(gif((8, 8), 200))
    place = data.index(b",") + 5
    data[place : place + 4] = struct.pack("<HH", 9999, 9999)
    with pytest.raises(MediaError, match="frames or more of 9999 x 9999"):
        reader_of(bytes(data))


def test_many_small_frames_are_read():
    reader = reader_of(gif((30, 20), 3000))
    assert (reader.num_frames, reader.duration_s) == (3000, pytest.approx(300))
    assert [one.size for one in reader.read([0, 1500, 2999])] == [(30, 20)] * 3
    assert reader_of(apng((30, 20), 300)).num_frames == 300


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_frames_and_delays_are_those_that_pillow_finds(form, seed):
    chance = random.Random(f"{form} {seed}")
    delays = [chance.choice([0, 20, 30, 100, 250, 1310]) for _ in range(chance.randint(2, 7))]
    images = [Image.effect_noise((30, 20), 40 + n).convert("RGB") for n, _ in enumerate(delays)]
    options = {"comment": b"a" * 300} if form == "GIF" else {}
    if form == "PNG" and seed % 2:
        options["default_image"] = True
        delays = delays[1:]
    data = saved(
        images[0], form, save_all=True, append_images=images[1:], duration=delays, **options
    )
    found = []
    with Image.open(io.BytesIO(data)) as image:
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            delay = image.info.get("duration") or 0
            found.append((delay if delay >= 20 else 100) / 1000)
    reader = reader_of(data)
    assert reader.num_frames == len(found)
    assert reader.duration_s == pytest.approx(sum(found))
    times = [reader.timeline.get_time(number) for number in range(len(found))]
    assert times == pytest.approx([sum(found[:number]) for number in range(len(found))])


def test_a_delay_is_of_one_frame_alone():
    """A GIF frame without a delay does not inherit that of the previous frame."""
    data = gif((30, 20), 3)
    control = b"!\xf9\x04\x04\x32\0\0\0"
    first, second = data.index(b"!\xf9"), data.rindex(b"!\xf9", 0, data.rindex(b"!\xf9"))
    data = data[:first] + control + data[first + 8 : second] + data[second + 8 :]
    reader = reader_of(data)
    assert [reader.timeline.get_time(i) for i in range(3)] == pytest.approx([0, 0.5, 0.6])


def test_an_animation_that_is_cut_off():
    data = gif((30, 20), 10)
    reader = AnimationReader(lambda: io.BytesIO(data[:-4]), "the file")
    assert reader.num_frames == 10  # the header of the last one is there
    with pytest.raises(MediaError, match="the file cannot be decoded; it may be truncated"):
        list(reader.read([9]))
    with pytest.raises(MediaError, match="the file has no frames; it may be truncated"):
        reader_of(data[:15])


# Videos


def y4m(frames):
    return b"YUV4MPEG2 W2 H2 F30:1 Ip A1:1 C420jpeg\n" + b"FRAME\nabcdef" * frames


def test_frames_are_counted_while_they_are_read(monkeypatch):
    monkeypatch.setattr(budget, "MAX_FRAMES", 60_000)
    assert reader_of(y4m(59_000)).num_frames == 59_000
    with pytest.raises(MediaError, match="the file has more than 60,000 frames"):
        reader_of(y4m(70_000))


def test_the_index_takes_few_bytes_a_frame():
    index = reader_of(y4m(2000))._index
    arrays = {id(one): one for one in vars(index).values() if isinstance(one, np.ndarray)}
    assert sum(one.nbytes for one in arrays.values()) <= 64 * 2000
    others = [one for one in vars(index).values() if not isinstance(one, np.ndarray)]
    assert all(isinstance(one, int) for one in others)


def test_a_day_of_video_may_be_read():
    """At 25 frames a second; and hours at 60."""
    assert max(24 * 3600 * 25, 10 * 3600 * 60) <= budget.MAX_FRAMES


def test_a_keyframe_is_looked_up_once_for_a_frame(monkeypatch):
    asked, original = [], decode.FrameIndex.find_keyframe
    monkeypatch.setattr(
        decode.FrameIndex,
        "find_keyframe",
        lambda self, time: asked.append(time) or original(self, time),
    )
    list(reader_of(clips.data("h264 mp4")).read([0, 20, 60]))
    assert len(asked) == 3


def long_as(years):
    """An AVI of 60 frames whose header states a duration of `years`."""
    data = clips.data("mpeg-4 avi")
    place = data.index(b"strh") + 8 + 20
    scale = round(years * 365.25 * 86400)
    return data[:place] + struct.pack("<II", scale, 60) + data[place + 8 :]


def test_a_video_of_years_is_not_cut_into_millions_of_parts():
    data, config = long_as(67), cases.config()
    clip = open_video(data, config)
    assert clip.duration_s == pytest.approx(67 * 365.25 * 86400, rel=1e-6)
    with pytest.raises(
        MediaError, match=r"the data makes 352\d+ parts of 60 s each.* longer parts"
    ):
        open_parts(data, config, 60)
    parts = list(open_parts(data, config, 67 * 365.25 * 86400 / 50))
    assert len(parts) == 50
