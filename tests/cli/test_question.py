"""Paths in a question are attached, and the question is worded without them."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from mlx_smolvlm.cli.command_table import expand_shorthand
from mlx_smolvlm.cli.many_pictures import expand_sources
from mlx_smolvlm.cli.question import (
    announce_media,
    find_mentions,
    read_arguments,
    read_typed_question,
)
from mlx_smolvlm.errors import MediaError
from tests.helpers.command import assert_one_error, run, run_text
from tests.helpers.pty_terminal import Talk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures and a video."""
    names = (
        "Shot at 9.41\u202fAM.png",
        "photo (1).png",
        "photo.png",
        "a.png",
        "b.JPG",
        "my photo.png",
        "it's.png",
        "clip.mp4",
        "clip.mp4 at 0.10.png",
        "a.tif copy.png",
        "walk.mov/1.png",
        "notes.txt",
    )
    for name in (*names, "Screenshot 2026-01-01 at 10.00.00.png", "day one/x.HEIC"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "text", "sources"),
    [
        ("What is in photo.png?", "What is in the picture?", ["photo.png"]),
        ("What is in ./photo.png, please?", "What is in the picture, please?", ["./photo.png"]),
        ("Is photo.png's colour red?", "Is the picture's colour red?", ["photo.png"]),
        ("What is in (photo.png)?", "What is in (the picture)?", ["photo.png"]),
        ("Describe this photo.png.", "Describe this picture.", ["photo.png"]),
        ("Describe the image photo.png", "Describe the image", ["photo.png"]),
        ("Does anybody run in clip.mp4?", "Does anybody run in the video?", ["clip.mp4"]),
        ("Is photo.png in clip.mp4?", "Is the picture in the video?", ["photo.png", "clip.mp4"]),
        ("Compare a.png and b.JPG.", "Compare picture 1 and picture 2.", ["a.png", "b.JPG"]),
        # quoted, escaped, pasted
        ("What is in 'my photo.png'?", "What is in the picture?", ["my photo.png"]),
        ('What is in "it\'s.png"?', "What is in the picture?", ["it's.png"]),
        ("What's in `my photo.png`?", "What's in the picture?", ["my photo.png"]),
        (r"What is in my\ photo.png?", "What is in the picture?", ["my photo.png"]),
        ("Read FOLDER/day\\ one/x.HEIC.", "Read the picture.", ["FOLDER/day one/x.HEIC"]),
        ("Read file://FOLDER/day%20one/x.HEIC", "Read the picture", ["FOLDER/day one/x.HEIC"]),
        (
            "What time does FOLDER/Screenshot 2026-01-01 at 10.00.00.png show?",
            "What time does the picture show?",
            ["FOLDER/Screenshot 2026-01-01 at 10.00.00.png"],
        ),
        ("Read Shot at 9.41\u202fAM.png.", "Read the picture.", ["Shot at 9.41\u202fAM.png"]),
        (r"Is photo\ \(1\).png red?", "Is the picture red?", ["photo (1).png"]),
        ("Is photo (1).png red?", "Is the picture red?", ["photo (1).png"]),
        # with a suffix in a folder's or file's name
        ("Is clip.mp4 at 0.10.png red?", "Is the picture red?", ["clip.mp4 at 0.10.png"]),
        ("Is 'clip.mp4 at 0.10.png' red?", "Is the picture red?", ["clip.mp4 at 0.10.png"]),
        (r"Is clip.mp4\ at\ 0.10.png red?", "Is the picture red?", ["clip.mp4 at 0.10.png"]),
        ("Is walk.mov/1.png red?", "Is the picture red?", ["walk.mov/1.png"]),
        (r"Is a.tif\ copy.png red?", "Is the picture red?", ["a.tif copy.png"]),
        ("How many of 10 does photo.png/10 get?", "How many of 10 does the picture/10 get?",
         ["photo.png"]),
        # in other languages' quotation marks, and those that a Mac makes
        ("Is \u201cmy photo.png\u201d red?", "Is \u201cthe picture\u201d red?", ["my photo.png"]),
        ("\u300ca.png\u300d\u306f?", "\u300cthe picture\u300d\u306f?", ["a.png"]),
        # beside the sentence
        ("photo.png What is this?", "What is this?", ["photo.png"]),
        ("What is this? photo.png", "What is this?", ["photo.png"]),
        ("Read this: photo.png", "Read this", ["photo.png"]),
        ("'a.png' b.JPG which is red?", "which is red?", ["a.png", "b.JPG"]),
        ("a.png and b.JPG: which is red?", "which is red?", ["a.png", "b.JPG"]),
        # beside it and within it
        ("a.png vs b.JPG", "picture 1 vs picture 2", ["a.png", "b.JPG"]),
        ("Compare a.png with this: b.JPG", "Compare picture 1 with this: picture 2",
         ["a.png", "b.JPG"]),
        # nothing else
        ("photo.png", "What is in this picture?", ["photo.png"]),
        ("a.png, b.JPG", "What is in these pictures?", ["a.png", "b.JPG"]),
        ("clip.mp4", "What happens in this video?", ["clip.mp4"]),
        # no paths
        ("What is a .png file?", "What is a .png file?", []),
        ("Read notes.txt and photo.png.zip", "Read notes.txt and photo.png.zip", []),
        ("Don't say 'no'.", "Don't say 'no'.", []),
        ("What is in photo. png?", "What is in photo. png?", []),
    ],
)  # fmt: skip
def test_paths_become_words(folder: Path, typed: str, text: str, sources: list[str]) -> None:
    found = read_typed_question([typed.replace("FOLDER", str(folder))])
    assert found.text == text
    expected = [source.replace("FOLDER", str(folder)) for source in sources]
    assert [*found.images, *found.videos] == expected
    assert found.missing == ()


