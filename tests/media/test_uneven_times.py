"""Frames at uneven times: packet times override a rate that contradicts them."""

import bisect
import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm.config import VideoConfig
from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media.fetch import DescriptorReader
from mlx_smolvlm.media.readers import _QuietFile, open_reader
from mlx_smolvlm.media.timeline import (
    Timeline,
    build_delay_timeline,
    build_even_timeline,
    build_measured_timeline,
    sample_indices,
)
from mlx_smolvlm.media.video import Video, open_parts, open_video
from tests.helpers import media_cases as cases
from tests.helpers import video_cases as clips

TRAINED = VideoConfig(1.0, 64, 512, 1.0)
CONFIG = replace(cases.config(), video=TRAINED)


def bursts():
    """Milliseconds over 20 s: 30 frames a second in every fifth second, else 2."""
    times, now = [], 0.0
    while now < 19.97:
        times.append(round(now * 1000))
        now += 1 / 30 if int(now) % 5 == 0 else 0.5
    return tuple(times)


BURSTS = bursts()
BASE = clips.Spec(rate=100, frames=len(BURSTS), times=BURSTS, options=clips.FAST)
VP8 = {"codec": "libvpx", "options": clips.VP9}
FILES = {
    "webm": replace(BASE, container="webm", **VP8),
    "recording": replace(BASE, container="webm", muxing={"live": "1"}, **VP8),  # no duration
    "mkv": replace(BASE, container="matroska", options=clips.x264("keyint=20:bframes=2")),
    "ts": replace(BASE, container="mpegts", options=clips.x264("keyint=20:bframes=2")),
    "flv": replace(BASE, container="flv"),
    "mp4": BASE,
    "fragmented": replace(BASE, muxing={"movflags": "frag_keyframe+empty_moov"}),
    "mov": replace(BASE, container="mov", codec="mjpeg", options={}, pix_fmt="yuvj420p"),
    "wmv": replace(BASE, container="asf", codec="wmv2", options={}),
    "nut": replace(BASE, container="nut", codec="mpeg4", options={}),
    "avi": replace(BASE, container="avi", codec="mpeg4", options={"g": "20"}),
    "ivf": replace(BASE, container="ivf", **VP8),
}


@clips.cached
def made(name):
    return clips.make(FILES[name])


