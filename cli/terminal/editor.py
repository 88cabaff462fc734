"""The input line of a conversation: slash commands, history, completion and editing.

Where lines cannot be edited in place (TERM=dumb), the terminal itself reads them.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from mlx_smolvlm.cli.output import say
from mlx_smolvlm.cli.terminal.device import can_edit, columns_and_rows
from mlx_smolvlm.cli.terminal.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, complete_path
from mlx_smolvlm.convert.hub import find_cache_folder
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.files import expand_path, make_private_folder, open_file, write_file

HISTORY_VARIABLE = "MLX_SMOLVLM_HISTORY"
MAX_HISTORY_BYTES = 1 << 20  # a longer file loses its older half


@dataclass(frozen=True)
class SlashCommand:
    """A slash command; `argument` is empty if it takes none."""

    name: str
    argument: str
    help: str


COMMANDS = (
    SlashCommand("/image", "PATH...", "show the model pictures with the next message"),
    SlashCommand("/video", "PATH...", "show the model videos with the next message"),
    SlashCommand("/system", "TEXT", "start over with this system message"),
    SlashCommand("/reset", "", "start over"),
    SlashCommand("/undo", "", "remove the media of the next message, else the last question"),
    SlashCommand("/retry", "", "ask the last question again, for another answer"),
    SlashCommand("/save", "PATH", "write the conversation to a file"),
    SlashCommand("/load", "PATH", "continue a saved conversation"),
    SlashCommand("/stats", "", "counts and speed of the last answer, and the context used"),
    SlashCommand("/help", "", "this list"),
    SlashCommand("/exit", "", "leave (also /quit and Ctrl-D)"),
)
COMMAND_NAMES = (*(command.name for command in COMMANDS), "/quit")
_PATH_SUFFIXES = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES, "/save": (), "/load": ()}

KEYS = """\
A path dropped on an empty line is added to the next message as a picture or video.
Type two slashes (//) to begin a message with a slash.
Ctrl-C stops an answer or clears the line; pressed twice on an empty line, it leaves."""
EDITING_KEYS = """\
Alt-Enter (or Esc, Enter) starts a new line; Up and Ctrl-R find earlier ones; Tab completes."""


def format_help(is_edited: bool) -> str:
    """Return the list of commands and keys; `is_edited` where lines can be edited."""
    heads = [f"{command.name} {command.argument}".rstrip() for command in COMMANDS]
    width = max(map(len, heads))
    rows = [f"{head:{width}}  {one.help}" for head, one in zip(heads, COMMANDS, strict=True)]
    return "\n".join([*rows, KEYS, *([EDITING_KEYS] if is_edited else [])])


def is_command(line: str) -> bool:
    """Return whether `line` begins with a slash and a word, and so is not a message."""
    return re.match(r"/[\w-]*(\s|$)", line) is not None


def describe_unknown_command(word: str) -> str:
    """Return the error message for an unknown command, with the most similar commands."""
    near = difflib.get_close_matches(word, COMMAND_NAMES, 2, 0.6)
    near = near or [name for name in COMMAND_NAMES if name.startswith(word)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no command {word}{hint} (/help lists them; // sends a slash)"


class LineReader(Protocol):
    """Reads what the user types."""

    is_edited: bool

    def read(self, status: str) -> str:
        """Return the user's next input, which may have several lines.

        Args:
            status: Shown meanwhile, where there is a place for it.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """


def make_line_reader() -> LineReader:
    """Return the best line reader that the terminal supports."""
    return PromptReader() if can_edit() else InputReader()


class InputReader:
    """Reads lines with `input()`."""

    is_edited = False

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stream

    def read(self, status: str) -> str:
        """Return the next line; see `LineReader`."""
        if sys.stdout.isatty():
            return input("> ")
        say("> ", end="")  # stdout is a file for the answers
        return input()


class PromptReader:
    """Reads lines with prompt_toolkit; its prompt is on stderr if stdout is a file."""

    is_edited = True

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=open_history(),
            completer=InputCompleter(),
            key_bindings=_make_key_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=6,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            output=create_output(None if sys.stdout.isatty() else sys.stderr),
        )

    def read(self, status: str) -> str:
        """Return the next input; see `LineReader`."""
        return self._session.prompt(bottom_toolbar=status[: columns_and_rows()[0]])


class InputCompleter(Completer):
    """Completes slash commands while they are typed, and paths after some of them on Tab."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions of the text before the cursor."""
        text = document.text_before_cursor
        word, space, argument = text.partition(" ")
        if text.startswith("/") and not space:
            for one in COMMANDS:
                if one.name.startswith(word):
                    head = f"{one.name} {one.argument}"
                    text = one.name + " " * bool(one.argument)
                    yield Completion(text, -len(word), head, one.help)
        elif word in _PATH_SUFFIXES and event.completion_requested:
            yield from complete_path(argument, _PATH_SUFFIXES[word])


def _make_key_bindings() -> KeyBindings:
    """Bind Enter to send the input, and Alt-Enter to start a new line in it."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _insert_line_break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

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
