"""A process on a pseudo-terminal, and what a terminal emulator shows of it."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyte

# The command; answers to questions in $ANSWERS are said as they are there, a token at a time.
# At a "{hold}" in them an answer waits until the file $GO is there. What the model is asked goes
# to $LOG, a line each. With $HOLD_ENCODER, encoding waits likewise.
PROGRAM = r"""
import fcntl, json, os, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C and resizing reach this process
import mlx_smolvlm.generate.stream as answers
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.errors import MediaError
ANSWERS, GO = json.loads(os.environ["ANSWERS"]), os.environ["GO"]
asked, real_tokens, real_drafted = [], answers.generate_tokens, answers.generate_drafted_tokens
real_prompt, real_start = Engine.make_prompt, answers.AnswerStream.__init__
def hold():
    while not os.path.exists(GO):
        time.sleep(0.005)
    os.unlink(GO)
def make_prompt(self, messages, media, *rest):
    asked[:] = [messages]
    return real_prompt(self, messages, media, *rest)
def start(self, engine, prompt, sampling):
    messages, = asked
    texts = ["".join(i.get("text", "") for i in m["content"]) for m in messages]
    kinds = [item["type"] for item in messages[-1]["content"]]
    row = {"roles": [m["role"][0] for m in messages], "texts": texts,
           "media": [kind for kind in kinds if kind != "text"],
           "temperature": sampling.temperature}
    real_start(self, engine, prompt, sampling)
    with open(os.environ["LOG"], "a") as log:
        log.write(json.dumps(row) + "\n")
    asked[:] = [texts[-1], engine.prompt_builder.tokenizer]
def tokens(*arguments, real=real_tokens):
    if asked[0] not in ANSWERS:
        yield from real(*arguments)
        return
    if ANSWERS[asked[0]] == "{damaged}":
        raise MediaError("the video is damaged")
    if ANSWERS[asked[0]] == "{memory}":
        raise RuntimeError("[metal::malloc] no room")
    *held, end = ANSWERS[asked[0]].split("{hold}")
    for part in held:
        *ids, last = asked[1].encode(part, add_special_tokens=False).ids
        yield from ids
        time.sleep(0.4)  # so that the last one is drawn, also after resizing
        yield last
        hold()
    yield from asked[1].encode(end, add_special_tokens=False).ids
    yield asked[1].token_to_id("<end_of_utterance>")
if "HOLD_ENCODER" in os.environ:
    real_encode = answers.encode
    def encode(media, *rest):
        if media:
            print("encoding", file=sys.stderr, flush=True)
            hold()
        yield from real_encode(media, *rest)
    answers.encode = encode
