"""Videos in the library: which frames, from which source, and how they reach the answer."""

import base64
import io
import json
import os
import re
import sys
import threading
import warnings
import weakref
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import av.filter
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm import MediaError, PromptError, Sampling, SmolVLMWarning
from mlx_smolvlm.config import VideoConfig
from mlx_smolvlm.generate import long_video
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.media import fetch, readers
from mlx_smolvlm.media import tiles as image
from mlx_smolvlm.media.encode import TILE_BATCH
from mlx_smolvlm.media.tiles import tile_frame
from mlx_smolvlm.media.timeline import sample_indices, score_scenes
from mlx_smolvlm.media.video import Clip, Video, open_parts, open_video
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.messages import read_request
from tests.helpers import media_cases as cases
from tests.helpers import video_cases as clips
from tests.helpers import web_server as web

GOLDEN = cases.load_golden("videos")
TRAINED = VideoConfig(fps=1.0, max_frames=64, longest_edge=512, skip_secs=1.0)
SHORT = Sampling(max_tokens=4)


@pytest.fixture(scope="module")
def config():
    return replace(cases.config(), video=TRAINED)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of 3 s, 75 frames."""
    path = tmp_path_factory.mktemp("videos") / "a clip.mp4"
    path.write_bytes(clips.data("h264 mp4"))
    return path


@pytest.fixture(scope="module")
def long_path(path):
    """A file of 180 s, 1800 frames."""
    path = path.with_name("long.mp4")
    path.write_bytes(clips.data("3 min"))
    return path


# What transformers does, as recorded


@pytest.mark.parametrize("name", GOLDEN["checkpoints"])
def test_frames_pixels_and_prompts_are_those_of_transformers(name, tmp_path):
    values = GOLDEN["checkpoints"][name]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(GOLDEN["tokenizer"]), encoding="utf-8")
    side, patch, scale = {64: (512, 16, 4), 81: (384, 14, 3)}[values["image_seq_len"]]
    config = cases.config(
        tile=side, patch=patch, scale=scale, image_token_id=values["image_token_id"],
        vocab_size=values["vocab_size"],
    )  # fmt: skip
    sampling = values["video_sampling"]
    edge = sampling["video_size"]["longest_edge"]
    video = VideoConfig(sampling["fps"], sampling["max_frames"], edge, 1.0)
    config = replace(config, video=video)
    builder = PromptBuilder(tokenizer, values["template"], config)
    ask = [cases.user({"type": "video"}, clips.QUESTION)]
    assert len(values["cases"]) == len(clips.FRAME_CASES)
    for case, expected in zip(clips.FRAME_CASES, values["cases"], strict=True):
        asked = Video(
            case.pictures(), fps=case.fps, max_frames=case.max_frames, source_fps=case.source_fps
        )
        clip = open_video(asked, config)
        assert list(clip.indices) == expected["indices"]
        assert list(clip.timestamps_s) == expected["timestamps_s"]
        assert builder.build(ask, [], clips=[clip]).tolist() == expected["input_ids"]
        pixels = np.concatenate([tile_frame(f.picture, edge, config) for f in clip.read_frames()])
        np.testing.assert_allclose(cases.sampled(pixels), expected["values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("total", "fps", "expected", "last"),
    [(270, 30.0, [0, 33, 67, 100], 269), (1995, 30.0, [30, 60, 91], 1965), (10, 25.0, [0], 0)],
)
def test_indices_that_were_worked_out_by_hand(total, fps, expected, last):
    indices = sample_indices(total, fps, total / fps, TRAINED)
    assert list(indices[: len(expected)]) == expected
    assert indices[-1] == last


# Which frames


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fps": 0}, "fps is 0; it must be above 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"max_frames": 0}, "max_frames is 0; it must be 1 or above"),
        ({"start_s": -1}, "start_s is -1; it must be 0 or above"),
        ({"start_s": float("inf")}, "start_s is inf"),
        ({"start_s": float("nan")}, "start_s is nan"),
        ({"end_s": 0}, "end_s is 0; it must be after start_s"),
        ({"start_s": 5, "end_s": 5}, "end_s is 5; it must be after start_s"),
        ({"end_s": float("nan")}, "end_s is nan"),
        ({"sample": "odd"}, "sample is 'odd'; it must be 'even' or 'scene'"),
        ({"source_fps": 0}, "source_fps is 0; it must be 1e-6 to 1e6"),
    ],
)
def test_values_outside_their_range(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Video("a.mp4", **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 37, 74)),
        ({"max_frames": 2}, (0, 74)),
        ({"fps": 2}, (0, 14, 29, 44, 59, 74)),
        ({"fps": 0.01}, (25,)),
        ({"start_s": 1}, (25, 74)),
        ({"start_s": 1.0, "end_s": 2.0}, (25,)),
        ({"start_s": 1.0, "end_s": 2.0, "fps": 4}, (25, 33, 41, 49)),
        ({"end_s": 1.04, "fps": 25}, tuple(range(26))),
        ({"end_s": 1000}, (0, 37, 74)),
        ({"start_s": 2.97}, (74,)),
        ({"start_s": 1.01, "end_s": 1.02}, (25,)),  # on the screen then
        ({"fps": 1000, "max_frames": 10_000}, tuple(range(75))),
    ],
)
def test_start_end_rate_and_number(path, config, options, expected):
    clip = open_video(Video(path, **options), config)
    assert clip.indices == expected
    assert clip.timestamps_s == tuple(index / 25 for index in expected)
    assert (clip.fps, clip.num_frames, clip.duration_s) == (25.0, 75, 3.0)
    frames = list(clip.read_frames())
    whole = clips.decoded(path.read_bytes())
    assert [frame.index for frame in frames] == list(expected)
    assert clips.same([frame.picture for frame in frames], [whole[i] for i in expected])


def test_a_part_is_not_cut_at_its_ends(long_path, config):
    """A whole long video is sampled without its first and last second, a part is not."""
    whole = open_video(long_path, config).indices
    part = open_video(Video(long_path, start_s=20, end_s=100), config).indices
    assert (whole[0], whole[-1], len(whole)) == (10, 1790, 64)
    assert (part[0], part[-1], len(part)) == (200, 999, 64)


def test_a_start_behind_the_end(path, config):
    with pytest.raises(MediaError, match=re.escape("lasts 3.00 s, and start is 3 s")):
        open_video(Video(path, start_s=3), config)


def test_stamps_are_cut_to_whole_seconds(path, config):
    clip = open_video(Video(path, fps=1000, max_frames=1000), config)
    stamps = [frame.stamp for frame in clip.read_frames()]
    assert stamps == ["00:00"] * 25 + ["00:01"] * 25 + ["00:02"] * 25


def test_checkpoints_that_say_nothing_of_videos_get_the_usual_sampling(path):
    assert open_video(path, cases.config()).indices == (0, 37, 74)


# Scenes

CUTS = (0, 17, 30, 58)


def cuts(number, size):
    """A texture for each scene, that moves a little."""
    scene = sum(number >= cut for cut in CUTS)
    random = np.random.default_rng(scene)
    width, height = size
    coarse = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width + 80, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)[:, number : number + width]


@pytest.fixture(scope="module")
def cut_file():
    spec = clips.Spec(options=clips.x264("keyint=250:scenecut=0"), frames=75, size=(160, 96))
    return clips.make(replace(spec, picture=cuts))


@pytest.mark.skipif(not hasattr(av.VideoFrame, "metadata"), reason="PyAV before 18")
def test_scene_scores_are_scdets():
    """The numbers of FFmpeg's own filter."""
    random = np.random.default_rng(0)
    base = random.integers(0, 255, (90, 160, 3), np.uint8)
    frames = [base, np.roll(base, 3, 1), 255 - base, 255 - base, np.zeros_like(base), base // 2]
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=160, height=90, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25)
    )
    graph.link_nodes(source, graph.add("scdet", "threshold=0"), graph.add("buffersink")).configure()
    expected = []
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts = number
        graph.push(frame)
        expected.append(float(graph.pull().metadata["lavfi.scd.score"]))
    scores = list(score_scenes(map(Image.fromarray, frames)))
    assert scores == pytest.approx(expected, abs=2e-3)  # it prints three decimals
    assert max(scores) > 10


