"""The interactive program on a terminal that edits lines, as a terminal emulator shows it."""

import base64
import io
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers import pty_terminal
from tests.helpers.pty_terminal import PASTE, Program, Talk


def test_turns(start: Talk, picture: Path) -> None:
    terminal = start("-i", picture, answers={"First": "**one** [x]", "Second": "two"})
    assert "red one.png: 2 x 2 tiles" in terminal.ready()
    assert re.search(r"demo \| 0 of 2,048 tokens \| 1 picture for the next", terminal.toolbar())
    terminal.enter("First")
    terminal.expect("one \\[x\\]")
    assert re.search(r"demo \| \d+ of 2,048 tokens \| [\d.]+ tokens/s", terminal.ready())
    terminal.enter("Second")
    terminal.expect("\ntwo")
    terminal.ready()
    terminal.enter("What is in this picture?")  # the model itself
    terminal.expect("picture\\?\n\\w+")
    terminal.ready()
    first, second, third = terminal.program.asked()
    assert (first["roles"], first["media"]) == (["u"], ["image"])
    assert (second["roles"], second["media"]) == (["u", "a", "u"], [])
    assert second["texts"] == ["First", "**one** [x]", "Second"]
    assert third["texts"][-2:] == ["two", "What is in this picture?"]
    assert "**" not in terminal.text()
    terminal.send("\x04")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.text()


def test_commands(start: Talk, picture: Path, tmp_path: Path) -> None:
    answers = {"First": "one", "Second": "two", "/third": "three", "Fourth": "four"}
    terminal = start("--system", "Be brief.", answers=answers)

    def run(line: str, *patterns: str) -> None:
        terminal.ready()
        terminal.enter(line)
        for pattern in patterns:
            terminal.expect(pattern)
        terminal.ready()

    run("/", r"/image PATH\.\.\.", "/exit", "Alt-Enter")
    run("/stats", "no answer yet\ncontext: \\d+ of 2,048 tokens")
    run("/undo", "error: there is nothing to undo")
    run("/retry", "error: there is no question to ask again")
    run("/system", "Be brief")
    run("First", "\none")
    run("/stats", "prompt: \\d+ tokens.*answer: \\d+ tokens")
    run("Second", "\ntwo")
    run("/undo", "removed: Second")
    run("//third", "\nthree")
    asked = terminal.program.asked()[-1]
    assert asked["texts"] == ["Be brief.", "First", "one", "/third"]
    assert asked["temperature"] == 0
    run("/retry", "three(.|\n)*\nthree")
    again = terminal.program.asked()[-1]
    assert again["texts"] == asked["texts"]
    assert again["temperature"] > 0
    saved = tmp_path / "a talk.bin"
    run(f"/save '{saved}'", "saved as")
    run("/reset")
    run("Fourth", "\nfour")
    assert terminal.program.asked()[-1]["texts"] == ["Be brief.", "Fourth"]
    run(f"/load '{saved}'", "2 questions and their answers")
    run("Fourth", "\nfour(.|\n)*\nfour")
    assert terminal.program.asked()[-1]["texts"][:5] == [*asked["texts"], "three"]
    run("/system Be long.", "3 questions and their answers stay")
    run("Fourth", "(\nfour(.|\n)*){3}")
    texts = terminal.program.asked()[-1]["texts"]
    assert texts == ["Be long.", *asked["texts"][1:], "three", "Fourth", "four", "Fourth"]
    run(f"/image {str(picture).replace(' ', chr(92) + ' ')}", "red one.png: 2 x 2 tiles")
    run("/undo", "removed 1 picture")
    terminal.enter("/quit")
    assert terminal.status() == 0


def test_mistakes(start: Talk, tmp_path: Path) -> None:
    terminal = start(size=(200, 30))
    (tmp_path / "text.png").write_text("no picture")
    for line, pattern in (
        (f"/image {tmp_path}/none.png", "error: .*none.png' does not exist"),
        (f"{tmp_path}/gone\\ away.jpg", "error: .*gone away.jpg' does not exist"),
        (f"/image {tmp_path}/text.png", "error: .*text.png"),
        (f"/video {tmp_path}", "error: .*is a folder"),
        ("/image", "error: /image needs a path"),
        ("/save", "error: /save needs a path"),
        ("/save a b", "error: /save takes one path"),
        (f"/save {tmp_path}/no/such/folder/x", "error: No such file.*: .*/no/such/folder/x"),
        (f"/load {tmp_path}/text.png", "error: .*text.png"),
        (f"/load {tmp_path}/none", "error: .*none"),
        ("/imgae x", r"there is no command /imgae; did you mean /image\?"),
        ("/xyzzy", r"there is no command /xyzzy \("),
        ("wool " * 900, "error: the prompt takes"),
    ):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(pattern)
        terminal.ready()
        terminal.send("\x0c")  # Ctrl-L: an empty screen for the next
    assert "Traceback" not in terminal.text()
    assert not terminal.program.log.exists()
    terminal.send("\x04")
    assert terminal.status() == 0


def test_ctrl_c(start: Talk) -> None:
    answers = {"First": "A first part, {hold}never", "Second": "two"}
    terminal = start(answers=answers)
    terminal.ready()
    terminal.enter("First")
    terminal.expect("A first part,")
    terminal.send("\x03")
    terminal.ready()
    terminal.enter("Second")
    terminal.expect("\ntwo")
    terminal.ready()
    assert terminal.program.asked()[-1]["texts"] == ["First", "A first part, ", "Second"]
    terminal.send("half a li")
    terminal.expect("> half a li")
    terminal.send("\x03")
    terminal.ready()
    terminal.send("\x03")
    terminal.expect("Ctrl-C again or Ctrl-D leaves")
    terminal.ready()
    terminal.enter("/stats")
    terminal.expect("context: ")
    terminal.ready()
    terminal.send("\x03")
    terminal.expect("leaves(.|\n)*leaves(.|\n)*leaves")
    terminal.ready()
    terminal.send("\x03")
    assert terminal.status() == 130
    assert "Traceback" not in terminal.text()


def test_ctrl_c_while_encoding_takes_the_question_back(start: Talk, picture: Path) -> None:
    terminal = start("-i", picture, answers={"First": "one"}, env={"HOLD_ENCODER": "1"})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("encoding")
    terminal.send("\x03")
    terminal.expect("stopped; the question was removed")
    terminal.ready()
    assert "1 picture for the next message" in terminal.toolbar()
    terminal.program.go()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.ready()
    assert [(row["roles"], row["media"]) for row in terminal.program.asked()] == (
        [(["u"], ["image"])] * 2
    )


def test_a_question_that_fails_is_taken_back(start: Talk) -> None:
    answers = {"First": "one", "Bad": "{damaged}", "Large": "{memory}", "Last": "end"}
    terminal = start(answers=answers)
    for line, pattern in (
        ("First", "\none"),
        ("Bad", "error: the video is damaged"),
        ("Large", r"error: out of memory \(\[metal::malloc\] no room\); try"),
        ("Last", "\nend"),
    ):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(pattern)
    assert terminal.program.asked()[-1]["texts"] == ["First", "one", "Last"]
    assert "reading" not in terminal.text()


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in range(0, 250, 25):
            pixels = np.full((64, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))


def test_videos(start: Talk, tmp_path: Path) -> None:
    write_video(tmp_path / "my clip.mp4")
    terminal = start(answers={"First": "one"}, size=(200, 24), env={"KITTY_WINDOW_ID": "1"})
    terminal.ready()
    terminal.enter(f"{tmp_path}/my\\ clip.mp4")
    terminal.expect(r"my clip.mp4: \d frames? of 0:00:02, \d+ tokens")
    terminal.ready()
    width, height = decoded_kitty(terminal.raw).size
    assert (width in (64, 128, 192), height) == (True, 64)  # frames side by side
    terminal.enter(f"/video '{tmp_path}/my clip.mp4'")
    terminal.expect(r"(my clip.mp4: \d frames? of(.|\n)*){2}")
    terminal.ready()
    assert "2 videos for the next message" in terminal.toolbar()
    terminal.enter("First")
    terminal.expect("\none")
    assert terminal.program.asked()[-1]["media"] == ["video"] * 2


def test_several_lines(start: Talk) -> None:
    terminal = start()
    terminal.ready()
    terminal.send(PASTE.format("one\ntwo"))
    terminal.expect("> one\n  two")
    terminal.send("\x1b\r")
    terminal.enter("three")
    terminal.ready()
    assert terminal.program.asked()[-1]["texts"] == ["one\ntwo\nthree"]