def shown_at(data):
    """When each frame is shown, from the first one on, as PyAV decodes it."""
    with av.open(io.BytesIO(data)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    return [time - times[0] for time in times]


@pytest.mark.parametrize("name", FILES)
def test_frames_are_spread_over_the_time_that_they_are_shown(name):
    data = made(name)
    times = shown_at(data)
    assert times == pytest.approx([one / 1000 for one in BURSTS], abs=0.002)
    clip = open_video(data, CONFIG)
    assert clip.num_frames == len(BURSTS)
    assert times[-1] < clip.duration_s < times[-1] + 0.55
    assert clip.fps == pytest.approx(clip.num_frames / clip.duration_s)
    assert clip.timestamps_s == pytest.approx([times[index] for index in clip.indices], abs=1e-6)
    points = np.linspace(0, times[-1], round(clip.duration_s))
    assert list(clip.indices) == [bisect.bisect_right(times, one + 1e-6) - 1 for one in points]
    assert len(clip.indices) == 20
    whole = clips.decoded(data)
    assert clips.same([one.picture for one in clip.read_frames()], [whole[i] for i in clip.indices])
    assert clip.notes == ()


@pytest.mark.parametrize("name", FILES)
def test_start_and_end_of_a_file_with_uneven_frames(name):
    data = made(name)
    times = shown_at(data)
    clip = open_video(Video(data, start_s=12, end_s=14, fps=2), CONFIG)
    # At 11.53 a frame appears that is on the screen for half a second and ends at 12.03.
    assert clip.timestamps_s == pytest.approx([12.033, 12.533, 13.033, 13.533], abs=0.003)
    assert [clip.timestamps_s[0], clip.timestamps_s[-1]] == pytest.approx(
        [times[clip.indices[0]], times[clip.indices[-1]]], abs=1e-6
    )
    with pytest.raises(MediaError, match="and start is 21 s"):
        open_video(Video(data, start_s=21), CONFIG)


def test_parts_of_a_file_with_uneven_frames():
    data = made("webm")
    seen, labels = [], []
    for start, end, clip in open_parts(Video(data, fps=1000, max_frames=1000), CONFIG, 7):
        assert all(start <= time < end for time in clip.timestamps_s)
        seen += clip.indices
        labels.append((start, end))
    assert labels[:2] == [(0, 7), (7, 14)]
    assert labels[-1] == (14, open_video(data, CONFIG).duration_s)
    assert seen == sorted(set(seen))


def test_two_frames_at_the_same_time_do_not_make_the_times_useless():
    times = [*BURSTS]
    times[50] = times[49]
    data = clips.make(replace(FILES["webm"], times=tuple(times)))
    reader = open_reader(lambda: io.BytesIO(data), "it")
    expected = shown_at(data)
    assert reader.num_frames == len(expected) == len(times)
    assert [reader.timeline.get_time(i) for i in range(len(times))] == pytest.approx(expected)
    whole = clips.decoded(data)
    assert clips.same(list(reader.read([0, 49, 50, 152])), [whole[i] for i in (0, 49, 50, 152)])


def test_a_rate_that_drifts():
    """29.97 frames a second in milliseconds, which FFmpeg may take for 30."""
    times = np.round(np.arange(6000) / 29.97, 3)
    assert build_measured_timeline(times, 0.033, Fraction(30000, 1001)).times_s is None
    uneven = build_measured_timeline(times, 0.033, 30)
    assert uneven.duration_s == pytest.approx(6000 / 29.97, abs=0.002)
    assert uneven.get_time(5999) == times[5999]


def test_small_jitter_leaves_the_rate_in_charge():
    """Otherwise recordings of phones would not be sampled as in training."""
    jitter = np.random.default_rng(0).uniform(-0.015, 0.015, 900)
    times = np.sort(np.arange(900) / 30 + jitter - jitter[0])
    assert build_measured_timeline(times, 0.033, 30).times_s is None
    times[450:] += 0.3
    assert build_measured_timeline(times, 0.033, 30).times_s is not None


@pytest.mark.parametrize(
    ("last_s", "expected"), [(0.5, 3.5), (3.0, 6.0), (0.0, 4.5), (2.0**31, 4.5), (-1.0, 4.5)]
)
def test_how_long_the_last_frame_is_shown(last_s, expected):
    """The duration of its packet, or the mean if that is missing or longer than all others."""
    assert build_measured_timeline(np.array([0, 0.1, 3.0]), last_s, 10).duration_s == expected


def test_frames_that_all_have_one_time():
    timeline = build_measured_timeline(np.zeros(5), 0.0, 25)
    assert (timeline.duration_s, timeline.times_s) == (0.2, None)


# Ranges


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0.8, 2.4, (0,)), (10.0, 10.5, (1,)), (9.9, 9.95, (0,)), (25, 26, (2,)), (29.5, 30, (2,)),
     (8, 12, (0, 1)), (9.8, 12, (1,)), (10, 30, (1, 2)), (0.8, 30, (0, 1, 2))],
)  # fmt: skip
def test_a_range_shows_what_is_on_the_screen_in_it(start, end, expected):
    """At a frame every ten seconds."""
    frames = [cases.pattern(8, 8, 3)] * 3
    slow = open_video(Video(frames, source_fps=0.1, start_s=start, end_s=end), CONFIG)
    assert slow.indices == expected
    assert slow.timestamps_s == tuple(10.0 * index for index in expected)
    data = clips.make(clips.Spec(rate=Fraction(1, 10), frames=3, options=clips.FAST))
    assert open_video(Video(data, start_s=start, end_s=end), CONFIG).indices == expected


@pytest.mark.parametrize("uneven", [False, True])
def test_any_range(uneven):
    random = np.random.default_rng(1)
    for _ in range(150):
        number = int(random.integers(1, 40))
        if uneven:
            delays = random.choice([0.04, 0.1, 0.5, 2.0], number)
            timeline = build_delay_timeline(delays.tolist())
        else:
            timeline = build_even_timeline(number, float(random.choice([0.1, 1, 7.5, 25, 29.97])))
        start, end = sorted(random.uniform(0, timeline.duration_s, 2))
        times = [timeline.get_time(index) for index in range(number)]
        ends = [*times[1:], timeline.duration_s]
        first, last = timeline.find_range(start, end)
        on_screen = [i for i in range(number) if times[i] < end and ends[i] > start]
        assert set(range(first, last + 1)) <= set(on_screen)
        for left_out in set(on_screen) - set(range(first, last + 1)):
            assert left_out == on_screen[0]
            assert ends[left_out] - start < 0.5
        indices = timeline.sample(start, end, replace(TRAINED, fps=1e3, max_frames=10**6))
        assert set(indices) <= set(range(first, last + 1))
        if not uneven:
            assert list(indices) == list(range(first, last + 1))


