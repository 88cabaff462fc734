"""The user's next line: edited on a terminal that can, else as the terminal itself reads it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Protocol

from mlx_smolvlm.cli.commands import COMMANDS
from mlx_smolvlm.cli.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, completions
from mlx_smolvlm.cli.render import say
from mlx_smolvlm.cli.terminal import can_edit, columns_and_rows

_PATHS = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES, "/save": (), "/load": ()}


class Lines(Protocol):
    """Reads what the user types."""

    is_edited: bool

    def read(self, status: str) -> str:
        """What the user types next, which may have several lines.

        Args:
            status: What to show meanwhile, where there is a place for it.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """


def make_lines() -> Lines:
    """The best that the terminal can do."""
    return make_edited_lines() if can_edit() else PlainLines()


class PlainLines:
    """Lines as the terminal reads them."""

    is_edited = False

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stream

    def read(self, status: str) -> str:
        """The next line; see `Lines`."""
        if sys.stdout.isatty():
            return input("> ")
        say("> ", end="")  # stdout is the answers' file
        return input()


def make_edited_lines() -> Lines:
    """Lines with history, completion and a status below; prompt_toolkit is imported here."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    from mlx_smolvlm.cli.history import open_history

    class Completions(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            word, space, argument = text.partition(" ")
            if text.startswith("/") and not space:
                for one in COMMANDS:
                    if one.name.startswith(word):
                        head = f"{one.name} {one.argument}"
                        tail = " " * bool(one.argument)
                        yield Completion(one.name + tail, -len(word), head, one.help)
            elif word in _PATHS and event.completion_requested:
                for path in completions(argument, _PATHS[word]):
                    yield Completion(path.text, path.start - len(argument), path.name)

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        history=open_history(),
        completer=Completions(),
        key_bindings=bindings,
        enable_suspend=True,
        reserve_space_for_menu=6,
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
        output=create_output(None if sys.stdout.isatty() else sys.stderr),
    )

    class EditedLines:
        is_edited = True

        def read(self, status: str) -> str:
            return session.prompt(bottom_toolbar=status[: columns_and_rows()[0]])

    return EditedLines()
