"""What the terminal can do: edit lines, draw, show pictures."""

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

_REPLY_S = 0.5  # how long a terminal may take to say what it is
_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_SIXEL = b"4"  # among a terminal's attributes


def can_draw() -> bool:
    """Whether stdin, stdout and stderr are a terminal that moves its cursor."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(stream.isatty() for stream in streams) and can_edit()


def can_edit() -> bool:
    """Whether stdin is a terminal on which lines can be edited in place."""
    return sys.stdin.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def wants_plain() -> bool:
    """Whether the user asks programs for text without decoration (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def columns_and_rows() -> tuple[int, int]:
    """The terminal's size now; 80 by 24 if it does not tell."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24


def cell_size() -> tuple[int, int]:
    """Width and height of a character in pixels; 8 by 16 if the terminal does not tell."""
    import fcntl
    import struct
    import termios

    with contextlib.suppress(OSError, ValueError):
        packed = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", packed)
        if min(rows, columns, width, height) > 0:
            return max(width // columns, 1), max(height // rows, 1)
    return 8, 16


def graphics(environ: Mapping[str, str]) -> Graphics:
    """How the terminal shows pictures inline.

    It is asked only if its variables do not tell. Within tmux and screen they tell of the
    terminal outside, so there its answer alone counts.
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
    return "sixel" if _SIXEL in _attributes() else "none"


def _attributes() -> list[bytes]:
    """What the terminal answers when it is asked for its attributes (DA1); nothing in time: none.

    It is not asked while typed keys wait to be read, since they would be lost.
    """
    import termios

    fd = sys.stdin.fileno()
    if select.select([fd], [], [], 0)[0]:
        return []
    reply, end = b"", time.monotonic() + _REPLY_S
    with _changed(fd, termios.ECHO | termios.ICANON):
        os.write(sys.stderr.fileno(), b"\x1b[c")
        while not (found := _ATTRIBUTES.search(reply)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return []
            reply += os.read(fd, 64)
    return found[1].split(b";")[1:]


@contextlib.contextmanager
def hide_typing() -> Iterator[None]:
    """Keep typed keys off the screen, but for the next line; Ctrl-C works as ever."""
    import termios

    with _changed(sys.stdin.fileno(), termios.ECHO):
        yield


@contextlib.contextmanager
def _changed(fd: int, without: int) -> Iterator[None]:
    """A terminal without some of its local modes."""
    import termios

    before = termios.tcgetattr(fd)
    changed = [*before]
    changed[3] &= ~without
    try:
        termios.tcsetattr(fd, termios.TCSANOW, changed)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
