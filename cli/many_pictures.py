"""Folders and patterns of pictures, which may hold more than a model can see at once."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.media import OpenedImage, open_picture
from mlx_smolvlm.cli.paths import IMAGE_SUFFIXES, expand_home
from mlx_smolvlm.errors import MediaError

if TYPE_CHECKING:
    from mlx_smolvlm import SmolVLM
    from mlx_smolvlm.media.tiles import Detail

FEW = 8  # pictures that are decoded at once, before the model is loaded
MAX_PICTURES = 1000  # whose headers are read
MAX_MEGAPIXELS = 1000  # decoded together; 3 GB


@dataclass(frozen=True)
class ClosedImage:
    """A picture of which only the header was read.

    Attributes:
        source: Its path.
        size: Its width and height, upright.
    """

    source: str
    size: tuple[int, int]


def expand_sources(sources: Sequence[str]) -> list[str]:
    """Return `sources` with the pictures of folders and patterns instead of these.

    They are sorted by name, numbers by value. Hidden files and other files than pictures are left
    out.

    Raises:
        MediaError: A folder or pattern holds no picture, or too many.
    """
    return [path for source in sources for path in _expand(source)]


def _expand(source: str) -> list[str]:
    """Return the pictures in a folder or of a pattern; any other source as it is."""
    path = expand_home(source)
    if os.path.isdir(path):
        name, paths = (
            f"the folder {source!r} has",
            [os.path.join(path, n) for n in os.listdir(path)],
        )
    elif glob.has_magic(source) and not (os.path.exists(path) or _is_remote(source)):
        name, paths = f"the pattern {source!r} matches", _match(path)
    else:
        return [source]
    pictures = [one for one in paths if _is_picture(one)]
    if not pictures:
        raise MediaError(f"{name} no picture (one of {', '.join(IMAGE_SUFFIXES[:8])}, ...)")
    if len(pictures) > MAX_PICTURES:
        raise MediaError(
            f"{name} {len(pictures):,} pictures, above the limit of {MAX_PICTURES:,}; "
            "choose some by a pattern, such as -i 'photos/*1.jpg'"
        )
    return sorted(pictures, key=_sort_key)


def _match(pattern: str) -> list[str]:
    """Return the paths that match `pattern`, in which ** stands for all folders below.

    Links are not followed there, which `glob.glob` does, since they may lead back. Hidden folders
    are left out.
    """
    if pattern == "**" or pattern.endswith("/**"):
        pattern += "/*"
    many = re.search(r"(?:^|/)\*\*/", pattern)
    if many is None:
        return glob.glob(pattern)
    head, rest = pattern[: many.end() - 3], pattern[many.end() :]
    paths: dict[str, None] = {}
    for root in glob.glob(head) if head else [""]:
        for folder, below, _ in os.walk(root or "."):
            below[:] = [one for one in below if not one.startswith(".")]
            start = os.path.join(folder, "")
            start = start if root else start.removeprefix("./")
            paths.update(dict.fromkeys(_match(glob.escape(start) + rest)))
    return list(paths)


def _is_remote(source: str) -> bool:
    from mlx_smolvlm.media.fetch import is_remote

    return is_remote(source)


def _is_picture(path: str) -> bool:
    name = os.path.basename(path)
    if not name.lower().endswith(IMAGE_SUFFIXES) or name.startswith("."):
        return False
    return os.path.isfile(path)


def _sort_key(path: str) -> list[tuple[int, str]]:
    """Return what sorts img2 before img10."""
    parts = re.split(r"(\d+)", path.casefold())
    return [(int(one[:300]), one) if one.isdecimal() else (0, one) for one in parts]


def open_pictures(sources: Sequence[str]) -> list[OpenedImage | ClosedImage]:
    """Open pictures; of more than `FEW` only the headers of files are read.

    Raises:
        MediaError: One of them cannot be opened.
    """
    if len(sources) <= FEW:
        return [open_picture(source) for source in sources]
    from mlx_smolvlm.media.picture import read_upright_size

    return [
        open_picture(source)
        if source == "-" or _is_remote(source)
        else ClosedImage(source, read_upright_size(source))
        for source in sources
    ]


def open_closed(
    vlm: SmolVLM, pictures: Sequence[OpenedImage | ClosedImage], detail: Detail
) -> list[OpenedImage]:
    """Return `pictures`, all opened, if the model can see them all at once.

    Raises:
        MediaError: They are too many, or one of them cannot be decoded.
    """
    closed = [one for one in pictures if isinstance(one, ClosedImage)]
    if closed:
        _check_fit(vlm, [_get_size(one) for one in pictures], detail)
        pixels = sum(one.size[0] * one.size[1] for one in closed)
        if pixels > MAX_MEGAPIXELS * 10**6:
            raise MediaError(
                f"{len(closed)} pictures have {pixels // 10**6:,} megapixels together, above the "
                f"limit of {MAX_MEGAPIXELS:,}; give fewer or smaller ones"
            )
    return [open_picture(one.source) if isinstance(one, ClosedImage) else one for one in pictures]


def _get_size(picture: OpenedImage | ClosedImage) -> tuple[int, int]:
    return picture.size if isinstance(picture, ClosedImage) else picture.image.size


def _check_fit(vlm: SmolVLM, sizes: Sequence[tuple[int, int]], detail: Detail) -> None:
    """Raise MediaError if pictures of `sizes` take more tokens than the model's context has."""
    context = vlm.engine.context_size
    tokens = _count_tokens(vlm, sizes, detail)
    if tokens < context:
        return
    low = _count_tokens(vlm, sizes, "low")
    fit, fit_low = (max(1, len(sizes) * context // count) for count in (tokens, low))
    advice = f"about {fit} fit"
    if fit_low > fit:
        advice += f", with --detail low about {min(fit_low, len(sizes))}"
    raise MediaError(
        f"{len(sizes)} pictures take {tokens:,} tokens and the model's context is {context:,}; "
        f"{advice}; choose some by a pattern, such as -i 'photos/*1.jpg', or ask about each"
    )


def _count_tokens(vlm: SmolVLM, sizes: Sequence[tuple[int, int]], detail: Detail) -> int:
    from mlx_smolvlm.media.tiles import compute_grid

    count = vlm.engine.prompt_builder.count_image_tokens
    return sum(count(compute_grid(size, vlm.config, detail)) for size in sizes)