def test_scenes_begin_exactly_at_the_cuts(cut_file, config):
    assert open_video(Video(cut_file, sample="scene"), config).indices == (*CUTS, 74)
    frames = [cuts(number, (160, 96)) for number in range(75)]
    video = Video(frames, source_fps=25, sample="scene")
    assert open_video(video, config).indices == (*CUTS, 74)


def test_scenes_within_start_and_end_and_the_number_asked_for(cut_file, config):
    part = Video(cut_file, sample="scene", start_s=0.4, end_s=2)
    assert open_video(part, config).indices == (10, 17, 30, 49)
    few = open_video(Video(cut_file, sample="scene", max_frames=3), config).indices
    assert (few[0], few[2]) == (0, 74)
    assert few[1] in CUTS[1:]
    ends = open_video(Video(cut_file, sample="scene", max_frames=2), config).indices
    assert ends == (0, 74)
    assert open_video(Video(cut_file, sample="scene", max_frames=1), config).indices == (0,)


def test_of_a_video_without_cuts_the_first_and_the_last_frame_are_taken(config):
    frames = [np.full((20, 30, 3), 90, np.uint8)] * 9
    for count, indices in ((9, (0, 8)), (2, (0, 1)), (1, (0,))):
        video = Video(frames[:count], source_fps=3, sample="scene")
        assert open_video(video, config).indices == indices


