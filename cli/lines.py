"""The user's next line: edited on a terminal that can, else as the terminal itself reads it."""

from __future__ import annotations

import contextlib
import sys
from typing import Protocol

from mlx_smolvlm.cli.render import say
from mlx_smolvlm.cli.terminal import can_edit


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
    if not can_edit():
        return PlainLines()
    from mlx_smolvlm.cli.editor import EditedLines

    return EditedLines()


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