def test_pictures_are_numbered_after_those_given_before(folder: Path) -> None:
    found = read_typed_question(["Is photo.png larger?"], num_images=1)
    assert found.text == "Is picture 2 larger?"
    assert read_typed_question(["Is clip.mp4 longer?"], num_images=1).text == "Is the video longer?"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("phto.png", "'phto.png' does not exist; did you mean 'photo.png'?"),
        ("What is in phto.png?", "'phto.png' does not exist; did you mean 'photo.png'?"),
        ("What is in 'no such one.png'?", "'no such one.png' does not exist; check the path"),
        ("Is day/x.png like photo.png?", "'day/x.png' does not exist"),
        ("What is in file://[x.png", "'x.png' does not exist"),
        ("Is ~/x.png like photo.png?", "'~/x.png' does not exist"),
        ("Is phto.png like a.png?", "'phto.png' does not exist; did you mean 'photo.png'?"),
        ("Read https://me:secret@example.org/a.png", "https://example.org/a.png is not fetched"),
    ],
)
def test_a_name_that_is_not_there_is_an_error(folder: Path, typed: str, message: str) -> None:
    with pytest.raises(MediaError) as error:
        read_typed_question([typed])
    assert str(error.value).startswith(message)
    assert "secret" not in str(error.value)


def test_a_name_may_only_be_talked_about(folder: Path) -> None:
    found = read_typed_question(["Is photo.png like logo.png?"])
    assert (found.text, found.missing) == ("Is the picture like logo.png?", ("logo.png",))
    assert read_typed_question(["Is it like logo.png?"], has_media=True).missing == ("logo.png",)
    long = "Which pictures does this page use? " + "<p>" * 200 + "logo.png"
    assert read_typed_question([long]).missing == ("logo.png",)


@pytest.mark.parametrize(
    "words",
    [["logo.png"], ["photo.png", "logo.png"], ["photo.png", "logo.png", "What differs?"]],
)
def test_a_name_that_stands_alone_is_meant(folder: Path, words: list[str]) -> None:
    with pytest.raises(MediaError, match=r"'logo\.png' does not exist"):
        read_arguments(words, ["a.png"], [])
    assert read_arguments(["Is", "photo.png", "like", "logo.png"], [], []).missing == ("logo.png",)