Engine.make_prompt, answers.AnswerStream.__init__ = make_prompt, start
answers.generate_tokens = tokens
answers.generate_drafted_tokens = lambda *arguments: tokens(*arguments, real=real_drafted)
from mlx_smolvlm.cli.app import main
main()
"""
PATIENCE_S = 60
PASTE = "\x1b[200~{}\x1b[201~"
Talk = Callable[..., Any]  # the fixture `start`


class Emulator:
    """A process on a terminal, with a screen that a terminal emulator draws."""

    def __init__(
        self,
        command: list[str],
        env: Mapping[str, str],
        size: tuple[int, int],
        stdout: Path | None = None,
    ) -> None:
        columns, rows = size
        self.raw = b""
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.fd, inner = pty.openpty()
        self._set_size(columns, rows)
        self.screen.write_process_input = self._answer
        self.attributes = b"\x1b[?62;22c"
        out = inner if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=inner,
            stdout=out,
            stderr=inner,
            start_new_session=True,
            env=dict(env),
        )
        for fd in {inner, out}:
            os.close(fd)

    def _answer(self, data: str) -> None:
        """Send what the emulator answers to a question of the program."""
        if not data.endswith("c"):  # the attributes are told in `_read`
            os.write(self.fd, data.encode())

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, and tell the program (the kernel sends SIGWINCH)."""
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    def _read(self, wait_s: float) -> bool:
        """Take in what comes within `wait_s`; False if the process has ended."""
        if not select.select([self.fd], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        self.raw += data
        self.feed(data)
        return bool(data)

    def feed(self, data: bytes) -> None:
        """Show `data`, and answer if it asks what the terminal can do."""
        if b"\x1b[c" in data:
            os.write(self.fd, self.attributes)
        # Pictures are for other emulators than this one.
        self._stream.feed(re.sub(rb"\x1b[_P][^\x1b]*\x1b\\", b"<picture>", data))

    def lines(self) -> list[str]:
        """What has scrolled up, then the screen; without blanks at the ends of lines."""
        top = [
            "".join(row[x].data for x in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return [line.rstrip() for line in (*top, *self.screen.display)]

    def text(self) -> str:
        """`lines`, joined, without empty ones at the end."""
        return "\n".join(self.lines()).rstrip()

    def wait(self, is_there: Callable[[], object], what: str = "it") -> None:
        """Go on until `is_there()` holds."""
        end = time.monotonic() + PATIENCE_S
        while not is_there():
            assert time.monotonic() < end, f"no {what!r} in\n{self.text()}"
            assert self._read(0.1) or is_there(), f"it ended without {what!r}:\n{self.text()}"

    def expect(self, pattern: str) -> str:
        """Wait until `pattern` is shown; the whole text."""
        self.wait(lambda: re.search(pattern, self.text()), pattern)
        return self.text()

    def settle(self) -> None:
        """Take in what comes until nothing has for half a second."""
        before = -1
        while len(self.raw) != before:
            before = len(self.raw)
            self._read(0.5)

    def ready(self) -> str:
        """Wait for an empty prompt; the whole text."""

        def is_empty() -> bool:
            line = self.screen.display[self.screen.cursor.y].rstrip()
            return line == ">" and self.screen.cursor.x == 2 and self.toolbar().startswith("demo |")

        self.wait(is_empty, "an empty prompt")
        return self.text()

    def shows(self, line: str) -> bool:
        """Whether the cursor is at the end of this line, apart from blanks."""
        cursor = self.screen.cursor
        return self.screen.display[cursor.y][: cursor.x].rstrip() == line

    def toolbar(self) -> str:
        """The last line of the screen."""
        return self.screen.display[-1].rstrip()

    def send(self, text: str | bytes) -> None:
        """Type `text`."""
        os.write(self.fd, text if isinstance(text, bytes) else text.encode())

    def enter(self, line: str | bytes, echo: str | None = None) -> None:
        """Type `line`, wait until `echo` is at the cursor (by default the line), and Enter."""
        self.send(line)
        shown = echo if echo is not None else line if isinstance(line, str) else ""
        tail = "".join(shown.split())[-20:]
        self.wait(lambda: "".join(self._typed().split()).endswith(tail), f"typed {tail}")
        self.send("\r")

    def _typed(self) -> str:
        """What is shown up to the cursor."""
        cursor = self.screen.cursor
        above = self.screen.display[max(0, cursor.y - 12) : cursor.y]
        return "".join(above) + self.screen.display[cursor.y][: cursor.x]

    def status(self) -> int:
        """Exit status, once it has left."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not leave:\n{self.text()}"
            self._read(0.05) if self.fd >= 0 else time.sleep(0.05)
        with contextlib.suppress(OSError):
            while self.fd >= 0 and select.select([self.fd], [], [], 0)[0] and self._read(0):
                pass
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the terminal, as closing its window does."""
        os.close(self.fd)
        self.fd = -1

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.process.wait()
        if self.fd >= 0:
            self.hang_up()


class Program:
    """The program, what it was asked, and a way to let an answer go on."""

    def __init__(self, folder: Path, answers: dict[str, str], env: dict[str, str]) -> None:
        self.folder, self.log = folder, folder / "log.jsonl"
        self.env = {
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")},
            **dict.fromkeys(("TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID"), ""),
            **{"TMUX": "", "STY": "", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            "MLX_SMOLVLM_CACHE": str(folder / "cache"),
            "ANSWERS": json.dumps(answers),
            "GO": str(folder / "go"),
            "LOG": str(self.log),
            **env,
        }

    def go(self) -> None:
        """Let the answer that waits go on."""
        (self.folder / "go").touch()

    def is_waiting(self) -> bool:
        """Whether no answer has gone on since `go`."""
        return (self.folder / "go").exists()

    def asked(self) -> list[dict[str, Any]]:
        """Every prompt so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]
