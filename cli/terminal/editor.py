"""The input line of a conversation: history, completion and editing.

Where lines cannot be edited in place (TERM=dumb), the terminal itself reads them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from mlx_smolvlm.cli.conversations import HISTORY_VARIABLE
from mlx_smolvlm.cli.output import say
from mlx_smolvlm.cli.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from mlx_smolvlm.cli.terminal.commands import COMMANDS
from mlx_smolvlm.cli.terminal.device import can_edit, columns_and_rows
from mlx_smolvlm.cli.terminal.paths import complete_path
from mlx_smolvlm.convert.hub import find_cache_folder
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.files import expand_path, make_private_folder, open_file, write_file

MAX_HISTORY_BYTES = 1 << 20  # a longer file loses its older half
_PATH_SUFFIXES = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES, "/save": (), "/load": ()}


class LineReader(Protocol):
    """Reads what the user types."""

    is_edited: bool

    def read(self, status: str) -> str:
        """Return the user's next input, which may have several lines.

        Ctrl-C on a line with text drops the text; the input is then empty.

        Args:
            status: Shown meanwhile, where there is a place for it.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C on an empty line.
        """

    def ask(self, question: str) -> str:
        """Return the answer to a question of the program; raises as `read` does."""


def make_line_reader() -> LineReader:
    """Return the best line reader that the terminal supports."""
    return PromptReader() if can_edit() else InputReader()


class InputReader:
    """Reads lines with `input()`."""

    is_edited = False

    def __init__(self) -> None:
        self._get_typed: Callable[[], str] = str
        with contextlib.suppress(ImportError):
            import readline  # gives input() line editing

            self._get_typed = readline.get_line_buffer
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stream

    def read(self, status: str) -> str:
        """Return the next line; see `LineReader`."""
        try:
            return self.ask("> ")
        except KeyboardInterrupt:
            if not self._get_typed():
                raise
            say("")
            return ""

    def ask(self, question: str) -> str:
        """Return the next line; see `LineReader`."""
        if sys.stdout.isatty():
            return input(question)
        say(question, end="")  # stdout is a file for the answers
        return input()


class PromptReader:
    """Reads lines with prompt_toolkit; its prompt is on stderr if stdout is a file."""

    is_edited = True

    def __init__(self) -> None:
        self._output = create_output(None if sys.stdout.isatty() else sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            "> ",
            prompt_continuation="  ",
            history=open_history(),
            completer=InputCompleter(),
            key_bindings=_make_key_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=6,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            output=self._output,
        )

    def read(self, status: str) -> str:
        """Return the next input; see `LineReader`."""
        return self._session.prompt(bottom_toolbar=status[: columns_and_rows()[0]])

    def ask(self, question: str) -> str:
        """Return a line that is not added to the history; see `LineReader`."""
        return PromptSession[str](question, output=self._output).prompt()


class InputCompleter(Completer):
    """Completes slash commands while they are typed, and paths on Tab."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions of the text before the cursor."""
        text = document.text_before_cursor
        word, _, argument = text.partition(" ")
        commands = [one for one in COMMANDS if one.name.startswith(text)] if text else []
        for one in commands:
            head = f"{one.name} {one.argument}"
            yield Completion(one.name + " " * bool(one.argument), -len(text), head, one.help)
        if event.completion_requested and not commands:
            suffixes = _PATH_SUFFIXES.get(word)
            if suffixes is None:  # a path in a message
                suffixes, argument = IMAGE_SUFFIXES + VIDEO_SUFFIXES, text
            yield from complete_path(argument, suffixes)


def _make_key_bindings() -> KeyBindings:
    """Bind Alt-Enter to start a new line in the input, and Ctrl-C to drop its text."""
    bindings = KeyBindings()
    has_text = Condition(lambda: bool(get_app().current_buffer.text))

    @bindings.add("escape", "enter")
    def _insert_line_break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=has_focus(DEFAULT_BUFFER) & has_text)
    def _drop_text(event: KeyPressEvent) -> None:
        event.app.exit(result="", style="class:aborting")

    return bindings


def open_history() -> History:
    """Return the history of earlier conversations, in a file that only its owner can read.

    The file is $MLX_SMOLVLM_HISTORY, by default `history` in the cache folder; an empty
    variable turns it off. If it cannot be read or written, the history is in memory only.
    """
    name = os.environ.get(HISTORY_VARIABLE)
    if name == "":
        return InMemoryHistory()
    try:
        if name is None:
            path = find_cache_folder() / "history"
            make_private_folder(path.parent)
        else:
            path = expand_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, "", mode=0o600)
        _shorten_history(path)
    except (OSError, SmolVLMError):
        return InMemoryHistory()
    return _TolerantHistory(str(path))


def _shorten_history(path: Path) -> None:
    """Remove the older half of a long history file."""
    with open_file(path, own_only=True) as file:  # it refuses a pipe, which would block
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - MAX_HISTORY_BYTES // 2))
        end = file.read(MAX_HISTORY_BYTES)
    if size > MAX_HISTORY_BYTES:
        write_file(path, b"\n" + end.partition(b"\n\n")[2])


class _TolerantHistory(FileHistory):
    """A history file that may become unreadable, and accepts text that is not valid UTF-8."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode())