# Parts


def test_parts_follow_each_other_without_gap(long_path, config):
    parts = list(open_parts(long_path, config, 50))
    assert [(start, end) for start, end, _ in parts] == [(0, 50), (50, 100), (100, 150), (150, 180)]
    for start, end, clip in parts:
        assert clip.indices[0] == start * 10
        assert clip.indices[-1] == end * 10 - 1
        assert clip.duration_s == 180
    assert [len(clip.indices) for *_, clip in parts] == [50, 50, 50, 30]


def test_parts_of_a_part(long_path, config):
    parts = list(open_parts(Video(long_path, start_s=30, end_s=75, fps=0.2), config, 20))
    assert [(start, end) for start, end, _ in parts] == [(30, 50), (50, 70), (70, 75)]
    assert [clip.indices for *_, clip in parts] == [
        (300, 366, 432, 499),
        (500, 566, 632, 699),
        (700,),
    ]


@pytest.mark.parametrize("seconds", [3, 2.9999999999, 100])
def test_a_video_that_is_one_part(path, config, seconds):
    ((start, end, clip),) = open_parts(path, config, seconds)
    assert (start, pytest.approx(end), clip.indices) == (0, 3, (0, 37, 74))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_parts_need_a_length(path, config, seconds):
    with pytest.raises(ValueError, match=r"seconds is .* it must be above 0"):
        open_parts(path, config, seconds)


def test_ntsc_parts_cover_every_frame_once(config):
    data = clips.data("ntsc")
    seen = []
    for _, _, clip in open_parts(Video(data, fps=1000, max_frames=1000), config, 0.7):
        seen += clip.indices
    assert seen == list(range(150))


def read_back(vlm, stream):
    """The prompt of a stream as text."""
    ids = stream._prompt.input_ids.tolist()
    return vlm.engine.prompt_builder.tokenizer.decode(ids, skip_special_tokens=False)


