"""Commands of a conversation that fail: they say so, and what was said stays."""

import errno
import os
import re
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import typer

from mlx_smolvlm import CacheOptions, Sampling, SmolVLM
from mlx_smolvlm.cli.args import ChatOptions
from mlx_smolvlm.cli.conversations import find_last_conversation, resume_conversation
from mlx_smolvlm.cli.media import VideoOptions
from mlx_smolvlm.cli.output import OutputClosedError, prepare_streams
from mlx_smolvlm.cli.printer import PlainScreen, Printer
from mlx_smolvlm.cli.terminal.session import Session
from mlx_smolvlm.cli.terminal.talk import Talk
from mlx_smolvlm.errors import PromptError
from tests.helpers import web_server as web

OPTIONS = ChatOptions(
    prompt=None,
    images=(),
    videos=(),
    frames=VideoOptions(),
    model="tiny",
    system=None,
    sampling=Sampling(max_tokens=2),
    detail="high",
    bits=None,
    adapter=None,
    cache=CacheOptions(),
    memory_limit=None,
    on_full="error",
    offline=True,
    json=False,
    stats=False,
    plain=True,
    pictures=False,
)
PICTURE = Path(__file__).parents[2] / "examples" / "three.png"
Converse = Callable[..., str]


class Script:
    """What a user types, line by line."""

    is_edited = False

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)

    def read(self, status: str) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None

    def ask(self, question: str) -> str:
        return "y"


