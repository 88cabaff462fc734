"""Truncated, damaged, lying and unsuitable files: one clear error, or the frames that are left."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import MediaError, SmolVLMWarning
from mlx_smolvlm.config import VideoConfig
from mlx_smolvlm.media.readers import AnimationReader
from mlx_smolvlm.media.timeline import format_duration, sample_indices
from mlx_smolvlm.media.video import Video, open_video
from tests.helpers import media_cases as cases
from tests.helpers import video_cases as clips

CONFIG = replace(cases.config(), video=VideoConfig(1.0, 64, 512, 1.0))


def refused(source):
    """The message of the MediaError that `source` gives."""
    with pytest.raises(MediaError) as caught:
        list(open_video(source, CONFIG).read_frames())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def shown(source):
    """(clip, its pictures)."""
    clip = open_video(source, CONFIG)
    return clip, [frame.picture for frame in clip.read_frames()]


# Cut off


@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_an_mp4_whose_index_was_at_its_end(part):
    data = clips.data("h264 mp4")
    assert "may be truncated" in refused(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("name", "part", "note"),
    [
        ("front index", 0.4, r"is cut off: \d+ of 50 frames are there"),
        ("front index", 0.9, r"is cut off: 4\d of 50 frames are there"),
        ("mpeg-4 avi", 0.7, r"is cut off: \d\d of 60 frames are there"),
        ("vp9 webm", 0.5, r"is cut off: [01]\.\d\d of 2\.40 s are there"),
        ("hevc mkv", 0.6, r"is cut off: [01]\.\d\d of 2\.40 s are there"),
        ("fragmented", 0.6, ""),  # nothing in such files says how long they are
        ("h264 ts", 0.6, ""),
    ],
)
def test_what_is_left_of_a_file_is_shown_with_a_warning(name, part, note):
    data = clips.data(name)
    clip, pictures = shown(Video(data[: int(len(data) * part)], fps=8))
    whole = clips.decoded(data)
    assert 5 < clip.num_frames < len(whole)
    assert clip.duration_s == pytest.approx(clip.num_frames / 25)
    good = [a.tobytes() == whole[i].tobytes() for i, a in zip(clip.indices, pictures, strict=True)]
    assert all(good[:-1])  # the last one may end in the middle
    if note:
        assert re.search(note, clip.notes[0])
    else:
        assert all("is cut off" not in one for one in clip.notes)


def test_a_whole_file_has_no_notes():
    for name in ("front index", "mpeg-4 avi", "vp9 webm", "hevc mkv", "vfr"):
        assert shown(clips.data(name))[0].notes == ()


def test_the_warning_reaches_the_user_once(tiny_video):
    data = clips.data("front index")
    with pytest.warns(SmolVLMWarning, match="the data is cut off") as caught:
        tiny_video.ask("?", videos=[data[: len(data) // 2]])
    assert len(caught) == 1


# Damaged


def test_frames_that_are_lost_are_replaced_by_the_nearest():
    """The packets of frames 20 to 24 are noise; every frame is a keyframe of its own."""
    data = bytearray(clips.data("mjpeg mov"))
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[20:25]:
        data[place : place + size] = bytes(size)
    whole = clips.decoded(clips.data("mjpeg mov"))
    clip, pictures = shown(Video(bytes(data), fps=25))
    expected = [whole[{20: 19, 21: 19, 22: 19, 23: 25, 24: 25}.get(n, n)] for n in range(30)]
    same = [a.tobytes() == b.tobytes() for a, b in zip(pictures, expected, strict=True)]
    assert sum(same) >= 29  # frame 22 is as near to 19 as to 25
    assert clip.notes == (
        "the data is damaged: 5 of 30 frames are damaged, or replaced by the nearest "
        "that can be decoded",
    )


@pytest.mark.parametrize("name", ["front index", "vp9 webm", "mpeg-4 avi", "h264 ts", "hevc mkv"])
def test_noise_behind_the_middle(name):
    data = bytearray(clips.data(name))
    middle, noise = len(data) * 7 // 10, np.random.default_rng(0).integers(0, 256, 300, np.uint8)
    data[middle : middle + 300] = noise.tobytes()
    clip, pictures = shown(Video(bytes(data), fps=5))
    assert len(pictures) == len(clip.indices) >= 5
    whole = clips.decoded(clips.data(name))
    assert pictures[0].tobytes() == whole[0].tobytes()


def test_everything_is_noise_behind_the_index():
    data = bytearray(clips.data("front index"))
    place = data.index(b"mdat") + 4
    data[place:] = bytes(len(data) - place)
    assert "cannot be decoded; it may be damaged" in refused(bytes(data))


FUZZ = """
import sys
from tests.media.test_video_damage import fuzz
print(fuzz(int(sys.argv[1])))
"""

SMALL = ("front index", "b frames", "vp9 webm", "mpeg-4 avi", "h264 ts", "hevc mkv", "flv")


def damaged(data, random):
    """`data` cut, with other bytes, or with bytes left out."""
    kind, changed = random.integers(0, 5), bytearray(data)
    if kind == 0:
        return bytes(changed[: random.integers(0, len(data))])
    place = int(random.integers(0, len(data)))
    if kind == 1:
        for one in random.integers(0, len(data), random.integers(1, 40)):
            changed[one] = random.integers(0, 256)
    elif kind == 2:  # mostly in the header
        for one in random.integers(0, min(len(data), 300), random.integers(1, 6)):
            changed[one] = random.integers(0, 256)
    elif kind == 3:
        del changed[place : place + random.integers(1, 200)]
    else:
        changed[place : place + 8] = bytes([random.choice([0, 127, 255])]) * 8
    return bytes(changed)


def fuzz(rounds):
    """How many damaged files were shown, and how many refused; any other error is raised."""
    files = [clips.make(replace(clips.SPECS[name], frames=12)) for name in SMALL]
    for form in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        frames = [Image.fromarray(clips.moving(number, (40, 30))) for number in range(6)]
        frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100)
        files.append(file.getvalue())
    counts = {"shown": 0, "refused": 0}
    for number, data in enumerate(files):
        for seed in range(rounds):
            random = np.random.default_rng([number, seed])
            options = {"fps": 25} if seed % 2 else {"start_s": 0.2}
            try:
                clip, pictures = shown(Video(damaged(data, random), **options))
                assert len(pictures) == len(clip.indices)
                assert format_duration(clip.duration_s)
                counts["shown"] += 1
            except MediaError:
                counts["refused"] += 1
    return json.dumps(counts)


def test_damage_of_any_kind():
    """In a separate process, since a decoder might crash or hang."""
    rounds = 60
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FUZZ, str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode, result.stderr) == (0, "")  # nothing of FFmpeg's log either
    counts = json.loads(result.stdout)
    assert sum(counts.values()) == rounds * 10
    assert min(counts.values()) > 100


# Lies


def patched(data, name, offset, form, *values):
    """`data` with values in place of those at an offset behind the first `name`."""
    place = data.index(name) + len(name) + offset
    packed = struct.pack(form, *values)
    return data[:place] + packed + data[place + len(packed) :]


def test_an_mp4_that_lies_about_its_duration():
    honest, _ = shown(clips.data("h264 mp4"))
    data = patched(clips.data("h264 mp4"), b"mdhd", 16, ">I", 2**31 - 1)
    data = patched(data, b"tkhd", 20, ">I", 2**31 - 1)
    clip, pictures = shown(data)
    assert (clip.num_frames, len(pictures)) == (75, len(clip.indices))
    assert clip.duration_s == pytest.approx(75 / clip.fps)
    assert clip.num_frames == honest.num_frames


@pytest.mark.parametrize("units", [1, 2, 1000, 2**31 - 1])
def test_an_mp4_that_lies_about_its_unit_of_time(units):
    clip, pictures = shown(patched(clips.data("h264 mp4"), b"mdhd", 12, ">I", units))
    assert 1 <= len(pictures) <= clip.num_frames <= 75
    assert format_duration(clip.duration_s)


def test_an_avi_that_lies_about_its_number_of_frames():
    data = patched(clips.data("mpeg-4 avi"), b"avih", 4 + 16, "<I", 10**9)
    data = patched(data, b"strh", 4 + 32, "<I", 10**9)
    clip, pictures = shown(data)
    assert (clip.num_frames, len(pictures)) == (60, 2)
    assert clip.duration_s == pytest.approx(2.4)
    assert clip.notes == ("the data is cut off: 60 of 1000000000 frames are there",)


@pytest.mark.parametrize("rate", [(0, 25), (1, 0), (0, 0), (1, 2**31 - 1), (2**31 - 1, 1)])
def test_an_avi_that_lies_about_its_rate(rate):
    data = patched(clips.data("mpeg-4 avi"), b"strh", 4 + 20, "<II", *rate)
    clip, pictures = shown(Video(data, max_frames=4))
    assert clip.num_frames == 60
    assert 1 <= len(pictures) <= 4
    assert re.fullmatch(r"(\d+ days?, )?\d+:\d\d:\d\d", format_duration(clip.duration_s))


def test_rates_that_no_clock_can_show():
    frames = [np.zeros((4, 4, 3), np.uint8)] * 3
    for rate in (1e-300, 1e-7, 1e7, 1e300):
        with pytest.raises(ValueError, match="source_fps is"):
            Video(frames, source_fps=rate)
    for rate in (1e-6, 1e6):
        clip = open_video(Video(frames, source_fps=rate), CONFIG)
        assert clip.indices
        assert format_duration(clip.duration_s)
    assert len(sample_indices(100, 1e-320, float("inf"), CONFIG.video)) == 64


def test_pictures_that_claim_to_be_huge():
    data = patched(clips.data("mpeg-4 avi"), b"strf", 4 + 4, "<ii", 60_000, 60_000)
    assert {picture.size for picture in shown(data)[1]} == {(64, 48)}  # the stream knows better
    spec = replace(clips.SPECS["ffv1 mkv"], frames=2)
    huge = clips.make(replace(spec, codec="rawvideo", container="avi"))
    assert "above the limit of" in refused(
        patched(huge, b"strf", 4 + 4, "<ii", 12_000, 12_000)
    )  # fmt: skip


def test_an_animation_that_claims_to_be_huge():
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", 65535, 65535)
    message = refused(bytes(data))
    assert "above the limit" in message or "exceeds limit" in message
    data[6:10] = struct.pack("<HH", 9800, 9800)  # Pillow would warn of it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AnimationReader(lambda: io.BytesIO(bytes(data)), "it").num_frames == 2


def test_a_picture_track_in_a_format_that_nobody_knows():
    data = clips.data("front index").replace(b"avc1", b"zzzz")
    assert "a video track in an unknown format; convert it" in refused(data)


# No videos


def test_pictures_texts_and_noise():
    noise = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()
    for data in (noise, b"hello\n" * 999, b"\x1aE\xdf\xa3" + noise, b"<html></html>", b"\0"):
        assert "is not a video that can be read" in refused(data)
    for form, words in (("JPEG", "not a video"), ("BMP", "not a video"), ("PNG", "single picture")):
        file = io.BytesIO()
        Image.effect_noise((64, 64), 50).convert("RGB").save(file, form)
        assert words in refused(file.getvalue())


OTHERS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n",
    "script.txt": "ffconcat version 1.0\nfile '{}'\n",
    "stream.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><Representation><BaseURL>{}</BaseURL></Representation>"
    "</AdaptationSet></Period></MPD>",
    "text.srt": "1\n00:00:00,000 --> 00:00:02,000\nHello\n\n",
    "graph.ffconcat": "ffconcat version 1.0\nfile 'http://127.0.0.1:9/a.mp4'\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_name_other_files_are_refused(name, tmp_path):
    real = tmp_path / "real.mp4"
    real.write_bytes(clips.data("h264 mp4"))
    path = tmp_path / name
    path.write_text(OTHERS[name].format(real))
    assert "is not a video that can be read" in refused(path)


def test_ffmpeg_would_follow_such_a_file(tmp_path):
    """This shows that the test above is needed."""
    (tmp_path / "real.mp4").write_bytes(clips.data("h264 mp4"))
    path = tmp_path / "script.txt"
    path.write_text("ffconcat version 1.0\nfile 'real.mp4'\n")
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 75


# Names

NAMES = [
    "user:secret@host.mp4",
    "pipe:0",
    "concat:a|b",
    "file:a.mp4",
    "http:x.mp4",
    "file%03d.mp4",
    "-x.mp4",
    " with spaces .mp4",
    "größe 图🦥.mp4",
    "[1]*?.mp4",
    "two\nlines.mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused(name)
    Path(name).write_bytes(b"")
    assert "is empty" in refused(name)
    Path(name).write_bytes(clips.data("h264 mp4"))
    for source in (name, Path(name), tmp_path / name):
        clip, pictures = shown(source)
        assert (clip.num_frames, len(pictures)) == (75, 3)


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://u:secret@h/x",
        "rtmp://u:secret@h/x",
        "file:///etc/passwd",
        "udp://127.0.0.1:1",
        "ftp://u:secret@h/a.mp4",
        "crypto+file://secret@x",
        "http://me:secret@127.0.0.1:1/a.mp4?key=secret",
        "http://[1/secret@a.mp4",
    ],
)
def test_other_addresses_are_refused_without_their_secrets(url):
    assert "secret" not in refused(url).replace("[1/secret@", "")


def test_folders_and_missing_files(tmp_path):
    assert "is a folder; give a file" in refused(tmp_path)
    assert "does not exist; check the path" in refused(tmp_path / "none.mp4")
    assert "cannot be opened" in refused("a\0b")
    assert "cannot be opened" in refused("x" * 5000)


def test_a_file_that_is_gone_when_it_is_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.data("h264 mp4"))
    clip = open_video(path, CONFIG)
    path.unlink()
    with pytest.raises(MediaError, match="does not exist"):
        list(clip.read_frames())


def test_a_file_that_changes_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.data("b frames"))
    clip = open_video(path, CONFIG)
    path.write_bytes(clips.data("0.3 s"))
    assert len(list(clip.read_frames())) == len(clip.indices)
    assert "frames are damaged, or replaced" in clip.notes[0]
    path.write_bytes(b"")
    with pytest.raises(MediaError, match="is empty"):
        list(clip.read_frames())
