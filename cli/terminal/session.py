"""The interactive program: reads lines, and carries them out until the user leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.output import (
    OutputClosedError,
    describe_memory_error,
    describe_os_error,
    fail,
    say,
)
from mlx_smolvlm.cli.printer import INTERRUPTED, PlainScreen, Printer, Screen
from mlx_smolvlm.cli.terminal.device import can_draw, wants_plain
from mlx_smolvlm.cli.terminal.editor import (
    describe_unknown_command,
    format_help,
    is_command,
    make_line_reader,
)
from mlx_smolvlm.cli.terminal.paths import dropped, split_sources
from mlx_smolvlm.cli.terminal.talk import Talk
from mlx_smolvlm.errors import SmolVLMError

if TYPE_CHECKING:
    from mlx_smolvlm import SmolVLM
    from mlx_smolvlm.cli.args import ChatOptions
    from mlx_smolvlm.cli.media import OpenedMedium


def converse(vlm: SmolVLM, options: ChatOptions, media: list[OpenedMedium]) -> int:
    """The exit status of a conversation that begins with `media`, once the user leaves."""
    make_screen: Callable[[], Screen] = PlainScreen
    if can_draw() and not (options.json or options.plain or wants_plain()):
        from mlx_smolvlm.cli.terminal.live import LiveScreen
        from mlx_smolvlm.cli.terminal.markdown import Renderer

        make_screen = functools.partial(LiveScreen, Renderer())
    say(f"{options.model}: /help lists the commands, Ctrl-D leaves", dim=True)
    talk = Talk(vlm, options, Printer(vlm, options, make_screen))
    talk.take(media)
    return Session(talk).run()


class Session:
    """Reads lines, and carries them out."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self._lines = make_line_reader()

    def run(self) -> int:
        """Exit status, once the user leaves."""
        interrupted = False
        while True:
            try:
                line = self._lines.read(self._status())
                interrupted = False
            except EOFError:
                if not self._lines.is_edited:
                    say("")
                return 0
            except KeyboardInterrupt:
                if not self._lines.is_edited:
                    say("")
                if interrupted:
                    return INTERRUPTED
                interrupted = True
                say("Ctrl-C again or Ctrl-D leaves", dim=True)
                continue
            if not self._handle(line.lstrip()):
                return 0

    def _status(self) -> str:
        """What stands below the prompt; nothing if that fails, as the next question will say."""
        try:
            return self.talk.status()
        except Exception:
            return ""

    def _handle(self, line: str) -> bool:
        """Carry out one line, and say what goes wrong; False to leave.

        No failure ends the session, since the conversation would be lost with it.
        """
        try:
            return self._carry_out(line)
        except OutputClosedError:  # nobody reads the answers
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

    def _carry_out(self, line: str) -> bool:
        """Carry out one line; False to leave."""
        if is_command(line):
            word, *rest = line.split(maxsplit=1)
            return self._command(word, "".join(rest))
        if paths := dropped(line):
            self.talk.add(paths)
        elif message := readable(line).rstrip():
            self.talk.ask(message.removeprefix("/") if message.startswith("//") else message)
        return True

    def _command(self, word: str, argument: str) -> bool:
        """Carry out a slash command; False to leave."""
        talk = self.talk
        if word in ("/exit", "/quit"):
            return False
        if word in ("/image", "/video"):
            sources = split_sources(argument)
            if not sources:
                fail(f"{word} needs a path")
            talk.add(sources, word == "/video")
        elif word == "/system":
            talk.system(readable(argument).rstrip())
        elif word == "/save":
            talk.save(argument)
        elif word == "/load":
            talk.load(argument)
        elif word in ("/", "/help"):
            say(format_help(self._lines.is_edited))
        elif word == "/reset":
            talk.reset()
        elif word == "/undo":
            talk.undo()
        elif word == "/retry":
            talk.retry()
        elif word == "/stats":
            talk.stats()
        else:
            fail(describe_unknown_command(word))
        return True


def readable(text: str) -> str:
    """`text` with what was typed in another encoding than UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
