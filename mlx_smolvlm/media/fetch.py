"""Bytes of what a user names: a file, standard input, a URL, a data URI."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_smolvlm.errors import MediaError, format_error, redact_url
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from http.client import HTTPResponse


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the hub's client heeds the same


def is_offline(asked: bool = False) -> bool:
    """Whether no connection may be opened: `asked` for, or by the environment."""
    values = (os.environ.get(name, "") for name in _OFFLINE_VARIABLES)
    return asked or any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


MAX_BYTES = 256 * 1024**2  # of a picture that is downloaded or piped
MAX_VIDEO_BYTES = 4 * 1024**3  # of such a video, which is kept in a temporary file
TIMEOUT_S = 20.0  # without an answer
DEADLINE_S = 120.0  # from the connection to the last byte, redirects included
VIDEO_DEADLINE_S = 3600.0
VIDEO_GRACE_S = 120.0  # until a video must have come at `download.MIN_RATE` so far

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(data):", re.IGNORECASE)
_CHUNK = 1 << 16


def describe_source(source: str | Path) -> str:
    """What to call `source` in an error: one short line, a URL without its secrets."""
    text = str(source)
    if text == "-":
        return "standard input"
    if text[:5].lower() == "data:":
        return "the data URI"
    text = redact_url(text).encode("utf-8", "backslashreplace").decode()
    return repr(text if len(text) <= 200 else text[:197] + "...")


def is_remote(source: str | Path) -> bool:
    """Whether `source` is a URL or a data URI, so not the name of a file."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def open_bytes(source: str | Path, *, video: bool = False) -> BinaryIO:
    """A seekable stream of what `source` names; the caller closes it.

    Args:
        source: A path, "-" for standard input, an http(s) URL or a data URI.
        video: Whether what has to be copied first goes to a temporary file, and may
            have `MAX_VIDEO_BYTES`; else it goes to memory, `MAX_BYTES` of it.

    Raises:
        MediaError: It is missing, cannot be read, or is too large.
    """
    if isinstance(source, str) and source == "-":
        return _copy_stream(sys.stdin.buffer, "standard input", video)
    match = _SCHEME.match(source) if isinstance(source, str) else None
    if not isinstance(source, str) or match is None:
        return _open_file(source, video)
    if match[2]:
        return io.BytesIO(_decode_data_uri(source, _get_max_bytes(video)))
    if match[1].lower() in ("http", "https"):
        return _download(source, video)
    raise MediaError(
        f"{describe_source(source)} has the scheme '{match[1]}'; "
        "give an http or https URL, or a path"
    )


def _open_file(source: str | Path, video: bool) -> BinaryIO:
    """The file at `source`; a pipe is copied first."""
    name = describe_source(source)
    if not str(source):
        raise MediaError("the path is empty; give a file, URL or data URI")
    try:
        stream = expand_path(source).open("rb")
        if stream.seekable():
            return stream
        with stream:
            return _copy_stream(stream, name, video)
    except FileNotFoundError:
        raise MediaError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise MediaError(f"{name} is a folder; give a file") from None
    except PermissionError:
        raise MediaError(f"{name} may not be read; check its permissions") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or format_error(error)
        raise MediaError(f"{name} cannot be opened: {reason}") from None


def _decode_data_uri(source: str, limit: int) -> bytes:
    """The bytes that a data URI carries, at most `limit`."""
    import base64
    import binascii
    from urllib.parse import unquote_to_bytes

    comma = source.find(",")
    if comma < 0:
        raise MediaError("the data URI has no comma; it must be data:image/png;base64,...")
    is_base64 = source[:comma].lower().rstrip().endswith(";base64")
    # Counted before anything is copied: three characters such as %2B are one, and blanks none.
    nbytes = len(source) - comma - 1 - 2 * source.count("%", comma)
    if is_base64:
        blanks = sum(source.count(blank, comma) for blank in " \t\r\n")
        nbytes = (nbytes - blanks) * 3 // 4 - 2  # where it is padded
    if nbytes > limit:
        raise _make_size_error("the data URI", limit)
    data = unquote_to_bytes(source[comma + 1 :])
    if not is_base64:
        return data
    data = b"".join(data.split())
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"the data URI is not valid base64: {error}") from None


def _download(url: str, video: bool) -> BinaryIO:
    """The body at `url`, within the limits of size and time."""
    import http.client

    from mlx_smolvlm.media.download import open_url

    name, limit = describe_source(url), _get_max_bytes(video)
    if is_offline():
        raise MediaError(f"{name} needs the network, and HF_HUB_OFFLINE is set; give a file")
    times_s = (VIDEO_DEADLINE_S, VIDEO_GRACE_S) if video else (DEADLINE_S,)
    try:
        with open_url(url, TIMEOUT_S, *times_s) as (response, length):
            if length is not None and length > limit:
                raise _make_size_error(name, limit)
            copy = _copy_stream(response, name, video)
    except TimeoutError as error:
        raise MediaError(f"{name} {error}; try again") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or format_error(error)
        raise MediaError(f"{name} cannot be fetched: {reason}") from None
    size = copy.seek(0, io.SEEK_END)
    copy.seek(0)
    if length is not None and size < length:
        copy.close()
        raise MediaError(f"{name} sent {size} of {length} bytes; try again")
    return copy


def _get_max_bytes(video: bool) -> int:
    """How many bytes may be copied."""
    return MAX_VIDEO_BYTES if video else MAX_BYTES


def _make_size_error(name: str, limit: int) -> MediaError:
    return MediaError(f"{name} is larger than {limit // 1024**2} MiB; make it smaller")


class DescriptorReader(io.RawIOBase):
    """The file behind a descriptor from its beginning, wherever others are in it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._place = descriptor, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new place.

        Raises:
            OSError: It lies before the beginning, as of any file.
        """
        size = os.fstat(self._descriptor).st_size
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Bytes read into `buffer`; 0 at the end."""
        data = os.pread(self._descriptor, len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _copy_stream(stream: BinaryIO | HTTPResponse, name: str, video: bool) -> BinaryIO:
    """A copy of all of `stream`, if it fits."""
    limit = _get_max_bytes(video)
    copy = tempfile.TemporaryFile() if video else io.BytesIO()  # noqa: SIM115 (the caller's)
    try:
        while chunk := stream.read(_CHUNK):
            copy.write(chunk)
            if copy.tell() > limit:
                raise _make_size_error(name, limit)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy
