"""What people type and press out of habit, in the interactive program on a terminal."""

from pathlib import Path

import pytest

from tests.helpers.pty_terminal import Talk

ANSWERS = {"First": "one", "Second": "two"}
LEAVE = "Ctrl-C again or Ctrl-D leaves"


def test_ctrl_r_and_enter_accept_the_match(start: Talk) -> None:
    terminal = start(answers=ANSWERS)
    for line, answer in ANSWERS.items():
        terminal.ready()
        terminal.enter(line)
        terminal.expect(f"\n{answer}")
    terminal.ready()
    terminal.send("\x12")
    terminal.expect("reverse-i-search")
    terminal.send("Fir")
    terminal.expect("Fir': First")
    terminal.send("\r")
    terminal.expect("two\n> First\n")
    terminal.send("\r")
    terminal.expect("two\n> First\none")
    assert terminal.program.asked()[-1]["texts"][-1] == "First"


def test_ctrl_c_on_a_line_with_text_only_drops_the_text(start: Talk) -> None:
    terminal = start(answers=ANSWERS)
    terminal.ready()
    for _ in range(3):
        terminal.send("half a line")
        terminal.wait(lambda: terminal.shows("> half a line"), "the line")
        terminal.send("\x03")
        terminal.ready()
    assert LEAVE not in terminal.text()
    terminal.send("\x03")
    terminal.expect(LEAVE)
    terminal.ready()
    terminal.send("half a line")
    terminal.wait(lambda: terminal.shows("> half a line"), "the line")
    terminal.send("\x03")
    terminal.ready()
    terminal.send("\x03")  # the first on an empty line again
    terminal.expect(f"{LEAVE}(.|\n)*{LEAVE}")
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.ready()
    terminal.send("\x03\x03")
    assert terminal.status() == 130


def test_ctrl_c_where_lines_are_not_edited(start: Talk) -> None:
    terminal = start(answers=ANSWERS, env={"TERM": "dumb"})
    for _ in range(2):
        terminal.wait(lambda: terminal.shows(">"), "a prompt")
        terminal.send("half a line")
        terminal.wait(lambda: terminal.shows("> half a line"), "the line")
        terminal.send("\x03")
    terminal.wait(lambda: terminal.shows(">"), "a prompt")
    assert LEAVE not in terminal.text()
    terminal.send("First\r")
    terminal.expect("\none")


@pytest.mark.parametrize("line", ["exit", "quit", "/bye"])
def test_words_that_leave(start: Talk, line: str) -> None:
    terminal = start(answers=ANSWERS)
    terminal.ready()
    terminal.enter(line)
    assert terminal.status() == 0
    assert not terminal.program.log.exists()


def test_other_names_of_commands(start: Talk) -> None:
    terminal = start(answers={**ANSWERS, "exit the shop": "three"})
    for line in ("?", "/?", "/"):
        terminal.ready()
        terminal.enter(line)
        terminal.expect("/image PATH(.|\n)*Alt-Enter")
        terminal.ready()
        terminal.send("\x0c")  # Ctrl-L
    for line, answer in (("First", "one"), ("exit the shop", "three")):
        terminal.enter(line)
        terminal.expect(f"\n{answer}")
        terminal.ready()
    terminal.enter("/clear")
    terminal.expect("started over")
    terminal.ready()
    terminal.enter("Second")
    terminal.expect("\ntwo")
    assert terminal.program.asked()[-1]["texts"] == ["Second"]


def test_tab_completes_paths(
    start: Talk, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "red.png").symlink_to(picture)
    (tmp_path / "examples" / "red.txt").touch()
    monkeypatch.chdir(tmp_path)
    terminal = start(size=(200, 24))
    for typed, completed in (
        ("exam", "examples/"),
        ("Is it in exam", "Is it in examples/"),
        ("What's in examples/red", "What's in examples/red.png"),
        ("What is in 'my pic", "What is in 'my pictures/"),
        ("Is my", "Is my\\ pictures/"),
        ("/image exam", "/image examples/"),
        (f"{tmp_path}/my", f"{tmp_path}/my\\ pictures/"),
    ):
        terminal.ready()
        terminal.send(typed)
        terminal.wait(lambda typed=typed: terminal.shows(f"> {typed}"), "what was typed")
        terminal.send("\t")
        terminal.wait(lambda done=completed: terminal.shows(f"> {done}"), completed)
        terminal.send("\x03")