def test_completion(start: Talk, picture: Path) -> None:
    terminal = start()
    terminal.ready()
    terminal.send("/im")
    terminal.expect("show the model pictures")
    terminal.send("\t")
    terminal.wait(lambda: terminal.screen.cursor.x == len("> /image "), "a space")
    terminal.send(f"{picture.parent.parent}/my\t")

    def is_shown(path: str) -> bool:
        return path in "".join(line.strip() for line in terminal.lines())

    terminal.wait(lambda: is_shown("my\\ pictures/"), "the folder")
    (picture.parent / "notes.txt").write_text("no picture")
    terminal.send("\t")
    terminal.wait(lambda: is_shown("my\\ pictures/red\\ one.png"), "the file")
    terminal.send("\r")
    terminal.expect("red one.png: 2 x 2 tiles")


def test_history(start: Talk, tmp_path: Path) -> None:
    terminal = start(answers={"Über": "one", "Second": "two"})
    for line in ("Über", "Second"):
        terminal.ready()
        terminal.enter(line)
    terminal.expect("\ntwo")
    terminal.ready()
    terminal.send("\x1b[A\x1b[A")
    terminal.expect("(?m)^> Über(.|\n)*^> Über")
    terminal.send("\x03\x03\x03")
    assert terminal.status() == 130
    path = tmp_path / "cache" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    later = start()
    later.ready()
    later.send("\x1b[A")
    later.expect("> Second")


@pytest.mark.parametrize("value", ["", "file/below"])
def test_no_history(start: Talk, tmp_path: Path, value: str) -> None:
    (tmp_path / "file").touch()
    where = str(tmp_path / value) if value else ""
    terminal = start(answers={"First": "one"}, env={"MLX_SMOLVLM_HISTORY": where})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.ready()
    terminal.send("\x1b[A")
    terminal.expect("(?m)^> First(.|\n)*^> First")  # of this conversation
    assert not (tmp_path / "cache" / "history").exists()
    assert (tmp_path / "cache").exists() == bool(value)  # "" keeps nothing at all


def test_bytes_that_are_no_utf_8(start: Talk, picture: Path) -> None:
    terminal = start(answers={"caf\ufffd au lait": "one", "Second": "two"})
    terminal.ready()
    terminal.enter(b"caf\xe9 au lait", "au lait")
    terminal.expect("\none")
    terminal.ready()
    assert terminal.program.asked()[-1]["texts"] == ["caf\ufffd au lait"]
    latin = os.fsencode(picture.parent) + b"/\xe9t\xe9.png"
    shutil.copy(os.fsencode(picture), latin)
    terminal.enter(b"/image '" + latin + b"'", "t?.png'")
    terminal.expect("png: 2 x 2 tiles")
    terminal.ready()
    terminal.enter("/system \xfcber")
    terminal.ready()
    terminal.enter("Second")
    terminal.expect("\ntwo")
    assert terminal.program.asked()[-1]["media"] == ["image"]
    assert "Traceback" not in terminal.text()


def test_dropped_paths(start: Talk, picture: Path) -> None:
    other = picture.with_name("blue.png")
    Image.new("RGB", (30, 30), (0, 0, 200)).save(other)
    terminal = start(answers={"First": "one"}, size=(200, 24))
    terminal.ready()
    url = "file://" + str(other).replace(" ", "%20")
    terminal.send(PASTE.format(f"{str(picture).replace(' ', chr(92) + ' ')} {url} "))
    terminal.expect("blue.png")
    terminal.send("\r")
    terminal.expect("red one.png: 2 x 2 tiles")
    terminal.expect("blue.png: 2 x 2 tiles")
    terminal.ready()
    terminal.enter(f"'{picture}'")
    terminal.expect("red one.png: 2 x 2 tiles(.|\n)*red one.png: 2 x 2 tiles")
    terminal.ready()
    assert "3 pictures for the next message" in terminal.toolbar()
    terminal.enter("First")
    terminal.expect("\none")
    assert terminal.program.asked()[-1]["media"] == ["image"] * 3


