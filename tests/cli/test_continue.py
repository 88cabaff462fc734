"""`chat --continue` goes on with the last conversation, also after the program was killed."""

import json
import os
import signal
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_smolvlm import CheckpointError, PromptError, Sampling, SmolVLM
from mlx_smolvlm.cli import conversations
from mlx_smolvlm.cli.conversations import (
    Keeper,
    KeptConversation,
    Owner,
    find_folder,
    find_last_conversation,
    resume_conversation,
)
from mlx_smolvlm.files import lock
from mlx_smolvlm.generate.engine import Engine
from tests.cli.test_session_faults import OPTIONS
from tests.helpers import command
from tests.helpers.pty_terminal import Talk

ANSWERS = {"First": "**one** of", "Second": "two {hold}and more", "Third": "three"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(folder))
    return folder


def test_a_conversation_survives_a_kill(start: Talk, picture: Path, tmp_path: Path) -> None:
    terminal = start("-i", picture, "--system", "Be brief.", answers=ANSWERS)
    terminal.ready()
    terminal.enter("First")
    terminal.expect("one of")
    terminal.ready()
    terminal.enter("Second")
    terminal.expect("\ntwo")
    terminal.process.kill()
    terminal.process.wait()
    picture.unlink()  # what the model saw of it was kept
    later = start("--continue", answers=ANSWERS, size=(100, 24))
    text = later.expect("1 question and its answer")
    assert "system: Be brief.\n> [image] First\none of\n" in text
    later.ready()
    later.enter("Third")
    later.expect("\nthree")
    asked = later.program.asked()[-1]
    assert asked["roles"] == ["s", "u", "a", "u"]
    assert asked["texts"] == ["Be brief.", "First", "**one** of", "Third"]
    later.ready()
    later.send("\x04")
    later.expect("mlx-smolvlm chat --continue goes on with this conversation")
    assert later.status() == 0
    files = sorted((tmp_path / "cache" / "conversations").iterdir())
    assert [file.suffix for file in files] == [".chat", ".json"]  # one, which went on
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(files[0].parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [None, signal.SIGHUP, signal.SIGTERM])
def test_an_answer_survives_a_closed_terminal(start: Talk, number: int | None) -> None:
    terminal = start(answers=ANSWERS)
    for line, shown in (("First", "one of"), ("Second", "\ntwo")):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(shown)
    if number is None:
        terminal.hang_up()
    else:
        os.kill(terminal.process.pid, number)
    assert terminal.status() == 128 + (number or signal.SIGHUP)
    later = start("--continue", answers=ANSWERS)
    later.expect("> First\none of\n> Second\ntwo\n2 questions and their answers")


def test_another_conversation_is_kept_beside_it(start: Talk, tmp_path: Path) -> None:
    terminal = start(answers=ANSWERS)
    for line, shown in (("First", "one of"), ("/reset", "started over"), ("Third", "\nthree")):
        terminal.ready()
        terminal.enter(line)
        terminal.expect(shown)
    terminal.ready()
    assert len(list((tmp_path / "cache" / "conversations").glob("*.chat"))) == 2
    terminal.enter("/undo")
    terminal.expect("removed: Third")
    terminal.ready()
    assert len(list((tmp_path / "cache" / "conversations").glob("*.chat"))) == 1
    terminal.send("\x04")
    assert terminal.status() == 0
    assert "--continue" not in terminal.text()  # there is nothing of the last one
    later = start("-c", answers=ANSWERS)
    later.expect("> First\none of\n1 question")


