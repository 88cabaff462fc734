"""Lines with history, completion and a status below; imported where they can be edited only."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from mlx_smolvlm.cli.commands import COMMANDS
from mlx_smolvlm.cli.history import open_history
from mlx_smolvlm.cli.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, completions
from mlx_smolvlm.cli.terminal import columns_and_rows
from mlx_smolvlm.quoting import escape_controls

_PATHS = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES, "/save": (), "/load": ()}


class EditedLines:
    """Lines that prompt_toolkit edits; on stderr where stdout is the answers' file."""

    is_edited = True

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=open_history(),
            completer=Completions(),
            key_bindings=_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=6,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            output=create_output(None if sys.stdout.isatty() else sys.stderr),
        )

    def read(self, status: str) -> str:
        """The next line; see `Lines`."""
        return self._session.prompt(bottom_toolbar=status[: columns_and_rows()[0]])


class Completions(Completer):
    """Slash commands as they are typed, and paths after those that take one when Tab is pressed."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """What the text before the cursor could become."""
        text = document.text_before_cursor
        word, space, argument = text.partition(" ")
        if text.startswith("/") and not space:
            for one in COMMANDS:
                if one.name.startswith(word):
                    head = f"{one.name} {one.argument}"
                    text = one.name + " " * bool(one.argument)
                    yield Completion(text, -len(word), head, one.help)
        elif word in _PATHS and event.completion_requested:
            for path in completions(argument, _PATHS[word]):
                shown = escape_controls(path.name)
                yield Completion(path.text, path.start - len(argument), shown)


def _bindings() -> KeyBindings:
    """Enter sends, and Alt-Enter begins a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
