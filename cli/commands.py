"""The slash commands of a conversation: their names, and what they are for."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A slash command; `argument` is empty if it takes none."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("/image", "PATH...", "show the model pictures along with the next message"),
    Command("/video", "PATH...", "show it videos, likewise"),
    Command("/system", "TEXT", "begin anew with this system message"),
    Command("/reset", "", "begin anew"),
    Command("/undo", "", "take the last question and its answer back, or what waits to be shown"),
    Command("/retry", "", "ask the last question again, for another answer"),
    Command("/save", "PATH", "write the conversation to a file"),
    Command("/load", "PATH", "go on with a conversation that was saved"),
    Command("/stats", "", "counts and speed of the last answer, and the context used"),
    Command("/help", "", "this list"),
    Command("/exit", "", "leave (so do /quit and Ctrl-D)"),
)
NAMES = (*(command.name for command in COMMANDS), "/quit")

KEYS = """\
A path dropped on an empty line is a picture or video for the next message.
A message that begins with a slash is typed with two: //.
Ctrl-C stops an answer; it clears the line, and twice it leaves."""
EDITING = """\
Alt-Enter (or Esc, Enter) begins a new line; Up and Ctrl-R find earlier ones; Tab completes."""


def help_text(is_edited: bool) -> str:
    """The list of commands and keys; `is_edited` where lines can be edited."""
    heads = [f"{command.name} {command.argument}".rstrip() for command in COMMANDS]
    width = max(map(len, heads))
    rows = [f"{head:{width}}  {one.help}" for head, one in zip(heads, COMMANDS, strict=True)]
    return "\n".join([*rows, KEYS, *([EDITING] if is_edited else [])])


def is_command(line: str) -> bool:
    """Whether `line` begins with a slash and a word, so that it is no message."""
    return re.match(r"/[\w-]*(\s|$)", line) is not None


def unknown(word: str) -> str:
    """An error's message for a `word` that is no command, with the nearest ones."""
    near = difflib.get_close_matches(word, NAMES, 2, 0.6)
    near = near or [name for name in NAMES if name.startswith(word)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no command {word}{hint} (/help lists them; // sends a slash)"
