"""Open the bytes of a file, standard input, a URL or a data URI."""

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

MAX_BYTES = 256 * 1024**2  # in a picture that is downloaded or piped
MAX_VIDEO_BYTES = 4 * 1024**3  # in such a video, which goes to a temporary file
TIMEOUT_S = 20.0  # without receiving anything
DEADLINE_S = 120.0  # from the connection to the last byte, redirects included
VIDEO_DEADLINE_S = 3600.0
VIDEO_GRACE_S = 120.0  # after which a video must arrive at `download.MIN_RATE`

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(data):", re.IGNORECASE)
_CHUNK = 1 << 16
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # also read by huggingface_hub


def is_offline(offline: bool = False) -> bool:
    """Whether the network must not be used, because of `offline` or the environment."""
    values = (os.environ.get(name, "") for name in _OFFLINE_VARIABLES)
    return offline or any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def describe_source(source: str | Path) -> str:
    """Return a name for `source` in messages: one short line, without the secrets of a URL."""
    text = str(source)
    if text == "-":
        return "standard input"
    if text[:5].lower() == "data:":
        return "the data URI"
    text = redact_url(text).encode("utf-8", "backslashreplace").decode()
    return repr(text if len(text) <= 200 else text[:197] + "...")


def is_remote(source: str | Path) -> bool:
    """Whether `source` is a URL or a data URI rather than a path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def open_bytes(source: str | Path, *, video: bool = False) -> BinaryIO:
    """Open `source` as a seekable stream, which the caller closes.

    Args:
        source: A path, "-" for standard input, an http(s) URL or a data URI.
        video: Whether `source` is a video. Pipes and URLs are copied first: a video of up to
            `MAX_VIDEO_BYTES` to a temporary file, others of up to `MAX_BYTES` to memory.

    Raises:
        MediaError: The source is missing, cannot be read, or is too large.
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
    """Open the file at `source`; a pipe is copied first."""
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
    """Decode a data URI of at most `limit` bytes."""
    import base64
    import binascii
    from urllib.parse import unquote_to_bytes

    comma = source.find(",")
    if comma < 0:
        raise MediaError("the data URI has no comma; it must be data:image/png;base64,...")
    is_base64 = source[:comma].lower().rstrip().endswith(";base64")
    # Estimate the size before copying: %2B is one byte, and blanks are none.
    nbytes = len(source) - comma - 1 - 2 * source.count("%", comma)
    if is_base64:
        blanks = sum(source.count(blank, comma) for blank in " \t\r\n")
        nbytes = (nbytes - blanks) * 3 // 4 - 2  # if it is padded
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
    """Download `url` within the limits of size and time."""
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
    """Return how many bytes may be copied."""
    return MAX_VIDEO_BYTES if video else MAX_BYTES


def _make_size_error(name: str, limit: int) -> MediaError:
    return MediaError(f"{name} is larger than {limit // 1024**2} MiB; make it smaller")


def _copy_stream(stream: BinaryIO | HTTPResponse, name: str, video: bool) -> BinaryIO:
    """Copy all of `stream`, up to the limit, and return the copy."""
    limit = _get_max_bytes(video)
    copy = tempfile.TemporaryFile() if video else io.BytesIO()  # noqa: SIM115 (the caller closes it)
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


class DescriptorReader(io.RawIOBase):
    """Reads the file of a descriptor from its beginning, at a separate position."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._position = descriptor, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek and return the new position.

        Raises:
            OSError: It is before the beginning of the file.
        """
        size = os.fstat(self._descriptor).st_size
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` and return the number of bytes; 0 at the end."""
        data = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