def test_uneven_sampling_of_even_frames_is_the_same():
    """Both ways of sampling agree where both apply."""
    for number, fps in ((270, 30.0), (40, 8.0), (10, 25.0), (7, 0.5), (4000, 25.0)):
        even = build_even_timeline(number, fps)
        uneven = Timeline(number, fps, even.duration_s, np.arange(number) / fps)
        for chosen in (TRAINED, replace(TRAINED, fps=2.0, max_frames=7, skip_secs=0.0)):
            expected = sample_indices(number, fps, even.duration_s, chosen)
            assert even.sample(0, even.duration_s, chosen) == expected
            got = uneven.sample(0, even.duration_s, chosen)
            assert np.abs(np.subtract(got, expected)).max() <= 1


# Animations


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_have_a_time_for_each_frame(form):
    delays = [40, 2000, 60, 60, 5000, 100]
    pictures = [Image.fromarray(clips.moving(n, (40, 30))) for n in range(len(delays))]
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    pictures[0].save(
        file, form, save_all=True, append_images=pictures[1:], duration=delays, loop=0, **options
    )
    clip = open_video(Video(file.getvalue(), fps=100, max_frames=1000), CONFIG)
    assert clip.timestamps_s == pytest.approx([0, 0.04, 2.04, 2.1, 2.16, 7.16])
    assert clip.duration_s == pytest.approx(7.26)
    few = open_video(file.getvalue(), CONFIG)  # a frame a second
    assert few.indices == (0, 1, 4, 5)
    part = open_video(Video(file.getvalue(), start_s=1, end_s=1.5), CONFIG)
    assert (part.indices, part.timestamps_s) == ((1,), (0.04,))


# Files that PyAV would fail on in its own way


class Disk(io.BytesIO):
    """A file that fails to read beyond a position, and refuses offsets as Linux does."""

    def __init__(self, data, good=10**9):
        super().__init__(data)
        self._good = good

    def read(self, size=-1):
        if self.tell() + max(size, 0) > self._good:
            raise OSError(5, "Input/output error")
        return super().read(size)

    def seek(self, offset, whence=0):
        if whence == 0 and not 0 <= offset < 2**60:
            raise OSError(22, "Invalid argument")
        return super().seek(offset, whence)


@pytest.mark.parametrize("byte", [b"\x7f", b"\x8f"])
def test_an_offset_outside_of_any_file_is_passed_over(byte):
    """The last bytes of this file give the offset of its index, here before or after the file."""
    data = made("nut")
    data = data[:-12] + byte * 8 + data[-4:]
    reader = open_reader(lambda: Disk(data), "the file")
    assert reader.num_frames == len(BURSTS)
    assert len(list(reader.read([0, 100]))) == 2


@pytest.mark.parametrize("offset", [-1, 0, 5, 50, 2**60, 2**63 - 1])
def test_every_source_answers_a_seek_alike(tmp_path, offset):
    """A path, bytes, and the temporary file that standard input is copied to."""
    path, data = tmp_path / "file", bytes(range(50))
    path.write_bytes(data)
    found = []
    with path.open("rb") as file, path.open("rb") as other:
        copy = io.BufferedReader(DescriptorReader(other.fileno()))
        for stream in (file, Disk(data), io.BytesIO(data), copy):
            quiet = _QuietFile(stream)
            quiet.seek(3)
            found.append((quiet.seek(offset), quiet.read(2)))
    assert found == [found[0]] * 4
    wanted = (-1, data[3:5]) if offset < 0 else (offset, data[offset : offset + 2])
    assert found[0] == wanted


@pytest.mark.parametrize("name", ["wmv", "nut", "mp4", "webm"])
def test_a_disk_that_fails_is_named_and_nothing_is_printed(name, capfd):
    data = made(name)
    for good in (100, len(data) // 2, len(data) - 1):
        with pytest.raises(MediaError, match="the file cannot be read: Input/output error"):
            open_reader(lambda good=good: Disk(data, good), "the file")
    assert capfd.readouterr() == ("", "")
