"""Paths of pictures and videos as they are typed, pasted or dropped on a terminal."""

from __future__ import annotations

import os
from urllib.parse import unquote

from mlx_smolvlm.files import expand_path

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".heif", ".hif", ".jfif", ".ppm", ".pgm", ".jp2", ".ico", ".tga"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mts"),
)
SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".pdf")  # a PDF is met by a hint


def decode_file_url(source: str) -> str:
    """Return the path of a file:// URL; anything else unchanged.

    Where a terminal leaves ? and # as they are, they belong to the path.
    """
    _host, slash, path = source[7:].partition("/")
    if source[:7].lower() != "file://" or not slash:
        return source
    return unquote(slash + path, errors="surrogateescape")


def expand_home(path: str) -> str:
    """Expand ~ at the beginning of `path`, if the user is known."""
    if not path.startswith("~"):
        return path
    try:
        return str(expand_path(path))
    except OSError:
        return path


def is_video(path: str) -> bool:
    """Return whether `path` has the suffix of a video."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def find_similar_files(path: str) -> list[str]:
    """Return the path in the folder of `path` whose name resembles its own most, if one does."""
    import difflib

    folder, name = os.path.split(path)
    try:
        names = os.listdir(expand_home(folder) or ".")
    except (OSError, ValueError):
        return []
    return [os.path.join(folder, near) for near in difflib.get_close_matches(name, names, 1, 0.75)]