def test_a_long_text_is_answered_by_few_hints(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "Which pictures does this page use? " + "".join(
        f"<img src=p{n % 90}.gif>" for n in range(300)
    )
    announce_media(read_typed_question([page]))
    hints = capsys.readouterr().err.splitlines()
    assert hints[0] == "hint: p0.gif is not attached, since it does not exist"
    assert hints[6:] == ["hint: 84 more are not attached"]
    announce_media(read_typed_question(["photo.png", "Why? " * 1000]))
    said = capsys.readouterr().err
    assert said.startswith("attached photo.png; asking: Why? Why? ")
    assert said.endswith("Why?  ...\n")
    assert len(said) < 600


def test_arguments_are_paths_as_they_are(folder: Path) -> None:
    name = "a (1) 'b' \\ $x; [c], .png"
    Path(name).touch()
    found = read_arguments([name, "photo.png", "What?"], ["first.png"], ["first.mp4"])
    assert found.images == ("first.png", name, "photo.png")
    assert (found.videos, found.text) == (("first.mp4",), "What?")
    assert found.named == (name, "photo.png")
    assert read_arguments([], ["a.png"], []).images == ("a.png",)


def test_an_address_alone_is_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://me:secret@example.org/a.png"
    found = read_arguments([url, "What?"], [], [])
    assert (found.images, found.text) == ((url,), "What?")
    announce_media(found)
    assert capsys.readouterr().err == "attached https://example.org/a.png; asking: What?\n"


def test_a_folder_needs_its_option(folder: Path) -> None:
    with pytest.raises(MediaError, match="'day one/' is a folder; give it with -i"):
        read_arguments(["day one/", "What?"], [], [])
    assert read_arguments(["day one"], [], []).text == "day one"


def test_what_is_there_but_no_file_is_named(folder: Path) -> None:
    Path("link.png").symlink_to("nowhere")
    for name, message in (
        ("walk.mov", "'walk.mov' is a folder; give it with -i"),
        ("link.png", "'link.png' is not a file that can be read"),
    ):
        for typed in (name, f"What is in {name}?"):
            with pytest.raises(MediaError) as error:
                read_typed_question([typed])
            assert str(error.value) == message


def test_a_path_in_bytes_that_are_not_text(folder: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("file names are UTF-8 here")
    found = read_arguments([name, "What?"], [], [])
    assert (found.images, found.text) == ((name,), "What?")


def test_long_texts_take_no_time(folder: Path) -> None:
    assert read_typed_question(["photo.png " * 2000]).images == ()
    assert len(list(find_mentions("photo.png " * 1000))) == 1000
    start = time.perf_counter()
    words = ["x" * 16_000 + " photo.png and photo.png"] * 10
    assert read_typed_question(words).text.endswith("x picture 19 and picture 20")
    assert time.perf_counter() - start < 5


def test_the_shorthand_is_chat() -> None:
    for words in (
        ["photo.png"],
        ["a b.MP4", "What?"],
        ["What is this?", "-i", "a.png"],
        ["-i", "a.png", "What?"],
        ["--image=a.png", "What?"],
        ["--model=demo"],
    ):
        assert expand_shorthand(words) == ["chat", *words]
    for words in ([], ["chat", "photo.png"], ["-h"], ["models"], ["What"], ["--x.png", "a"]):
        assert expand_shorthand(words) == words


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("red.png", "the blue.png"):
        Image.new("RGB", (64, 48), name.removeprefix("the ").removesuffix(".png")).save(
            tmp_path / name
        )
    return tmp_path


def test_the_command_attaches_pictures_and_says_so(tiny_folder: Path, pictures: Path) -> None:
    options = ("-m", tiny_folder, "--max-tokens", "1", "--json", "--detail", "low")
    for arguments, count, said in (
        (("chat", "What is in red.png?"), 1, "attached red.png; asking: What is in the picture?"),
        (("red.png",), 1, "attached red.png; asking: What is in this picture?"),
        (("red.png", "What", "is it?"), 1, "attached red.png; asking: What is it?"),
        (("chat", "-i", "red.png", "the blue.png", "Why?"), 2,
         "attached the blue.png; asking: Why?"),
        (("chat", "-i", "red.png", "Is it in logo.png?"), 1,
         "hint: logo.png is not attached, since it does not exist"),
    ):  # fmt: skip
        done = run_text(*arguments, *options, cwd=pictures)
        assert done.returncode == 0, done.stderr
        assert done.stderr == said + "\n"
        assert json.loads(done.stdout)["image_tiles"] == count


def test_choose_attaches_pictures(tiny_folder: Path, pictures: Path) -> None:
    choices = ("-c", "A", "-c", "B", "-m", tiny_folder, "--detail", "low")
    done = run_text("choose", "What is in red.png?", *choices, cwd=pictures)
    assert (done.returncode, done.stderr) == (
        0, "attached red.png; asking: What is in the picture?\n",
    )  # fmt: skip


def test_a_mistyped_picture_is_an_error_of_the_command(pictures: Path) -> None:
    for arguments in (("chat", "What is in rad.png?"), ("rad.png",)):
        assert_one_error(run(*arguments, cwd=pictures), "'rad.png'", "did you mean 'red.png'?")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of pictures, with other files beside them."""
    (tmp_path / "album/inner.png").mkdir(parents=True)
    for number in range(12):
        name = f"IMG{number}.{'JPG' if number % 2 else 'png'}"
        Image.new("RGB", (64, 48), (20 * number, 0, 0)).save(tmp_path / "album" / name)
    for name in ("._IMG0.png", "notes.txt", "clip.mp4"):
        (tmp_path / "album" / name).touch()
    return tmp_path


def test_folders_and_patterns_are_their_pictures(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(album)
    names = [f"album/IMG{number}.{'JPG' if number % 2 else 'png'}" for number in range(12)]
    assert expand_sources(["album"]) == names  # IMG2 before IMG10
    assert expand_sources(["x.png", "album/IMG1*", "-"]) == ["x.png", names[1], *names[10:], "-"]
    (album / "a [1].png").touch()
    for source in ("a [1].png", "data:image/png;base64,[*]", "https://example.org/*.png?a"):
        assert expand_sources([source]) == [source]
    with pytest.raises(MediaError, match=r"the folder 'album/inner.png' has no picture"):
        expand_sources(["album/inner.png"])
    with pytest.raises(MediaError, match=r"the pattern 'album/\*\.gif' matches no picture"):
        expand_sources(["album/*.gif"])
    monkeypatch.setattr("mlx_smolvlm.cli.many_pictures.MAX_PICTURES", 11)
    with pytest.raises(MediaError, match="the folder 'album' has 12 pictures, above the limit"):
        expand_sources(["album"])


def test_two_stars_are_all_folders_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("top.png", "a/b [1]/deep.png", "a/one.png", "a/b [1]/no.txt", ".hidden/x.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for name in ("a/up", "a/b [1]/up"):  # of which paths without end can be made
        Path(name).symlink_to(tmp_path)
    below = ["a/b [1]/deep.png", "a/one.png"]
    assert expand_sources(["**/*.png"]) == [*below, "top.png"]
    assert expand_sources(["**"]) == [*below, "top.png"]
    assert expand_sources(["a/**/*.png"]) == expand_sources(["a/**"]) == below
    assert expand_sources(["**/a/**/one*"]) == ["a/one.png"]
    assert expand_sources([f"{tmp_path}/*/**/deep.png"]) == [f"{tmp_path}/a/b [1]/deep.png"]


def test_all_pictures_of_a_folder_are_seen(tiny_folder: Path, album: Path) -> None:
    options = ("-m", tiny_folder, "--max-tokens", "1", "--json", "--detail", "low")
    done = run_text("chat", "What?", "-i", "album", *options, cwd=album)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["image_tiles"] == 12
    done = run_text("choose", "What?", "-i", "album", "-c", "A", "-c", "B", *options[:2], cwd=album)
    assert done.returncode == 0, done.stderr


def test_too_many_pictures_are_counted_before_they_are_decoded(
    tiny_folder: Path, album: Path
) -> None:
    for number in range(100):
        (album / "album" / f"more{number}.png").symlink_to("IMG0.png")
    whole = (album / "album/IMG2.png").read_bytes()
    (album / "album/IMG2.png").write_bytes(
        whole[: len(whole) // 2 + 8]
    )  # truncated, which decoding finds
    result = run("chat", "What?", "-i", "album", "-m", tiny_folder, cwd=album)
    assert_one_error(result, "112 pictures take ", " tokens and the model's context is ", " fit")
    result = run("chat", "What?", "-i", "album/IMG*", "-m", tiny_folder, cwd=album)
    assert_one_error(result, "IMG2.png' cannot be decoded")


def test_a_conversation_attaches_what_a_question_names(start: Talk, picture: Path) -> None:
    answers = {"What is in the picture?": "red", "Is it like logo.png?": "no"}
    terminal = start(answers=answers)
    terminal.ready()
    terminal.enter("What is in no-such.png?")
    terminal.expect("error: 'no-such.png' does not exist")
    terminal.ready()
    terminal.enter(f"What is in '{picture}'?")
    terminal.expect(r"attached .*\n?.*asking: What is in the\s+picture\?")
    terminal.expect("\nred")
    terminal.ready()
    terminal.enter("Is it like logo.png?")  # which may be a name: a picture was shown before
    terminal.expect("hint: logo.png is not attached")
    terminal.expect("\nno")
    terminal.ready()
    first, second = terminal.program.asked()
    assert (first["texts"], first["media"]) == (["What is in the picture?"], ["image"])
    assert (second["texts"][-1], second["media"]) == ("Is it like logo.png?", [])


def test_a_picture_does_not_outlive_its_question(start: Talk, picture: Path) -> None:
    terminal = start("-i", picture, answers={"Why?": "so"}, env={"HOLD_ENCODER": "1"})
    terminal.ready()
    terminal.enter(f"'{picture}' Why?")
    terminal.expect("encoding")
    terminal.send("\x03")
    terminal.expect("stopped; the question was removed")
    terminal.ready()
    assert "1 picture for the next message" in terminal.toolbar()  # that of -i
    terminal.program.go()
    terminal.enter(f"'{picture}' Why?")
    terminal.expect("\nso")
    assert terminal.program.asked()[-1]["media"] == ["image", "image"]


def test_a_folder_in_a_conversation(start: Talk, album: Path) -> None:
    terminal = start()
    terminal.ready()
    terminal.enter(f"/image {album}/album/IMG1?.*")
    terminal.expect(r"IMG10\.png: .*\nIMG11\.JPG: ")
    terminal.ready()
    assert "2 pictures for the next message" in terminal.toolbar()
