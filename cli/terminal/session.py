"""The interactive program: read lines and execute them until the user leaves."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.load import name_model
from mlx_smolvlm.cli.output import (
    OutputClosedError,
    describe_memory_error,
    describe_os_error,
    fail,
    say,
)
from mlx_smolvlm.cli.printer import INTERRUPTED, PlainScreen, Printer, Screen
from mlx_smolvlm.cli.terminal.commands import (
    describe_unknown_command,
    format_help,
    parse_command,
)
from mlx_smolvlm.cli.terminal.device import can_draw, wants_plain
from mlx_smolvlm.cli.terminal.editor import make_line_reader
from mlx_smolvlm.cli.terminal.paths import find_dropped_paths, split_sources
from mlx_smolvlm.cli.terminal.talk import Talk
from mlx_smolvlm.errors import SmolVLMError

if TYPE_CHECKING:
    from mlx_smolvlm import SmolVLM
    from mlx_smolvlm.cli.args import ChatOptions
    from mlx_smolvlm.cli.conversations import KeptConversation
    from mlx_smolvlm.cli.media import OpenedMedium


def converse(
    vlm: SmolVLM,
    options: ChatOptions,
    media: list[OpenedMedium],
    kept: KeptConversation | None = None,
) -> int:
    """Hold a conversation that begins with `media`, or goes on with them; return the exit status.

    Raises:
        CheckpointError: The conversation that was `kept` belongs to another model.
    """
    make_screen: Callable[[], Screen] = PlainScreen
    if can_draw() and not (options.json or options.plain or wants_plain()):
        from mlx_smolvlm.cli.terminal.live import LiveScreen
        from mlx_smolvlm.cli.terminal.markdown import Renderer

        make_screen = functools.partial(LiveScreen, Renderer())
    say(f"{name_model(options, vlm)}: /help lists the commands, Ctrl-D leaves", dim=True)
    talk = Talk(vlm, options, Printer(vlm, options, make_screen), kept)
    talk.add_media(media)
    return Session(talk).run()


class Session:
    """Reads lines and executes them."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self._reader = make_line_reader()
        self._signal = 0  # that asked the program to end
        self._is_keeping = False  # what was said, which nothing may interrupt

    def run(self) -> int:
        """Read lines until the user leaves; return the exit status."""
        try:
            status = self._read_lines()
        except KeyboardInterrupt:  # one of several
            status = INTERRUPTED
        self._is_keeping = True
        with self._interrupt_on_hangup(), _ignore_ctrl_c():
            self.talk.keep()  # if Ctrl-C stopped that before
            self.talk.say_goodbye()
        return 128 + self._signal if self._signal else status

    def _read_lines(self) -> int:
        """Read and execute lines until the user leaves; return the exit status."""
        was_interrupted = False
        while True:
            try:
                line = self._reader.read(self._format_status())
                was_interrupted = False
            except EOFError:
                if not self._reader.is_edited:
                    say("")
                return 0
            except KeyboardInterrupt:
                if not self._reader.is_edited:
                    say("")
                if was_interrupted:
                    return INTERRUPTED
                was_interrupted = True
                say("Ctrl-C again or Ctrl-D leaves", dim=True)
                continue
            if not self._handle(line.lstrip()):
                return 0

    def _format_status(self) -> str:
        """Return the status below the prompt; if it fails, empty: the next question says why."""
        try:
            return self.talk.format_status()
        except Exception:
            return ""

    def _handle(self, line: str) -> bool:
        """Execute a line, and keep what was said; return False to leave."""
        with self._interrupt_on_hangup():
            goes_on = True
            try:
                goes_on = self._try(line)
            except KeyboardInterrupt:  # another one, while an answer is stopped
                say("")
            finally:
                self._is_keeping = True
                with contextlib.suppress(KeyboardInterrupt):
                    self.talk.keep()
                self._is_keeping = False
        return goes_on and not self._signal

    def _try(self, line: str) -> bool:
        """Execute a line and print its error, if any; return False to leave.

        No error ends the session, since the conversation would be lost with it.
        """
        try:
            return self._execute(line)
        except OutputClosedError:  # the answers are not read any more
            raise
        except SmolVLMError as error:
            fail(error)
        except OSError as error:
            fail(describe_os_error(error))
        except KeyboardInterrupt:  # while media are opened or drawn
            say("")
        except Exception as error:
            text = f"{type(error).__name__}: {error}; this is a defect, /save keeps what was said"
            fail(describe_memory_error(error) or text)
        return True

    @contextlib.contextmanager
    def _interrupt_on_hangup(self) -> Iterator[None]:
        """Let a closed terminal, or `kill`, stop an answer as Ctrl-C does, so that it is kept.

        A closed terminal may send a signal twice, by the kernel and by the shell.
        """

        def interrupt(number: int, frame: object) -> None:
            is_first, self._signal = not self._signal, number
            if is_first and not self._is_keeping:
                raise KeyboardInterrupt

        before = {}
        for number in (signal.SIGHUP, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
                before[number] = signal.signal(number, interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _confirm(self, question: str) -> bool:
        """Ask the user a question; anything but a yes is a no."""
        try:
            answer = self._reader.ask(f"{question} [y/N] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return answer.strip().lower() in ("y", "yes")

    def _execute(self, line: str) -> bool:
        """Execute a line; return False to leave."""
        if command := parse_command(line):
            return self._execute_command(*command)
        if paths := find_dropped_paths(line):
            self.talk.add_sources(paths)
        elif message := replace_undecoded(line).rstrip():
            self.talk.ask_typed(message.removeprefix("/") if message.startswith("//") else message)
        return True

    def _execute_command(self, word: str, argument: str) -> bool:
        """Execute a slash command; return False to leave."""
        talk = self.talk
        if word == "/exit":
            return False
        if word in ("/image", "/video"):
            sources = split_sources(argument)
            if not sources:
                fail(f"{word} needs a path")
            talk.add_sources(sources, word == "/video")
        elif word == "/system":
            talk.set_system(replace_undecoded(argument).rstrip())
        elif word == "/save":
            talk.save(argument, self._confirm)
        elif word == "/load":
            talk.load(argument)
        elif word == "/help":
            say(format_help(self._reader.is_edited))
        elif word == "/reset":
            talk.reset()
        elif word == "/undo":
            talk.undo()
        elif word == "/retry":
            talk.retry()
        elif word == "/stats":
            talk.print_stats()
        else:
            fail(describe_unknown_command(word))
        return True


@contextlib.contextmanager
def _ignore_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C in what ends the program anyway, and must not be left out."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def replace_undecoded(text: str) -> str:
    """Replace bytes that were typed in another encoding than UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
