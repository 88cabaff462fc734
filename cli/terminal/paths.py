"""Paths that a user types, completes or drops: quoted, escaped, or file:// URLs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence

from prompt_toolkit.completion import CompleteEvent, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlx_smolvlm.cli.media import is_url
from mlx_smolvlm.cli.paths import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    decode_file_url,
    expand_home,
    find_similar_files,
)
from mlx_smolvlm.errors import MediaError, escape_controls

_MAX_LINE = 1 << 14  # characters; a longer line is not a list of paths


def split_sources(argument: str) -> list[str]:
    """Split `argument` into paths and URLs: one as it is, or several quoted as for a shell."""
    stripped = argument.strip()
    if is_url(stripped) or os.path.exists(expand_home(stripped)):
        return [stripped]
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a file name
        words = [stripped]
    return [decode_file_url(word) for word in words]


def find_dropped_paths(line: str) -> list[str]:
    """Return the paths in a line that holds nothing else; none if it is a message.

    Mistyped paths count: a question about a name such as `photo.png` is not asked by it alone.

    Raises:
        MediaError: One of them does not exist.
    """
    if len(line) > _MAX_LINE or line.startswith("//"):
        return []
    sources = split_sources(line)
    if not all(_is_path(source, is_alone=len(sources) == 1) for source in sources):
        return []
    for source in sources:
        if not is_url(source) and not os.path.exists(expand_home(source)):
            near = find_similar_files(source)
            hint = f"; did you mean {quote_path(near[0])}?" if near else ""
            raise MediaError(f"{source!r} does not exist{hint}")
    return sources


def _is_path(word: str, is_alone: bool) -> bool:
    """Return whether `word` is meant as a path or the URL of a picture or video.

    It is if it has the suffix of one, is a file, or lies in a folder that exists. A word that
    `is_alone` in its line also is if it has another suffix and resembles the name of a file.
    """
    path = expand_home(word)
    if path.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES) or os.path.isfile(path):
        return True
    folder, name = os.path.split(path)
    if folder and not is_url(word):
        return os.path.isdir(folder) or word.startswith(("/", "~", "./", "../"))
    return is_alone and "." in name.strip(".") and bool(find_similar_files(word))


def complete_path(argument: str, suffixes: Sequence[str] = ()) -> Iterator[Completion]:
    """Yield what the last word of `argument` could become.

    prompt_toolkit lists the folder. What it lacks is added: words in quotes or with escapes,
    the choice of files, and names that would disturb the terminal.

    Args:
        argument: What was typed after a command, up to the cursor.
        suffixes: Files with one of these and folders are offered; all files if this is empty
            or no file has one.
    """
    start, word, quote = _parse_last_word(argument)
    listed = PathCompleter(expanduser=True).get_completions(Document(word), CompleteEvent())
    is_hidden_wanted = os.path.basename(word).startswith(".")
    found = [(word + one.text, one.display_text) for one in listed]
    found = [one for one in found if is_hidden_wanted or not one[1].startswith(".")]
    wanted = [one for one in found if one[1].lower().endswith(("/", *suffixes))]
    if any(not name.endswith("/") for _, name in wanted):
        found = wanted
    for path, name in found:
        text = _quote(path, quote, name.endswith("/"))
        yield Completion(text, start - len(argument), escape_controls(name))


def _parse_last_word(text: str) -> tuple[int, str, str]:
    """Return the start of the last word of `text`, the word, and the open quote around it.

    A quotation mark within a word is an apostrophe.
    """
    start, word, quote, is_inside = len(text), "", "", False
    characters = iter(enumerate(text))
    for place, character in characters:
        if not is_inside and character.isspace():
            continue
        if not is_inside:
            start, word, is_inside = place, "", True
        if character == "\\" and quote != "'":
            word += next(characters, (0, ""))[1]
        elif character in ("'", '"') and (quote == character or place == start):
            quote = "" if quote else character
        elif character.isspace() and not quote:
            start, word, is_inside = len(text), "", False
        else:
            word += character
    return start, word, quote


def _quote(path: str, quote: str, is_dir: bool) -> str:
    """Return `path` as it is typed: in the open quote, else with escapes."""
    if quote and quote not in path and "\\" not in path:
        return quote + path + ("/" if is_dir else quote)
    return quote_path(path) + "/" * is_dir


def quote_path(path: str) -> str:
    """Return `path` with escapes, as it is typed."""
    home, rest = ("~", path[1:]) if path.startswith("~") else ("", path)
    return home + re.sub(r"([^\w@%+=:,./-])", r"\\\1", rest)
