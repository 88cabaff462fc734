"""Paths as a user types, completes or drops them: quoted, escaped, file:// URLs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from mlx_smolvlm.cli.options import is_url
from mlx_smolvlm.files import expand_path

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".jfif", ".ppm", ".pgm", ".jp2", ".ico", ".tga"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mts"),
)
_LONGEST = 1 << 14  # a longer line is no list of paths


def split_sources(argument: str) -> list[str]:
    """Paths and URLs in `argument`: one as it stands, or several quoted as for a shell."""
    stripped = argument.strip()
    if is_url(stripped) or os.path.exists(_expanded(stripped)):
        return [stripped]
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        words = [stripped]
    return [local_path(word) for word in words]


def local_path(source: str) -> str:
    """The path that a file:// URL names; anything else as it stands."""
    if source[:7].lower() != "file://":
        return source
    return unquote(urlsplit(source).path, errors="surrogateescape")


def dropped(line: str) -> list[str]:
    """The pictures' and videos' paths that make up the whole of `line`; none if it is a message.

    Each has a picture's or video's suffix, and exists or begins at the root, at home or with file://.
    """
    if len(line) > _LONGEST:
        return []
    sources = split_sources(line)
    return sources if all(map(_is_medium, sources)) else []


def _expanded(path: str) -> str:
    """`path` with its home directory, if it begins with one that is known."""
    if not path.startswith("~"):
        return path
    try:
        return str(expand_path(path))
    except OSError:
        return path


def _is_medium(path: str) -> bool:
    expanded = _expanded(path)
    if not expanded.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES):
        return False
    return os.path.isabs(expanded) or os.path.isfile(expanded)


def is_video(path: str) -> bool:
    """Whether `path` has a video's suffix."""
    return path.lower().endswith(VIDEO_SUFFIXES)


@dataclass(frozen=True)
class Completion:
    """A path that the last word of a line could become; the word begins at `start`."""

    text: str
    start: int
    name: str


def completions(argument: str, suffixes: Sequence[str] = ()) -> list[Completion]:
    """What the last word of `argument` could become: folders, and files with one of `suffixes`.

    All files if `suffixes` is empty, or none has one. Spaces are escaped as they were begun.
    """
    start, word, quote = _last_word(argument)
    folder, typed = os.path.split(word)
    try:
        with os.scandir(_expanded(folder) or ".") as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except (OSError, ValueError):
        return []
    found = [(name, is_dir) for name, is_dir in found if name.startswith(typed)]
    if not typed.startswith("."):
        found = [one for one in found if not one[0].startswith(".")]
    wanted = [one for one in found if one[1] or one[0].lower().endswith(tuple(suffixes))]
    if not any(not is_dir for _, is_dir in wanted):
        wanted = found
    return [
        Completion(_quoted(os.path.join(folder, name), quote, is_dir), start, name + "/" * is_dir)
        for name, is_dir in wanted
    ]


def _last_word(text: str) -> tuple[int, str, str]:
    """Where the last word of `text` begins, what it is, and the quote that it is in, if any."""
    start, word, quote, is_inside = len(text), "", "", False
    characters = iter(enumerate(text))
    for place, character in characters:
        if not is_inside and character.isspace():
            continue
        if not is_inside:
            start, word, is_inside = place, "", True
        if character == "\\" and quote != "'":
            word += next(characters, (0, ""))[1]
        elif character in ("'", '"') and quote in ("", character):
            quote = "" if quote else character
        elif character.isspace() and not quote:
            start, word, is_inside = len(text), "", False
        else:
            word += character
    return start, word, quote


def _quoted(path: str, quote: str, is_dir: bool) -> str:
    """`path` as it is typed: in the quote that was begun, else with escapes."""
    if quote and quote not in path and "\\" not in path:
        return quote + path + ("/" if is_dir else quote)
    home, rest = ("~", path[1:]) if path.startswith("~") else ("", path)
    return home + re.sub(r"([^\w@%+=:,./-])", r"\\\1", rest) + "/" * is_dir
