"""Videos on the command line, as a process with stdin, stdout, stderr and a status."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import mlx_smolvlm as smolvlm
from mlx_smolvlm.cli.media import parse_time
from tests.helpers import video_cases as clips
from tests.helpers.command import assert_one_error, environment, run
from tests.helpers.dumb_terminal import Terminal

# The command with a decoder that takes its time.
SLOW = """
import time
import mlx_smolvlm.media.readers as readers
original = readers._to_upright_picture
def upright(*arguments):
    time.sleep(0.1)
    return original(*arguments)
readers._to_upright_picture = upright
from mlx_smolvlm.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of 3 s, 75 frames."""
    path = tmp_path_factory.mktemp("videos") / "a clip.mp4"
    path.write_bytes(clips.data("h264 mp4"))
    return path


@pytest.fixture(scope="module")
def chat(tiny_video_folder):
    """The command with four tokens to answer."""

    def chat(*arguments, **options):
        words = ("chat", "-m", tiny_video_folder, "--max-tokens", "4", *map(str, arguments))
        return run(*words, **options)

    return chat


def answered(result):
    """The JSON objects on stdout, of a run that went well."""
    assert (result.returncode, result.stderr) == (0, b"")
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_answer_is_all_of_stdout(chat, path, tiny_video):
    result = chat("-v", path, "What happens?")
    expected = tiny_video.ask(
        "What happens?", videos=[path], sampling=smolvlm.Sampling(max_tokens=4)
    )
    assert (result.returncode, result.stdout.decode(), result.stderr) == (
        0, expected.text + "\n", b"",
    )  # fmt: skip


def test_json_and_stats(chat, path):
    result = chat("-v", path, "-v", path, "What?", "--json", "--stats")
    reply = json.loads(result.stdout)
    assert (reply["video_frames"], reply["image_tiles"]) == (6, 0)
    assert f"prompt: {reply['prompt_tokens']} tokens (6 frames)" in result.stderr.decode()


def test_stdin_is_the_video(chat, path):
    (reply,) = answered(chat("-v", "-", "What?", "--json", stdin=path.read_bytes()))
    assert reply["video_frames"] == 3


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ((), [0, 37, 74]),
        (("--fps", "2"), [0, 14, 29, 44, 59, 74]),
        (("--max-frames", "2"), [0, 74]),
        (("--start", "1", "--end", "00:02", "--fps", "4"), [25, 33, 41, 49]),
        (("--end", "0:00:01.5"), [0, 37]),
        (("--sample", "scene"), [0, 64, 74]),
    ],
)
def test_which_frames_are_shown_and_written(chat, path, tmp_path, options, indices):
    folder = tmp_path / "new" / "frames"
    (reply,) = answered(chat("-v", path, "What?", "--json", "--frames", folder, *options))
    assert reply["video_frames"] == len(indices)
    rows = [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == indices
    assert [row["timestamp_s"] for row in rows] == [index / 25 for index in indices]
    assert [row["stamp"] for row in rows] == [f"00:{index // 25:02d}" for index in indices]
    assert {row["video"] for row in rows} == {str(path)}
    assert sorted(row["file"] for row in rows) == sorted(p.name for p in folder.glob("*.png"))
    whole = clips.decoded(path.read_bytes())
    with Image.open(folder / rows[-1]["file"]) as written:
        assert written.size == (32, 32)  # what the model sees
        size = (32, 24)
        seen = whole[indices[-1]].resize(size, Image.Resampling.LANCZOS)
        seen = seen.resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(written), np.asarray(seen))


def test_frames_of_several_videos_go_on_in_the_same_list(chat, path, tmp_path):
    for _ in range(2):  # a second run replaces the first
        answered(
            chat("-v", path, "-v", path, "?", "--json", "--max-frames", "2", "--frames", tmp_path)
        )
    rows = (tmp_path / "frames.jsonl").read_text().splitlines()
    assert len({json.loads(row)["file"] for row in rows}) == len(rows) == 4


def test_parts(chat, path):
    result = chat("-v", path, "What?", "--chunk", "2")
    lines = result.stdout.decode()
    assert (result.returncode, result.stderr) == (0, b"")
    labels = ("00:00-00:02: ", "00:02-00:03: ", "whole video: ")
    places = [lines.index(label) for label in labels]
    assert places == sorted(places)
    assert places[0] == 0
    replies = answered(chat("-v", path, "What?", "--chunk", "2", "--json"))
    assert [(one["start_s"], one["end_s"], one["is_whole"]) for one in replies] == [
        (0, 2, False), (2, 3, False), (0, 3, True),
    ]  # fmt: skip
    assert [one["video_frames"] for one in replies] == [2, 1, 0]


def test_the_demo_answers_about_parts_and_says_that_it_cannot_sum_them_up(path):
    arguments = ("chat", "-m", "demo", "What happens?", "-v", path, "--chunk", "2")
    result = run(*arguments, "--max-tokens", "4")
    assert result.returncode == 0
    assert re.findall(r"^[^:]*:\d\d-\S+ ", result.stdout.decode(), re.MULTILINE) == [
        "00:00-00:02: ", "00:02-00:03: ",
    ]  # fmt: skip
    assert "warning: the demo cannot sum up the answers about the parts" in result.stderr.decode()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1.5", 1.5), (".5", 0.5), ("2.", 2), ("1:30", 90), ("01:02:03", 3723),
     ("90:00", 5400), ("0:00:00.25", 0.25)],
)  # fmt: skip
def test_times(text, seconds):
    assert parse_time("start", text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1:2:3:4", "1e3", "nan", "inf", ":30", "1:", "1 2", "\u0661", "1,5", "0x1"],
)
def test_what_is_no_time(text):
    with pytest.raises(typer.BadParameter, match="is not a time; give seconds, MM:SS or H:MM:SS"):
        parse_time("start", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fps", "0"), ("--fps", "above 0")),
        (("--fps", "nan"), ("--fps", "above 0")),
        (("--fps", "x"), ("--fps",)),
        (("--max-frames", "0"), ("--max-frames", "1 or above")),
        (("--start", "-3"), ("--start", "is not a time")),
        (("--start", "soon"), ("--start", "is not a time")),
        (("--end", "1:2:3:4"), ("--end", "is not a time")),
        (("--end", "0"), ("--end", "after --start")),
        (("--start", "5", "--end", "5"), ("--end", "after --start")),
        (("--sample", "odd"), ("--sample", "'even', 'scene'")),
        (("--chunk", "0"), ("--chunk", "above 0")),
        (("--chunk", "nan"), ("--chunk", "above 0")),
        (("--chunk", "5", "-v", "other.mp4"), ("--chunk", "one video")),
        (("--chunk", "5", "-i", "a.png"), ("--chunk", "one video")),
        (("-v", "-", "-v", "-"), ("-v", "twice")),
        (("-v", "-", "-i", "-"), ("-i, -v", "twice")),
        (("-v", "https://example.org/a.mp4", "--offline"), ("--offline", "network")),
    ],
)
def test_wrong_option(arguments, words):
    # The video and the model do not exist: options are looked at first.
    result = run("chat", "-m", "/none", "Hi", "-v", "/none.mp4", *arguments)
    assert_one_error(result, *words, status=2)


@pytest.mark.parametrize(
    "option",
    [("--fps", "2"), ("--max-frames", "3"), ("--start", "1"), ("--end", "1"),
     ("--sample", "scene"), ("--frames", "out")],
)  # fmt: skip
def test_options_of_videos_without_a_video(option):
    result = run("chat", "-m", "/none", "Hi", *option)
    assert_one_error(result, option[0], "it needs a video (-v)", status=2)


def test_stdin_cannot_be_the_prompt_too(path):
    result = run("chat", "-m", "/none", "-v", "-", stdin=path.read_bytes())
    assert_one_error(result, "PROMPT", status=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.mp4", "does not exist"),
        ("empty.mp4", "is empty"),
        ("cut.mp4", "may be truncated"),
        ("text.txt", "is not a video"),
        ("sound.wav", "has only sound"),
        ("picture.png", "give it as an image"),
        (".", "is a folder"),
    ],
)
def test_unusable_videos(name, words, path, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    contents = {
        "empty.mp4": b"",
        "cut.mp4": path.read_bytes()[:-2000],
        "text.txt": b"not a video\n" * 99,
        "sound.wav": clips.sound("wav"),
    }
    for other, data in contents.items():
        (tmp_path / other).write_bytes(data)
    # The model does not exist either: the video is looked at first.
    assert_one_error(run("chat", "What?", "-v", tmp_path / name, "-m", "/none"), words)


def test_more_than_the_context_holds(chat, path):
    result = chat("-v", path, "What?", "--fps", "25")
    assert_one_error(result, "64 frames of 1 videos", "frames would fit: an fps of", "--chunk")


def test_a_start_behind_the_end(chat, path):
    assert_one_error(chat("-v", path, "What?", "--start", "1:00"), "lasts 3.00 s", "60 s")


def test_frames_where_no_folder_can_be(chat, path):
    result = chat("-v", path, "What?", "--frames", path / "below")
    assert_one_error(result, "Not a directory")


def test_a_warning_is_one_line(path, tiny_folder, tmp_path):
    arguments = ("chat", "?", "-m", tiny_folder, "--max-tokens", "2")
    result = run(*arguments, "-v", path)
    assert result.returncode == 0
    assert result.stderr.decode() == (
        "warning: tests/tiny was not trained on videos; its answers about them are poor "
        "(SmolVLM2 was)\n"
    )
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clips.data("front index")[:-5000])
    lines = run(*arguments, "-v", cut).stderr.decode().splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert re.fullmatch(r"warning: .*cut.mp4' is cut off: \d+ of 50 frames are there", lines[1])


def test_names_that_the_decoder_could_take_for_something_else(chat, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("user:secret@host.mp4", "größe %03d.mp4"):
        Path(name).write_bytes(path.read_bytes())
        (reply,) = answered(chat("-v", name, "What?", "--json"))
        assert reply["video_frames"] == 3
    Path("-x.mp4").write_bytes(path.read_bytes())
    (reply,) = answered(chat("--video=-x.mp4", "What?", "--json"))
    assert reply["video_frames"] == 3


def test_ctrl_c_while_decoding(tiny_video_folder, path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "chat", "Hi", "-v", path, "-m", tiny_video_folder,
         "--fps", "8", "--frames", path.parent / "frames"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )  # fmt: skip
    written = path.parent / "frames" / "frames.jsonl"
    for _ in range(400):  # until it decodes
        if written.exists() and written.read_text().count("\n") >= 2:
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=20)
    assert (process.returncode, output.strip(), error) == (130, b"", b"")
    assert 2 <= written.read_text().count("\n") < 24


# On a terminal

SLOWLY = (
    "import time\nimport mlx_smolvlm.media.readers as readers\n" + SLOW.split("readers\n", 1)[1]
)


@pytest.fixture
def start(tiny_video_folder):
    started = []

    def begin(*arguments):
        words = ("-c", SLOWLY, "chat", *map(str, arguments), "-m", str(tiny_video_folder))
        started.append(Terminal(*words))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.close()


def test_a_bar_appears_and_is_removed(start, path):
    terminal = start("Hi", "-v", path, "--fps", "4", "--max-tokens", "3")
    terminal.expect(r"a clip\.mp4: 12 frames of 0:00:03, \d+ tokens")
    shown = terminal.expect(r"\[#+\.*\] \d+ of 12 tiles read, \d+ encoded")
    assert "\r\x1b[K" in shown
    assert terminal.status() == 0
    rest = terminal.text
    assert re.search(r"\r\x1b\[K[^\[\r]+\r\n$", rest), rest  # removed, then the answer


def test_video_in_a_conversation(start, path, tmp_path):
    terminal = start("--max-tokens", "3")
    terminal.expect("> ")
    terminal.send(f"/video {tmp_path / 'none.mp4'}\n")
    terminal.expect("error: .*does not exist[^>]*> ")
    terminal.send("/video\n")
    terminal.expect("error: /video needs a path\r\n> ")
    terminal.send(f"/video {path}\n")
    terminal.expect(r"a clip\.mp4: 3 frames of 0:00:03, \d+ tokens[^>]*> ")
    terminal.send("What?\n")
    terminal.expect(r"\n[^\n]*> ")
    terminal.send("Why?\n")
    shown = terminal.expect(r"\n[^\n]*> ")
    assert "tiles read" not in shown  # not once more
    terminal.send("\x04")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.text