@pytest.fixture
def converse(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Converse:
    """Runs a session of these lines between two questions, and gives what was on stderr.

    Both questions must be in the conversation at the end.
    """

    def run(*lines: str) -> str:
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]  # as the program does
        script = Script(["First question", *lines, "Last question"])
        monkeypatch.setattr("mlx_smolvlm.cli.terminal.session.make_line_reader", lambda: script)
        talk = Talk(tiny, OPTIONS, Printer(tiny, OPTIONS))
        assert Session(talk).run() == 0
        said = [one for one in talk._conversation.messages if one["role"] == "user"]
        texts = [message["content"][0]["text"] for message in said]
        assert texts == ["First question", "Last question"]
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save ~no-such-user/x", "No home directory is known for this user: ~no-such-user/x"),
        ("/load ~no-such-user/x", "~no-such-user/x cannot be used: No home directory"),
        ("/image ~no-such-user/x", "~no-such-user/x' does not exist"),
        ("/video ~no-such-user/x.mp4", "~no-such-user/x.mp4' does not exist"),
        ("/save a\0b", "No file can have this name"),
        ("/load a\0b", "No file can have this name"),
        ("/image a\0b", "cannot be opened"),
        ("/save \ud800", "No file can have this name"),
        ("/load \ud800", "No file can have this name"),
        ("/save /dev/null", "Not a regular file: /dev/null"),
        ("/save /dev/full", "Not a regular file: /dev/full"),
        ("/load /dev/zero", "/dev/zero cannot be read: Not a regular file"),
        (f"/save {'a' * 300}", "File name too long"),
        (f"/load {'a' * 300}", "File name too long"),
        ("/load .", "Is a directory"),
        ("/save .", "Is a directory"),
        (f"/load {PICTURE}", "three.png is no conversation file of mlx-smolvlm, or damaged"),
    ],
)
def test_a_path_that_cannot_be_used(converse: Converse, line: str, message: str) -> None:
    error = converse(line)
    assert error.count("error: ") == 1
    assert message in error
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_pipe_is_not_waited_for(converse: Converse, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    error = converse(f"/load {tmp_path}/pipe", f"/save {tmp_path}/pipe")
    assert error.count("Not a regular file") == 2
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied"),
        (OSError("strange"), "error: strange"),
        (RuntimeError("[write] Unable to write"), "error: .*Unable to write"),
        (MemoryError(), "error: out of memory"),
        (ValueError("odd"), "error: ValueError: odd; this is a defect"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_a_save_that_fails(
    converse: Converse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    message: str,
) -> None:
    real = mx.save_safetensors

    def fail(file: Any, *rest: Any) -> None:
        if Path(file.name).parent == tmp_path:  # not where conversations are kept
            raise fault
        real(file, *rest)

    (tmp_path / "chat").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("mlx.core.save_safetensors", fail)
        error = converse(f"/save {tmp_path}/chat")
    assert re.search(message, error)
    assert (tmp_path / "chat").read_text() == "old"
    assert os.listdir(tmp_path) == ["chat"]


@pytest.mark.parametrize("command", ["/reset", "/retry", "/undo", "/stats", "/help", "/system x"])
def test_any_command_that_raises_leaves_the_session(
    converse: Converse, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    names = {"/help": "format_help", "/system x": "set_system", "/stats": "print_stats"}
    name = names.get(command, command[1:])
    target = f"mlx_smolvlm.cli.terminal.talk.Talk.{name}"
    if command == "/help":
        target = "mlx_smolvlm.cli.terminal.session.format_help"
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        assert "error: ZeroDivisionError: by zero" in converse(command)


@pytest.mark.parametrize(
    "fault", [PromptError("no system message, please"), ValueError("odd"), MemoryError()]
)
def test_a_status_that_fails_leaves_the_session(
    converse: Converse, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def refuse(_: Any) -> str:
        raise fault

    monkeypatch.setattr("mlx_smolvlm.cli.terminal.talk.Talk.format_status", refuse)
    assert "error" not in converse()


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("invalid literal for int()"),
        RecursionError("too deep"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        EOFError("cut off"),
        typer.Exit(3),
        AssertionError("odd"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_whatever_a_source_raises_the_session_goes_on(
    converse: Converse, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(media: object, *_: object) -> Iterator[None]:
        if media:
            raise fault
        yield from ()

    monkeypatch.setattr("mlx_smolvlm.generate.stream.encode", fail)
    monkeypatch.setattr("mlx_smolvlm.media.video.Video.open", lambda _: list(fail(True)))
    lines = (f"/image {PICTURE}", "What is seen?", f"/video {PICTURE}")
    assert converse(*lines).count("error: ") == 2
    monkeypatch.setattr("mlx_smolvlm.media.picture.open_image", lambda _: list(fail(True)))
    assert converse(lines[0]).count("error: ") == 1


def test_a_server_with_an_odd_content_length(
    converse: Converse, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with web.serving() as server:
        server.answers[""] = web.ok(b"hello", "Content-Length: \u00b2")
        error = converse(f"/image http://127.0.0.1:{server.port}/a.png")
    assert error.count("error: ") == 1
    assert "its Content-Length is not a number of bytes" in error


def test_nothing_interrupts_keeping_a_conversation(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A closed terminal sends a signal twice, the second one perhaps while files are written."""
    real_keep, stopped = Talk.keep, []

    def keep(talk: Talk) -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # it would end the process
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(len(talk._conversation.messages))
        real_keep(talk)

    monkeypatch.setattr(Talk, "keep", keep)
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path))
    script = Script(["First question", "It is not asked"])
    monkeypatch.setattr("mlx_smolvlm.cli.terminal.session.make_line_reader", lambda: script)
    talk = Talk(tiny, OPTIONS, Printer(tiny, OPTIONS))
    assert Session(talk).run() == 128 + signal.SIGTERM
    assert stopped == [2, 2]
    assert find_last_conversation().path.exists()


def test_ctrl_c_once_more_loses_nothing(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C while an answer is stopped, and while it is kept."""
    presses = {"say": 1, "keep": 2}

    def interrupt(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def press_or_call(*arguments: Any, **options: Any) -> None:
            presses[name] -= 1
            if presses[name] >= 0:
                raise KeyboardInterrupt
            real(*arguments, **options)

        return press_or_call

    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path))
    monkeypatch.setattr("mlx_smolvlm.cli.terminal.session.say", interrupt("say", str))
    monkeypatch.setattr(Talk, "keep", interrupt("keep", Talk.keep))
    monkeypatch.setattr(Talk, "retry", stop)
    script = Script(["First question", "/retry"])
    monkeypatch.setattr("mlx_smolvlm.cli.terminal.session.make_line_reader", lambda: script)
    talk = Talk(tiny, OPTIONS, Printer(tiny, OPTIONS))
    assert Session(talk).run() == 0
    assert max(presses.values()) < 0  # each was done once more
    resumed = resume_conversation(tiny, OPTIONS, find_last_conversation())
    assert [message["role"] for message in resumed.messages] == ["user", "assistant"]


def test_an_answer_that_is_not_read_any_more_is_kept(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class ClosedPipe(PlainScreen):
        def finish(self, text: str) -> None:
            assert text
            raise OutputClosedError

    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path))
    script = Script(["First question"])
    monkeypatch.setattr("mlx_smolvlm.cli.terminal.session.make_line_reader", lambda: script)
    options = replace(OPTIONS, sampling=Sampling(max_tokens=30))
    talk = Talk(tiny, options, Printer(tiny, options, ClosedPipe))
    with pytest.raises(OutputClosedError):
        Session(talk).run()
    resumed = resume_conversation(tiny, OPTIONS, find_last_conversation())
    assert [message["role"] for message in resumed.messages] == ["user", "assistant"]


def test_every_drop_of_turns_is_told(tiny: SmolVLM, capsys: pytest.CaptureFixture[str]) -> None:
    chat = tiny.chat(sampling=Sampling(max_tokens=2), on_full="drop-oldest")
    drops = turns = 0
    with warnings.catch_warnings():
        warnings.resetwarnings()
        prepare_streams()
        for _ in range(30):
            chat.ask("wool " * 40)
            drops += len(chat._turns) <= turns
            turns = len(chat._turns)
    lines = capsys.readouterr().err.splitlines()
    assert len(set(lines)) < len(lines) == drops
