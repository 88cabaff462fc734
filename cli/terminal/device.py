"""The capabilities of the terminal: editing lines, drawing, showing pictures."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Literal

Graphics = Literal["iterm", "kitty", "sixel", "none"]

_REPLY_S = 0.5  # how long to wait for the terminal's answer
_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_SIXEL = b"4"  # the attribute of terminals that show Sixel pictures


def can_draw() -> bool:
    """Return whether stdin, stdout and stderr are a terminal that can move its cursor."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(stream.isatty() for stream in streams) and can_edit()


def can_edit() -> bool:
    """Return whether stdin is a terminal where lines can be edited in place."""
    return sys.stdin.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def wants_plain() -> bool:
    """Return whether the user asks for undecorated text (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def columns_and_rows() -> tuple[int, int]:
    """Return the current size of the terminal; 80 by 24 if it is unknown."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24


def cell_size() -> tuple[int, int]:
    """Return the width and height of a character in pixels; 8 by 16 if they are unknown."""
    import fcntl
    import struct
    import termios

    with contextlib.suppress(OSError, ValueError):
        packed = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", packed)
        if min(rows, columns, width, height) > 0:
            return max(width // columns, 1), max(height // rows, 1)
    return 8, 16


def detect_graphics(environ: Mapping[str, str]) -> Graphics:
    """Return how the terminal shows pictures inline.

    Known terminals are recognized by environment variables; others are asked. Within tmux and
    screen, the variables describe the outer terminal, so only the answer counts.
    """
    program, term = environ.get("TERM_PROGRAM", ""), environ.get("TERM", "")
    is_multiplexed = bool(environ.get("TMUX") or environ.get("STY"))
    if not is_multiplexed and not term.startswith(("screen", "tmux")):
        if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if (
            environ.get("KITTY_WINDOW_ID")
            or term in ("xterm-kitty", "xterm-ghostty")
            or program == "ghostty"
        ):
            return "kitty"
    return "sixel" if _SIXEL in _query_attributes() else "none"


def _query_attributes() -> list[bytes]:
    """Ask the terminal for its attributes (DA1); return none if it does not answer in time.

    It is not asked while typed keys are waiting to be read, since they would be lost.
    """
    import termios

    fd = sys.stdin.fileno()
    if select.select([fd], [], [], 0)[0]:
        return []
    reply, end = b"", time.monotonic() + _REPLY_S
    with _clear_modes(fd, termios.ECHO | termios.ICANON):
        os.write(sys.stderr.fileno(), b"\x1b[c")
        while not (found := _ATTRIBUTES.search(reply)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return []
            reply += os.read(fd, 64)
    return found[1].split(b";")[1:]


@contextlib.contextmanager
def hide_typing() -> Iterator[None]:
    """Do not show typed keys; they are read with the next line. Ctrl-C works as usual."""
    import termios

    with _clear_modes(sys.stdin.fileno(), termios.ECHO):
        yield


@contextlib.contextmanager
def _clear_modes(fd: int, without: int) -> Iterator[None]:
    """Clear some of the terminal's local modes, and restore them at the end."""
    import termios

    before = termios.tcgetattr(fd)
    changed = [*before]
    changed[3] &= ~without
    try:
        termios.tcsetattr(fd, termios.TCSANOW, changed)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may have been closed
            termios.tcsetattr(fd, termios.TCSANOW, before)
