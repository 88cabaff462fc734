"""The slash commands of a conversation: their names, and the text of /help."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SlashCommand:
    """A slash command; `argument` is empty if it takes none."""

    name: str
    argument: str
    help: str


COMMANDS = (
    SlashCommand("/image", "PATH...", "show the model pictures with the next message"),
    SlashCommand("/video", "PATH...", "show the model videos with the next message"),
    SlashCommand("/system", "TEXT", "go on with this system message; without TEXT, show it"),
    SlashCommand("/reset", "", "start over (also /clear)"),
    SlashCommand("/undo", "", "remove the media of the next message, else the last question"),
    SlashCommand("/retry", "", "ask the last question again, for another answer"),
    SlashCommand("/save", "PATH", "write the conversation to a file"),
    SlashCommand("/load", "PATH", "continue a saved conversation"),
    SlashCommand("/stats", "", "counts and speed of the last answer, and the context used"),
    SlashCommand("/help", "", "this list (also ?)"),
    SlashCommand("/exit", "", "leave (also exit, quit, /bye and Ctrl-D)"),
)
# What people type out of habit. Words without a slash count only as the whole line.
ALIASES = {
    **dict.fromkeys(("/quit", "/bye", "exit", "quit"), "/exit"),
    **dict.fromkeys(("/", "/?", "?"), "/help"),
    "/clear": "/reset",
}

KEYS = """\
A path typed in a message, or dropped on a line, shows the picture or video.
Type two slashes (//) to begin a message with a slash.
Ctrl-C stops an answer or drops the line; twice on an empty line, it leaves."""
EDITING_KEYS = """\
Alt-Enter (or Esc, Enter) starts a new line; Up and Ctrl-R find earlier ones.
Tab completes commands and paths, also within a message."""


def format_help(is_edited: bool) -> str:
    """Return the list of commands and keys; `is_edited` where lines can be edited."""
    heads = [f"{command.name} {command.argument}".rstrip() for command in COMMANDS]
    width = max(map(len, heads))
    rows = [f"{head:{width}}  {one.help}" for head, one in zip(heads, COMMANDS, strict=True)]
    return "\n".join([*rows, KEYS, *([EDITING_KEYS] if is_edited else [])])


def parse_command(line: str) -> tuple[str, str] | None:
    """Return the name and the argument of the command in `line`; None if it is a message.

    A command begins with a slash and a word, or is one of the `ALIASES`. The name of an unknown
    one is returned as it was typed.
    """
    word, *rest = line.split(maxsplit=1) or [""]
    is_command = re.fullmatch(r"/([\w-]*|\?)", word) is not None
    if not is_command and (rest or word not in ALIASES):
        return None
    return ALIASES.get(word, word), "".join(rest)


def describe_unknown_command(word: str) -> str:
    """Return the error message for an unknown command, with the most similar commands."""
    names = [*(command.name for command in COMMANDS), *(n for n in ALIASES if len(n) > 2)]
    near = difflib.get_close_matches(word, names, 2, 0.6)
    near = near or [name for name in names if name.startswith(word)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no command {word}{hint} (/help lists them; // sends a slash)"