def test_a_question_goes_on_with_the_last_conversation(cache: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command.run_text("chat", *arguments, env={"MLX_SMOLVLM_CACHE": str(cache)})

    assert run("--continue", "Why?").stderr.startswith("error: there is no conversation to go on")
    model = run_conversation(cache)
    first = run("--continue", "What color is it?", "--json", "--max-tokens", "4")
    assert first.returncode == 0, first.stderr
    second = run("-c", "Why?", "--json", "--max-tokens", "4")
    tokens = [json.loads(one.stdout)["prompt_tokens"] for one in (first, second)]
    assert tokens[1] > tokens[0] + 5
    assert len(find_last_conversation().path.read_bytes()) > 0
    assert model == "demo"
    wrong = run("--continue", "Why?", "--chunk", "5", "-v", "examples/left.mp4")
    assert (wrong.returncode, "--chunk" in wrong.stderr) == (2, True)


def run_conversation(cache: Path) -> str:
    """Hold a conversation of one question with the demo; the model that it belongs to."""
    from mlx_smolvlm import load

    vlm = load("demo")
    chat = vlm.chat(sampling=Sampling(max_tokens=4))
    chat.ask("What is in this picture?", "examples/one.png")
    Keeper(vlm).keep(chat)
    return find_last_conversation().owner.model


def hold(vlm: SmolVLM, *questions: str, kept: KeptConversation | None = None) -> Keeper:
    """Hold a conversation, and keep it."""
    chat, keeper = vlm.chat(sampling=Sampling(max_tokens=2)), Keeper(vlm, kept)
    for question in questions:
        chat.ask(question)
        keeper.keep(chat)
    return keeper


def test_the_last_one_is_that_of_the_last_answer(
    tiny: SmolVLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tiny, "A", "B")
    first = find_last_conversation()
    assert first.owner == Owner(str(tiny.path.resolve()))
    hold(tiny, "C")
    resumed = resume_conversation(tiny, OPTIONS, find_last_conversation())
    assert resumed.messages[0]["content"][0]["text"] == "C"
    resumed = resume_conversation(tiny, OPTIONS, first)
    assert len(resumed.messages) == 4
    resumed.ask("D")
    Keeper(tiny, first).keep(resumed)
    assert find_last_conversation().path == first.path
    monkeypatch.setattr(conversations, "MAX_FILES", 1)
    hold(tiny, "E")
    assert len(os.listdir(find_folder())) == 2
    monkeypatch.setattr(conversations, "MAX_FILES", 9)
    hold(tiny, "F")
    assert len(os.listdir(find_folder())) == 4
    monkeypatch.setattr(conversations, "MAX_BYTES", 1)
    hold(tiny, "G")
    assert len(os.listdir(find_folder())) == 2  # the newest stays, whatever its size


def test_two_programs_do_not_write_over_each_other(tiny: SmolVLM, cache: Path) -> None:
    hold(tiny, "A")
    kept = find_last_conversation()
    one, two = (resume_conversation(tiny, OPTIONS, kept) for _ in range(2))
    keepers = [Keeper(tiny, kept, chat.messages) for chat in (one, two)]
    keepers[1].keep(two)  # nothing was said yet
    for chat, keeper, question in zip((one, two, two), (*keepers, keepers[1]), "BCD", strict=True):
        chat.ask(question)
        keeper.keep(chat)
    assert list_kept_questions(tiny) == [["A", "B"], ["A", "C", "D"]]
    late = Keeper(tiny, kept)  # its file belongs to the first program now
    late.keep(tiny.chat())
    assert list_kept_questions(tiny) == [["A", "B"], ["A", "C", "D"]]


def test_a_suspended_program_is_not_waited_for(
    tiny: SmolVLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tiny, "A")
    monkeypatch.setattr(conversations, "LOCK_S", 0.1)
    descriptor = lock(find_folder())
    try:
        hold(tiny, "B")
    finally:
        os.close(descriptor)
    assert list_kept_questions(tiny) == [["A"], ["B"]]


def list_kept_questions(vlm: SmolVLM) -> list[list[str]]:
    """The questions of each conversation that is kept."""
    every = []
    for path in find_folder().glob("*.chat"):
        chat = vlm.chat()
        chat.load(path)
        users = [message for message in chat.messages if message["role"] == "user"]
        every.append([message["content"][0]["text"] for message in users])
    return sorted(every)


def test_a_clock_that_was_set_back(
    tiny: SmolVLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tiny, "A")
    later = time.time() + 10_000
    os.utime(find_last_conversation().path, (later, later))
    monkeypatch.setattr(conversations, "MAX_FILES", 1)
    assert hold(tiny, "B").has_file
    assert list_kept_questions(tiny) == [["B"]]


def test_another_model_is_refused(tiny: SmolVLM, cache: Path) -> None:
    hold(tiny, "A")
    kept = find_last_conversation()
    other = KeptConversation(kept.path, Owner("/models/other", "/adapters/mine"))
    with pytest.raises(CheckpointError, match="-m /models/other --adapter /adapters/mine; leave"):
        resume_conversation(tiny, OPTIONS, other)


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (Owner("/nowhere/model"), "the model of the last conversation is gone: /nowhere/model;"),
        (Owner("demo", "/nowhere/a"), "the adapter of the last conversation is gone: /nowhere/a;"),
    ],
)
def test_a_model_that_is_gone(owner: Owner, message: str) -> None:
    kept = KeptConversation(Path("kept.chat"), owner)
    with pytest.raises(CheckpointError, match=message):
        kept.choose_model(replace(OPTIONS, model=None))


def test_an_unusable_file_is_passed_over(tiny: SmolVLM, cache: Path) -> None:
    hold(tiny, "A")
    kept = find_last_conversation()
    for name, text in (("x", "{"), ("y", "[]"), ("z", '{"model": 1, "adapter": null}')):
        (find_folder() / f"{name}.chat").touch()
        (find_folder() / f"{name}.json").write_text(text)
    (find_folder() / "alone.chat").touch()
    assert find_last_conversation() == kept


def test_nothing_is_kept_without_a_history(
    tiny: SmolVLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SMOLVLM_HISTORY", "")
    keeper = hold(tiny, "A")
    assert not keeper.has_file
    assert not cache.exists()
    with pytest.raises(PromptError, match="MLX_SMOLVLM_HISTORY is empty"):
        find_last_conversation()


def test_a_folder_that_cannot_be_written(
    tiny: SmolVLM, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    (cache / "conversations").touch()
    keeper = hold(tiny, "A", "B")
    assert capsys.readouterr().err.count("this conversation is not kept for --continue: ") == 1
    assert not keeper.has_file


def test_a_long_wait_is_explained(
    tiny: SmolVLM,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hold(tiny, "A")
    assert "reading the model's files" not in capsys.readouterr().err
    digest = tiny.engine.checkpoint_digest

    def read_digest(_: Engine) -> str:
        time.sleep(0.5)
        return digest

    monkeypatch.setattr(Engine, "checkpoint_digest", property(read_digest))
    monkeypatch.setattr(conversations, "NOTICE_S", 0.1)
    hold(tiny, "B")
    assert "reading the model's files, once" in capsys.readouterr().err


def test_the_file_is_small(tiny: SmolVLM, cache: Path, tmp_path: Path) -> None:
    chat = tiny.chat(sampling=Sampling(max_tokens=2))
    chat.ask("wool " * 100)
    Keeper(tiny).keep(chat)
    chat.save(tmp_path / "all")
    small, large = find_last_conversation().path.stat(), (tmp_path / "all").stat()
    assert small.st_size * 5 < large.st_size