LONG = "\n\n".join(
    [
        "# Heading",
        *(f"Paragraph {n} with **bold** words and some [x] more of them {n}." for n in range(15)),
        "| a | b |\n|---|---|\n| 1 | 2 |{hold}",
        "\n".join(f"{n}. item {n} \U0001f600 \u6f22\u5b57" for n in range(1, 40)),
        "```python\n" + "\n".join(f"line_{n} = {n}" for n in range(40)) + "\n```{hold}",
        "- [ ] todo <loc_12> <b>tag</b>\n- [x] done",
        "The end.",
    ]
)


def test_a_long_answer_scrolls(start: Talk) -> None:
    terminal = start(answers={"First": LONG})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("Paragraph 14 with bold")
    terminal.program.go()
    terminal.expect("line_39")
    terminal.program.go()
    terminal.expect("The end.")
    text = terminal.ready()
    lines = [line.strip() for line in text.splitlines()]
    assert lines.count("Heading") == 1
    for n in range(15):
        assert lines.count(f"Paragraph {n} with bold words and some [x] more of them {n}.") == 1
    assert [line.split()[0] for line in lines if " item " in line] == [*map(str, range(1, 40))]
    assert [line for line in lines if line.startswith("line_")] == (
        [f"line_{n} = {n}" for n in range(40)]
    )
    assert "• [ ] todo <loc_12> <b>tag</b>" in lines
    assert not re.search(r"tokens/s(.|\n)*The end", text)  # only below, in the status


@pytest.mark.parametrize("size", [(40, 24), (120, 12), (24, 9)])
def test_resizing_in_the_middle(start: Talk, size: tuple[int, int]) -> None:
    terminal = start(answers={"First": LONG})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("Paragraph 14 with bold")
    before = len(terminal.raw)
    terminal.resize(*size)
    terminal.program.go()
    terminal.wait(lambda: "line_39" in terminal.text(), "the code")
    terminal.program.go()
    terminal.expect("The end.")
    text = terminal.ready()
    assert not re.search(rb"\x1b\[\d*A", terminal.raw[before : terminal.raw.rindex(b"The end")])
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if line.startswith("line_")] == (
        [f"line_{n} = {n}" for n in range(40)]
    )
    assert lines.count("Heading") <= 1  # this emulator forgets lines when it gets fewer
    terminal.enter("/stats")
    terminal.expect("context: ")


def test_text_is_printed_before_its_block_is_finished(start: Talk) -> None:
    said = "- A first item, **bold, {hold}still bold** and {hold}more of it.\n- Another"
    terminal = start(answers={"First": said})
    terminal.ready()
    terminal.enter("First")
    terminal.expect(r"\n • A first item,$")  # the rest is bold, which is not known yet
    terminal.program.go()
    terminal.expect(r"\n • A first item, bold, still bold and$")
    terminal.program.go()
    terminal.expect(r"\n • A first item, bold, still bold and more of it.\n • Another\n>")


def test_a_table_is_waited_for(start: Talk) -> None:
    table = "| a | b |\n|---|---|\n{hold}| 1 | 2 |\n| 1 | 2 |\n{hold}| 3 |{hold} 4 |\n\nEnd."
    terminal = start(answers={"First": "Before.\n\n" + table})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\nBefore.")
    for _ in range(2):
        terminal.program.go()
        terminal.wait(lambda: not terminal.program.is_waiting(), "the answer")
        terminal.expect(r"Before.\n\d+ tokens, [\d.]+ tokens/s$")
    terminal.program.go()
    terminal.expect("End.")
    text = terminal.ready()
    assert "tokens/s" not in text.rsplit("\n", 1)[0]
    rows = [line.split() for line in text.splitlines() if line.startswith((" a", " 1", " 3"))]
    assert rows == [["a", "b"], *[["1", "2"]] * 2, ["3", "4"]]


def test_typing_during_an_answer_waits(start: Talk) -> None:
    terminal = start(answers={"First": "one {hold}and all", "Second": "two"})
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.send("Second\r")
    terminal.settle()
    assert "Second" not in terminal.text()
    terminal.program.go()
    terminal.expect("one and all\n> Second\ntwo")
    assert terminal.program.asked()[-1]["texts"][-1] == "Second"


