"""Paths that a user types, completes or drops: quoted, escaped, or file:// URLs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit

from prompt_toolkit.completion import CompleteEvent, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlx_smolvlm.cli.media import is_url
from mlx_smolvlm.errors import escape_controls
from mlx_smolvlm.files import expand_path

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".jfif", ".ppm", ".pgm", ".jp2", ".ico", ".tga"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mts"),
)
_MAX_LINE = 1 << 14  # characters; a longer line is not a list of paths


def split_sources(argument: str) -> list[str]:
    """Split `argument` into paths and URLs: one as it is, or several quoted as for a shell."""
    stripped = argument.strip()
    if is_url(stripped) or os.path.exists(_expand_home(stripped)):
        return [stripped]
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a file name
        words = [stripped]
    return [decode_file_url(word) for word in words]


def decode_file_url(source: str) -> str:
    """Return the path of a file:// URL; anything else unchanged."""
    if source[:7].lower() != "file://":
        return source
    return unquote(urlsplit(source).path, errors="surrogateescape")


def find_dropped_paths(line: str) -> list[str]:
    """Return the paths of pictures and videos in `line`; none if it is a message.

    Every word of the line must have the suffix of a picture or video, and be an existing file or
    an absolute path.
    """
    if len(line) > _MAX_LINE:
        return []
    sources = split_sources(line)
    return sources if all(map(_is_media_path, sources)) else []


def _expand_home(path: str) -> str:
    """Expand ~ at the beginning of `path`, if the user is known."""
    if not path.startswith("~"):
        return path
    try:
        return str(expand_path(path))
    except OSError:
        return path


def _is_media_path(path: str) -> bool:
    """Return whether `path` has a media suffix, and is absolute or an existing file."""
    expanded = _expand_home(path)
    if not expanded.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES):
        return False
    return os.path.isabs(expanded) or os.path.isfile(expanded)


def is_video(path: str) -> bool:
    """Return whether `path` has the suffix of a video."""
    return path.lower().endswith(VIDEO_SUFFIXES)


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
    """Return the start of the last word of `text`, the word, and the open quote around it."""
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


def _quote(path: str, quote: str, is_dir: bool) -> str:
    """Return `path` as it is typed: in the open quote, else with escapes."""
    if quote and quote not in path and "\\" not in path:
        return quote + path + ("/" if is_dir else quote)
    home, rest = ("~", path[1:]) if path.startswith("~") else ("", path)
    return home + re.sub(r"([^\w@%+=:,./-])", r"\\\1", rest) + "/" * is_dir