def test_answers_over_parts(tiny_video, long_path):
    video = Video(long_path, fps=0.1)
    parts, texts = [], []
    for part in tiny_video.stream_parts("What?", video, 70, system="Brief.", sampling=SHORT):
        parts.append(part)
        texts.append("".join(chunk.text for chunk in part.stream))
    assert [part.label for part in parts] == [
        "00:00-01:10", "01:10-02:20", "02:20-03:00", "00:00-03:00",
    ]  # fmt: skip
    assert [part.is_whole for part in parts] == [False, False, False, True]
    assert [part.stream.reply.video_frames for part in parts] == [7, 7, 4, 0]
    over = read_back(tiny_video, parts[-1].stream)
    for part, text in zip(parts[:3], texts, strict=False):
        assert f"{part.label}: {text}" in over
    assert over.count("Brief.") == 1
    assert "What?" in over


def test_a_part_that_nobody_reads_is_still_answered(tiny_video, long_path):
    video = Video(long_path, fps=0.05)
    parts = list(tiny_video.stream_parts("What?", video, 100, sampling=SHORT))
    assert [part.stream.reply.generation_tokens for part in parts[:2]] == [4, 4]


def test_one_part_has_no_answer_over_parts(tiny_video, path):
    assert len(list(tiny_video.stream_parts("What?", path, 10, sampling=SHORT))) == 1


def test_answers_that_exceed_the_context_are_halved(tiny_video, long_path, monkeypatch):
    asked = []

    def make_stream(*arguments):
        stream = AnswerStream(*arguments)
        asked.append(read_back(tiny_video, stream))
        return stream

    monkeypatch.setattr(long_video, "AnswerStream", make_stream)
    video = Video(long_path, fps=0.05)
    long = Sampling(max_tokens=60)
    parts = list(tiny_video.stream_parts("What?", video, 15, sampling=long))
    assert len(parts) == 13
    parts[-1].stream.finish()
    over = [text for text in asked if "From these, answer for the whole video" in text]
    assert len(over) >= 3
    assert "00:00-03:00" not in over[-1]
    told = " ".join(over)
    for part in parts[:-1]:
        assert told.count(f"{part.label}: ") >= 1
    # The last answer is over those of the halves.
    halves = re.findall(r"(\d\d:\d\d)-(\d\d:\d\d): ", over[-1])
    assert halves[0][0] == "00:00"
    assert halves[-1][1] == "03:00"
    assert len(halves) == 2


# Sources


def pictures(source, config, **options):
    return [frame.picture for frame in open_video(Video(source, **options), config).read_frames()]


@pytest.fixture(scope="module")
def expected(path):
    whole = clips.decoded(path.read_bytes())
    return [whole[index] for index in (0, 37, 74)]


def test_path_bytes_and_data_uri(path, config, expected):
    data = path.read_bytes()
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), memoryview(data), uri):
        assert clips.same(pictures(source, config), expected)