def test_save_asks_before_it_overwrites(start: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    path.write_text("mine")
    terminal = start(answers=ANSWERS, size=(200, 24))
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    for answer in ("n", "", "\x03", "\x04"):
        terminal.ready()
        terminal.enter(f"/save {path}")
        terminal.wait(lambda: terminal.shows(f"{path} exists; replace it? [y/N]"), "a question")
        terminal.send(f"{answer}\r" if answer.isalpha() or not answer else answer)
        terminal.expect("nothing was saved")
        assert path.read_text() == "mine"
        terminal.ready()
        terminal.send("\x0c")
    terminal.ready()
    terminal.enter(f"/save {path}")
    terminal.wait(lambda: terminal.shows(f"{path} exists; replace it? [y/N]"), "a question")
    terminal.send("y\r")
    terminal.expect("saved as")
    assert path.read_bytes() != b"mine"
    terminal.ready()
    terminal.send("\x1b[A")  # the answer is no line of the history
    terminal.wait(lambda: terminal.shows(f"> /save {path}"), "the last line")


def test_system_keeps_the_conversation(start: Talk) -> None:
    terminal = start("--system", "Be brief.", answers=ANSWERS, size=(200, 24))
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.ready()
    terminal.enter("/system Be long.")
    terminal.expect(r"set; 1 question and its answer stay")
    terminal.ready()
    terminal.enter("Second")
    terminal.expect("\ntwo")
    assert terminal.program.asked()[-1]["texts"] == ["Be long.", "First", "one", "Second"]


def test_a_mistyped_path_is_an_error(
    start: Talk, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "red.png").symlink_to(picture)
    (tmp_path / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    terminal = start(size=(200, 24))
    hint = r"; did you mean examples/red.png\?"
    for line, message in (
        ("gone.png", "'gone.png' does not exist\n"),
        ("exampels/red.png", "'exampels/red.png' does not exist\n"),
        ("examples/rde.png", f"'examples/rde.png' does not exist{hint}"),
        ("examples/red.pgn", f"'examples/red.pgn' does not exist{hint}"),
        ("my\\ picturse/a.png", "'my picturse/a.png' does not exist\n"),
        ("notes.tkt", r"'notes.tkt' does not exist; did you mean notes.txt\?"),
        ("./gone", "'./gone' does not exist\n"),
        ("notes.txt", "'notes.txt'"),
        ("examples/red.png gone.png", "'gone.png' does not exist\n"),
    ):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(f"error: .*{message}")
        terminal.ready()
        assert "next message" not in terminal.toolbar()
        terminal.send("\x0c")  # Ctrl-L: an empty screen for the next
    assert not terminal.program.log.exists()


def test_messages_that_are_no_paths(
    start: Talk, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["yes/no", "e.g.", "Hello.", "red", "version 2.0", "and/or?"]
    monkeypatch.chdir(picture.parent)
    terminal = start(answers={line: f"answer {number}" for number, line in enumerate(lines)})
    for number, line in enumerate(lines):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(f"\nanswer {number}")
    assert terminal.program.asked()[-1]["texts"][::2] == lines


def test_load_shows_what_was_said(start: Talk, picture: Path, tmp_path: Path) -> None:
    terminal = start("-i", picture, answers={"First": "**one** of two", "Second": "two"})
    for line, shown in (("First", "\none of two"), ("Second", "\ntwo"), ("/save talk", "saved as")):
        terminal.ready()
        terminal.enter(line if line[0] != "/" else f"/save '{tmp_path}/talk'")
        terminal.expect(shown)
    terminal.ready()
    terminal.send("\x04")
    assert terminal.status() == 0
    later = start()
    later.ready()
    later.enter(f"/load '{tmp_path}/talk'")
    text = later.expect("2 questions and their answers")
    assert "\n> [image] First\none of two\n> Second\ntwo\n2 questions" in text
    assert b"\x1b[1mone" in later.raw


def test_what_was_said_does_not_go_to_a_file_of_answers(start: Talk, tmp_path: Path) -> None:
    terminal = start(answers=ANSWERS, stdout=tmp_path / "answers", size=(200, 24))
    terminal.ready()
    terminal.enter("First")
    terminal.wait(lambda: "tokens/s" in terminal.toolbar(), "the next prompt")
    terminal.enter(f"/save {tmp_path}/talk")
    terminal.expect("saved as")
    terminal.ready()
    terminal.enter(f"/load {tmp_path}/talk")
    terminal.expect("> First\none\n1 question and its answer")
    assert (tmp_path / "answers").read_text() == "one\n"


def test_stats_wrap_at_words(start: Talk) -> None:
    terminal = start(answers=ANSWERS, size=(40, 24))
    terminal.ready()
    terminal.enter("First")
    terminal.expect("\none")
    terminal.ready()
    terminal.enter("/stats")
    text = terminal.expect("context: ")
    lines = text[text.index("prompt:") : text.index("context:")].split("\n")
    assert len(lines) > 3
    words = {"prompt:", "tokens/s;", "answer:", "token", "after", "peak", "memory", "GB"}
    assert words <= {word for line in lines for word in line.split()}
