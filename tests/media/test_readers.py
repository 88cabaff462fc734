"""Each reader gives the same frames as decoding the whole file, in every format."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import decode
from mlx_smolvlm.media.readers import AnimationReader, FileReader, FramesReader, open_reader
from tests.helpers import video_cases as cases


def reader_of(data):
    return open_reader(lambda: io.BytesIO(data), "the file")


@pytest.fixture(params=["reading over gaps", "seeking over gaps"])
def gaps(request, monkeypatch):
    """Make the decoder always seek over gaps, or never."""
    packets = 1 if request.param.startswith("seeking") else 10**9
    monkeypatch.setattr(decode, "SEEK_PACKETS", packets)


def subsets(count, seed):
    """Ascending numbers below `count`: ends, single ones, some, all."""
    random = np.random.default_rng(seed)
    yield [0]
    yield [count - 1]
    yield sorted({0, count // 2, count - 1})
    for _ in range(5):
        some = random.choice(count, random.integers(1, min(7, count) + 1), replace=False)
        yield sorted(some.tolist())
    start = int(random.integers(0, count))
    yield list(range(start, min(start + 5, count)))


@pytest.mark.parametrize("name", cases.SPECS)
def test_any_frames_are_those_of_the_whole_file(name, gaps):
    data = cases.data(name)
    whole, reader = cases.decoded(data), reader_of(data)
    assert reader.num_frames == len(whole) == cases.SPECS[name].frames
    for indices in subsets(len(whole), sum(name.encode())):
        got = list(reader.read(indices))
        assert cases.same(got, [whole[index] for index in indices]), indices
    assert reader.notes == []
    if len(whole) < 500:
        assert cases.same(list(reader.read(range(len(whole)))), whole)


def test_the_pictures_of_a_case_differ():
    """Else the test above could not tell one frame from another."""
    frames = cases.decoded(cases.data("h264 mp4"))
    assert len({frame.tobytes() for frame in frames}) == len(frames)


@pytest.mark.parametrize("name", cases.SPECS)
def test_rate_and_duration_are_the_files(name):
    made, reader = cases.SPECS[name], reader_of(cases.data(name))
    if made.times is None:
        assert reader.fps == pytest.approx(float(made.rate), abs=1e-9)
    with av.open(io.BytesIO(cases.data(name))) as container:
        if made.times is None:
            assert reader.fps == float(container.streams.video[0].average_rate)
        else:  # the last packet says how long it is shown
            ends = [(p.pts + p.duration) * p.time_base for p in container.demux(video=0) if p.size]
            assert reader.duration_s == pytest.approx(float(max(ends)), abs=1e-9)
    assert reader.duration_s == pytest.approx(made.frames / reader.fps, abs=1e-9)


def count_decoded(monkeypatch):
    """A list that grows by the number of frames that decoders give out."""
    counts, original = [], decode.Decoder._decode_packet

    def counted(self, packet):
        frames = original(self, packet)
        counts.append(len(frames))
        return frames

    monkeypatch.setattr(decode.Decoder, "_decode_packet", counted)
    return counts


def test_few_frames_are_decoded(monkeypatch):
    """Decoding starts at the keyframe and skips frames that no other frame refers to."""
    reader = reader_of(cases.data("3 min"))
    counts = count_decoded(monkeypatch)
    assert len(list(reader.read([20, 1720]))) == 2
    assert sum(counts) < 60
    counts.clear()
    list(reader.read(range(1800)))
    assert sum(counts) == 1800


@pytest.mark.parametrize("name", ["open gop", "open gop hevc", "b frames", "h264 ts"])
def test_frames_before_the_keyframe_of_an_open_group_need_no_second_look(name, monkeypatch):
    """They are decoded from the previous keyframe, without a second pass from the start."""
    reader, counts = reader_of(cases.data(name)), count_decoded(monkeypatch)
    for index in range(reader.num_frames):
        counts.clear()
        assert len(list(reader.read([index]))) == 1
        assert sum(counts) < 45, index


def test_a_stream_without_real_keyframes_is_decoded_once_more_from_the_start(monkeypatch):
    data = cases.data("intra refresh")
    reader, counts = reader_of(data), count_decoded(monkeypatch)
    whole = cases.decoded(data)
    assert cases.same(list(reader.read([5, 50, 85])), [whole[5], whole[50], whole[85]])
    assert sum(counts) >= 86


# Rotation


def turned(picture, matrix):
    """Each pixel (x, y) at (ax + cy, bx + dy), moved so that all coordinates are above 0."""
    a, b, c, d = matrix
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    result = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    result[rows, columns] = pixels
    return Image.fromarray(result)


MATRICES = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (-1, 0, 0, -1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, 1, -1, 0),
    (0, -1, -1, 0),
    (0, -1, 1, 0),
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_turned_as_the_display_matrix_says(matrix):
    data = cases.with_matrix(cases.data("odd size"), matrix)
    stored = cases.decoded(data)[7]
    (got,) = reader_of(data).read([7])
    expected = turned(stored, matrix)
    assert cases.same([got], [expected])
    a, b, c, d = matrix
    if a * d - b * c > 0:  # PyAV knows of rotations, not of mirrors
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
        assert cases.same([got], [stored.rotate(frame.rotation, expand=True)])


def test_other_angles_are_left_alone():
    data = cases.with_matrix(cases.data("odd size"), (1, 1, -1, 1))
    assert cases.same(list(reader_of(data).read([3])), [cases.decoded(data)[3]])


# Streams beside the video


@pytest.mark.parametrize(
    ("container", "with_cover"), [("mp3", False), ("mp3", True), ("adts", False), ("wav", False)]
)
def test_sound_is_no_video_even_with_a_cover(container, with_cover):
    with pytest.raises(MediaError, match="the file has only sound"):
        reader_of(cases.sound(container, with_cover))


def test_a_stream_that_starts_late():
    """Frame numbers start at the first frame, whenever the sound begins."""
    made = cases.SPECS["h264 ts"]
    late = cases.make(replace(made, times=tuple(10 * n + 700 for n in range(made.frames))))
    with av.open(io.BytesIO(late)) as container:
        assert container.streams.video[0].start_time > 200_000
    whole, reader = cases.decoded(late), reader_of(late)
    assert reader.num_frames == 60
    assert reader.duration_s == pytest.approx(60 / reader.fps)
    assert cases.same(list(reader.read([0, 30, 59])), [whole[0], whole[30], whole[59]])


# Animated pictures


def test_metadata_that_is_not_utf_8():
    data = cases.make(cases.SPECS["h264 mp4"])
    assert b"Lavf" in data
    assert reader_of(data.replace(b"Lavf", b"\xff\xfe\xfd\xfc")).timeline.num_frames == 75


@pytest.mark.parametrize("version", ["14.4.0", "18.1.0", "19.0.2"])
def test_pyav_is_given_only_options_that_its_version_knows(version, monkeypatch):
    given = {}

    def refuse(*_arguments, **options):
        given.update(options)
        raise OSError("not today")

    monkeypatch.setattr(av, "open", refuse)
    monkeypatch.setattr(av, "__version__", version)
    with pytest.raises(MediaError, match="not today"):
        reader_of(b"any bytes")
    assert ("metadata_errors" in given) == (version < "19")  # gone in 19


def animation(form, durations, transparent=False):
    """An animated picture with frames of these durations in milliseconds, and its frames."""
    pictures = []
    for number in range(len(durations)):
        picture = Image.new("RGBA", (40, 30), (200, 0, 0, 0) if transparent else (9, 99, 9, 255))
        box = (4 * number, 5, 4 * number + 8, 25)
        picture.paste((0, 0, 255 - 40 * number, 255), box)
        pictures.append(picture)
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    disposal = {} if form == "WEBP" else {"disposal": 2 if form == "GIF" else 1}
    pictures[0].save(
        file, form, save_all=True, append_images=pictures[1:], duration=durations, loop=0,
        **options, **disposal,
    )  # fmt: skip
    return file.getvalue(), pictures


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animated_pictures(form, transparent):
    durations = [40, 500, 60, 1000, 100]
    data, pictures = animation(form, durations, transparent)
    reader = reader_of(data)
    assert isinstance(reader, AnimationReader)
    assert reader.num_frames == 5
    assert reader.duration_s == pytest.approx(1.7)
    assert reader.fps == pytest.approx(5 / 1.7)
    white = Image.new("RGBA", (40, 30), "white")
    expected = [Image.alpha_composite(white, one).convert("RGB") for one in pictures]
    assert cases.same(list(reader.read(range(5))), expected)
    assert cases.same(list(reader.read([1, 4])), [expected[1], expected[4]])


def test_delays_that_browsers_do_not_believe():
    data, _ = animation("GIF", [10, 100])
    assert reader_of(data).duration_s == pytest.approx(0.2)


def test_a_gif_has_the_frames_that_pyav_finds():
    data, _ = animation("GIF", [40, 40, 40, 40])
    reader = reader_of(data)
    with av.open(io.BytesIO(data)) as container:
        assert reader.fps == pytest.approx(float(container.streams.video[0].average_rate))
    assert cases.same(list(reader.read(range(4))), cases.decoded(data))


def test_a_picture_that_does_not_move_is_none():
    for form in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, form)
        with pytest.raises(MediaError, match="single picture; give it as an image"):
            reader_of(file.getvalue())


def test_pillow_agrees_about_the_frames():
    data, _ = animation("GIF", [40, 500, 60], transparent=True)
    with Image.open(io.BytesIO(data)) as image:
        assert sum(1 for _ in ImageSequence.Iterator(image)) == reader_of(data).num_frames


# Frames at hand


def test_arrays_and_lists_of_pictures():
    array = np.stack([cases.moving(n, (20, 10)) for n in range(6)])
    pictures = [Image.fromarray(one) for one in array]
    for frames in (array, list(array), pictures, tuple(pictures), array.astype(np.float32) / 255):
        reader = FramesReader(frames, 2.0)
        assert (reader.num_frames, reader.fps, reader.duration_s) == (6, 2.0, 3.0)
        assert cases.same(list(reader.read([1, 5])), [pictures[1], pictures[5]])


def test_frames_that_are_none():
    for frames, words in (
        (np.zeros((4, 5, 3), np.uint8), "is not a video; give \\(T, H, W, 3\\)"),
        (np.zeros((0, 4, 5, 3), np.uint8), "no frames"),
        ([], "no frames"),
        (np.zeros((2, 4, 5, 7), np.uint8), "is not a picture"),
        ([3], "type int"),
    ):
        with pytest.raises(MediaError, match=words):
            FramesReader(frames, 1.0)


def test_the_reader_is_chosen_by_the_first_bytes():
    assert isinstance(reader_of(cases.data("h264 mp4")), FileReader)
    with pytest.raises(MediaError, match="the file is empty"):
        reader_of(b"")