def test_home_folder(path, config, expected, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert clips.same(pictures(f"~/{path.name}", config), expected)


def test_standard_input(path, config, expected, monkeypatch):
    stream = SimpleNamespace(buffer=io.BytesIO(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert clips.same(pictures("-", config), expected)
    with pytest.raises(MediaError, match="standard input is empty"):
        open_video("-", config)


def test_a_named_pipe(path, config, expected):
    pipe = path.with_name("pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    assert clips.same(pictures(pipe, config), expected)
    writer.join()


def test_limit_of_what_is_piped(path, config, monkeypatch):
    stream = SimpleNamespace(buffer=io.BytesIO(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(fetch, "MAX_VIDEO_BYTES", 1024)
    with pytest.raises(MediaError, match="standard input is larger than"):
        open_video("-", config)


def test_arrays_lists_and_paths_of_pictures(config, tmp_path):
    array = np.stack([clips.moving(n, (40, 30)) for n in range(6)])
    expected = [Image.fromarray(array[index]) for index in (0, 2, 5)]
    files = []
    for number, pixels in enumerate(array):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    for source in (array, list(array), [Image.fromarray(one) for one in array], files):
        assert clips.same(pictures(source, config, source_fps=2), expected)


def test_sources_that_are_none(config):
    for source, words in (
        (3, "a video cannot be of type int; give a path"),
        (None, "type NoneType"),
        ([np.zeros((2, 2, 3), np.uint8)], "frame rate .* is not known; give Video"),
        (b"", "the data is empty"),
        ("", "the path is empty"),
    ):
        with pytest.raises(MediaError, match=words):
            open_video(source, config)


def test_an_opened_video_is_opened_once(path, config, expected, monkeypatch):
    opened = Video(path).open()
    monkeypatch.setattr("mlx_smolvlm.media.decode.read_index", None)
    clip = open_video(opened, config)
    assert isinstance(clip, Clip)
    assert open_video(clip, config) is clip
    assert clips.same([frame.picture for frame in clip.read_frames()], expected)
    assert clips.same([frame.picture for frame in clip.read_frames()], expected)  # once more


class Handler(web.QuietHandler):
    def do_GET(self):  # noqa: N802  (the name that http.server calls)
        body = clips.data("h264 mp4")
        code, length, path = 200, len(body), self.path.partition("?")[0]
        if path == "/missing.mp4":
            code = 404
        elif path == "/short":
            length += 10
        elif path == "/text":
            body = b"<html>hello</html>"
            length = len(body)
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def site():
    with web.serve(Handler) as address:
        yield address


def test_url(site, config, expected):
    clip = open_video(f"{site}/größe.mp4?token=hidden#t", config)
    assert clips.same([frame.picture for frame in clip.read_frames()], expected)
    assert "hidden" not in clip.name


@pytest.mark.parametrize(
    ("where", "words"),
    [("/missing.mp4", "HTTP 404"), ("/short", "sent .* bytes"), ("/text", "is not a video")],
)
def test_url_that_fails(site, config, where, words):
    with pytest.raises(MediaError, match=words) as caught:
        open_video(f"{site}{where}?token=hidden", config)
    assert "hidden" not in str(caught.value)


def test_a_url_is_named_without_its_secrets(site, config):
    with pytest.raises(MediaError) as caught:
        open_video(site.replace("//", "//me:secret@") + "/missing.mp4?token=hidden", config)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_two_readings_of_a_copy_do_not_disturb_each_other(site, config, expected):
    opened = Video(site + "/a.mp4").open()
    clips_ = [open_video(opened, config).read_frames() for _ in range(2)]
    for first, second, third in zip(*clips_, expected, strict=True):
        assert clips.same([first.picture, second.picture], [third, third])


def test_limits_of_a_download(site, config, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_VIDEO_BYTES", 1024)
    with pytest.raises(MediaError, match="is larger than"):
        open_video(site + "/a.mp4", config)
    monkeypatch.undo()
    monkeypatch.setattr(fetch, "VIDEO_DEADLINE_S", -1.0)
    with pytest.raises(MediaError, match="took longer"):
        open_video(site + "/a.mp4", config)


# On the way to the answer


def test_what_the_video_shows_changes_the_answer(tiny_video, path):
    other = [np.zeros((48, 64, 3), np.uint8)] * 75
    first = tiny_video.ask("What?", videos=[path], sampling=SHORT)
    second = tiny_video.ask("What?", videos=[Video(other, source_fps=25)], sampling=SHORT)
    assert first.prompt_tokens == second.prompt_tokens
    assert first.token_ids != second.token_ids
    assert (first.video_frames, first.image_tiles) == (3, 0)


def test_other_frames_of_a_file_are_another_content(tiny_video, path):
    parts = [Video(path, start_s=start, end_s=start + 1) for start in (0, 1)]
    first, second = (open_video(part, tiny_video.config) for part in parts)
    assert len(first.indices) == len(second.indices)
    assert first.digest() != second.digest()
    assert first.digest() == open_video(parts[0], tiny_video.config).digest()


def test_a_single_video_need_not_be_a_list(tiny_video, path):
    listed = tiny_video.ask("What?", videos=[path], sampling=SHORT)
    assert tiny_video.ask("What?", videos=path, sampling=SHORT).token_ids == listed.token_ids


def test_media_beside_a_question_come_before_it_pictures_first():
    request = read_request("What?", ["a.png", "b.png"], ["c.mp4"], None)
    (message,) = request.messages
    assert [item["type"] for item in message["content"]] == ["image", "image", "video", "text"]
    assert (request.images, request.videos) == (["a.png", "b.png"], ["c.mp4"])


def test_videos_inside_of_messages(tiny_video, path):
    beside = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    inside = [
        {
            "role": "user",
            "content": [{"type": "video", "video": path}, {"type": "text", "text": "What?"}],
        }
    ]
    asked = [
        tiny_video.ask("What?", videos=[path], sampling=SHORT),
        tiny_video.ask(beside, videos=[path], sampling=SHORT),
        tiny_video.ask(inside, sampling=SHORT),
    ]
    assert len({tuple(reply.token_ids) for reply in asked}) == 1
    with pytest.raises(PromptError, match="more video items than"):
        tiny_video.ask(beside, sampling=SHORT)
    with pytest.raises(PromptError, match="1 videos have no video item"):
        tiny_video.ask(inside, videos=[path], sampling=SHORT)


def test_making_a_file_leaves_this_thread_scheduled_as_before():
    policy = getattr(os, "sched_getscheduler", lambda _pid: None)  # macOS has none
    before = policy(0)
    clips.make(clips.SPECS["av1 mp4"])
    assert policy(0) == before


def alive(monkeypatch, module, name):
    """[how many of what `name` returns are alive at most]."""
    most, refs, original = [0], [], getattr(module, name)

    def tracked(*arguments):
        result = original(*arguments)
        refs.append(weakref.ref(result))
        most[0] = max(most[0], sum(ref() is not None for ref in refs))
        return result

    monkeypatch.setattr(module, name, tracked)
    return most


def test_few_frames_are_held_at_once(tiny_video, path, monkeypatch):
    pictures, tiles = alive(monkeypatch, readers, "_to_upright_picture"), alive(
        monkeypatch, image, "tile_frame"
    )  # fmt: skip
    stream = tiny_video.stream("?", videos=[Video(path, fps=9)], sampling=SHORT)
    assert stream.reply.video_frames == 27
    stream.finish()
    assert pictures[0] <= 3
    assert TILE_BATCH <= tiles[0] <= 2 * TILE_BATCH


def test_progress(tiny_video, path):
    stream = tiny_video.stream("?", videos=[Video(path, fps=7)], sampling=SHORT)
    steps = list(stream.prepare())
    assert [step.total for step in steps] == [21] * len(steps)
    assert steps[-1].decoded == steps[-1].encoded == 21
    assert [step.frame.index for step in steps if step.frame] == [
        round(n * 74 / 20 - 0.5 + 1e-9) if n * 74 % 20 else n * 74 // 20 for n in range(21)
    ]
    assert all(step.tile.shape == (32, 32, 3) for step in steps if step.frame)
    assert {step.name for step in steps if step.frame} == {repr(str(path))}
    # Batches are encoded while frames are still to be decoded.
    assert [step.encoded for step in steps if not step.frame] == [
        *range(TILE_BATCH, 21, TILE_BATCH),
        21,
    ]
    assert any(0 < step.encoded < step.decoded < 21 for step in steps)
    assert stream.finish().generation_tokens == 4


def test_a_conversation_encodes_a_video_once(tiny_video, path, monkeypatch):
    video = Video(path, start_s=0.2)  # nobody else asks for these frames
    encoded, original = [], tiny_video.engine.encoder

    def counted(pixel_values):
        encoded.append(len(pixel_values))
        return original(pixel_values)

    monkeypatch.setattr(tiny_video.engine, "encoder", counted)
    chat = tiny_video.chat(sampling=SHORT)
    first = chat.ask("What?", videos=[video])
    assert encoded == [3]
    second = chat.ask("Why?")
    assert encoded == [3]
    third = chat.ask("And this?", videos=[replace(video, max_frames=1)])
    assert encoded == [3, 1]
    assert [reply.video_frames for reply in (first, second, third)] == [3, 3, 4]
    said = [item["text"] for item in chat.messages[1]["content"]]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": said[0]}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    cold = tiny_video.ask(messages, videos=[video], sampling=SHORT)
    assert cold.token_ids == second.token_ids


def test_a_turn_with_a_bad_video_leaves_no_trace(tiny_video, path):
    chat = tiny_video.chat(sampling=SHORT)
    chat.ask("What?", videos=[path])
    with pytest.raises(MediaError):
        chat.ask("What?", videos=["none.mp4"])
    with pytest.raises(PromptError):
        chat.ask("What?", videos=[Video(path, fps=25)])
    reply = chat.ask("Why?")
    assert reply.video_frames == 3


def test_a_warning_once_for_a_checkpoint_without_videos(tiny_folder, path):
    vlm = mlx_smolvlm.load(tiny_folder)
    with pytest.warns(SmolVLMWarning, match="tests/tiny was not trained on videos") as caught:
        vlm.ask("What?", videos=[path], sampling=SHORT)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlm.ask("What?", videos=[path], sampling=SHORT)
        list(vlm.stream_parts("What?", path, 10, sampling=SHORT))


# More than the context holds


def advice(vlm, videos, images=()):
    """(frames, fps, max_frames, seconds of a part) that the error names."""
    with pytest.raises(PromptError) as caught:
        vlm.stream("What happens?", videos=videos, images=images, sampling=SHORT)
    message = str(caught.value)
    found = re.search(
        r"(\d+) frames would fit: an fps of ([\d.]+), a max_frames of (\d+), "
        r"or parts of ([\d.]+) s, one after the other \(--chunk\)",
        message,
    )
    assert found, message
    assert "\n" not in message
    return int(found[1]), float(found[2]), int(found[3]), float(found[4])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("3 min", {}),
        ("3 min", {"fps": 10, "max_frames": 2000}),
        ("3 min", {"start_s": 100}),
        ("h264 mp4", {"fps": 25, "max_frames": 75}),
        ("60 fps portrait", {"fps": 60, "max_frames": 240}),
        ("ntsc", {"fps": 11.3}),
    ],
)
def test_following_the_advice_fits(tiny_video, name, options):
    video = Video(clips.data(name), **options).open()
    frames, fps, max_frames, seconds = advice(tiny_video, [video])
    assert 8 < frames == max_frames
    for change in ({"fps": fps}, {"max_frames": max_frames}):
        stream = tiny_video.stream("What happens?", videos=[replace(video, **change)])
        assert frames * 0.7 <= stream.reply.video_frames <= frames + 1
    parts = open_parts(video, tiny_video.config, seconds)
    counts = [
        tiny_video.stream("What happens?", videos=[clip]).reply.video_frames for *_, clip in parts
    ]
    assert max(counts) <= frames + 1


def test_advice_for_two_videos_and_a_picture(tiny_video, path):
    picture = Image.new("RGB", (64, 64))
    videos = [Video(path, fps=20).open(), Video(path, fps=20).open()]
    frames, fps, max_frames, _ = advice(tiny_video, videos, [picture])
    assert frames // 2 == max_frames
    for change in ({"fps": fps}, {"max_frames": max_frames}):
        changed = [replace(video, **change) for video in videos]
        tiny_video.stream("What happens?", videos=changed, images=[picture])