@pytest.mark.parametrize(
    ("options", "env"), [(("--plain",), {}), ((), {"NO_COLOR": "1"}), ((), {"TERM": "dumb"})]
)
def test_plain_answers(start: Talk, options: tuple[str, ...], env: dict[str, str]) -> None:
    said = "**bold** [x](y) and \x1b[31mred"
    terminal = start(*options, answers={"First": said}, env=env)
    terminal.expect("(?m)^>")
    terminal.send("First\r")
    terminal.expect(r"\*\*bold\*\* \[x\]\(y\) and \\x1b\[31mred")


def decoded_iterm(raw: bytes) -> Image.Image:
    match = re.search(rb"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:([^\x07]*)\x07", raw)
    assert match is not None
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1])
    return Image.open(io.BytesIO(data))


def decoded_kitty(raw: bytes) -> Image.Image:
    parts = re.findall(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\", raw)
    assert parts[0][0].startswith(b"a=T,f=100,q=2")
    assert [b"m=1" in keys for keys, _ in parts] == [True] * (len(parts) - 1) + [False]
    return Image.open(io.BytesIO(base64.b64decode(b"".join(data for _, data in parts))))


@pytest.mark.parametrize(
    ("env", "decode"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, decoded_iterm),
        ({"KITTY_WINDOW_ID": "1"}, decoded_kitty),
    ],
)
def test_pictures_inline(
    start: Talk, picture: Path, env: dict[str, str], decode: Callable[[bytes], Image.Image]
) -> None:
    terminal = start("-i", picture, env=env)
    terminal.expect("red one.png: 2 x 2 tiles")
    image = decode(terminal.raw)
    assert image.size == (64, 48)
    assert image.convert("RGB").getpixel((9, 9)) == (200, 30, 30)


def test_sixel_where_the_terminal_says_so(start: Talk, picture: Path) -> None:
    terminal = start(env={"TMUX": "x", "KITTY_WINDOW_ID": "1"})
    terminal.attributes = b"\x1b[?62;4;22c"
    terminal.ready()
    terminal.enter(f"'{picture}'")
    terminal.expect("red one.png: 2 x 2 tiles")
    assert b'\x1bP0;1q"1;1;64;48#0;2;78;12;12' in terminal.raw
    assert b"\x1b_G" not in terminal.raw


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ((), {}),
        (("--no-images",), {"TERM_PROGRAM": "iTerm.app"}),
        ((), {"TMUX": "x", "KITTY_WINDOW_ID": "1"}),
        ((), {"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}),
    ],
)
def test_no_pictures_inline(
    start: Talk, picture: Path, options: tuple[str, ...], env: dict[str, str]
) -> None:
    terminal = start("-i", picture, *options, env=env)
    terminal.expect("red one.png: 2 x 2 tiles")
    for sequence in (b"1337", b"\x1b_G", b"\x1bP"):
        assert sequence not in terminal.raw


def test_answers_go_to_a_file(start: Talk, tmp_path: Path, picture: Path) -> None:
    path = tmp_path / "answers.txt"
    terminal = start("-i", picture, answers={"First": "**one** [x]"}, stdout=path)
    terminal.ready()
    terminal.enter("First")
    terminal.wait(lambda: "tokens/s" in terminal.toolbar(), "the next prompt")
    terminal.send("\x04")
    assert terminal.status() == 0
    assert path.read_text() == "**one** [x]\n"


def test_nothing_for_terminals_goes_to_pipes(picture: Path, tmp_path: Path) -> None:
    answers = {"First": "**bold** [x]"}
    program = Program(tmp_path, answers, {"TERM_PROGRAM": "iTerm.app"})
    code = pty_terminal.PROGRAM.replace("fcntl.ioctl(", "(lambda *rest: None)(")
    report = (
        "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=open('m','w')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", report + code, "chat", "First", "-i", picture],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=program.env,
        cwd=tmp_path,
        timeout=60,
    )
    assert result.stdout == b"**bold** [x]\n"
    assert result.stderr.startswith(b"the demo knows ")
    assert b"\x1b" not in result.stderr
    assert result.stderr.count(b"\n") == 1
    loaded = (tmp_path / "m").read_text().split()
    assert "mlx_smolvlm.cli.chat" in loaded
    for name in ("prompt_toolkit", "rich", "markdown_it", "mlx_smolvlm.cli.terminal.session"):
        assert name not in loaded
