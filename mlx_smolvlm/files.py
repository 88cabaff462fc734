"""Paths and files: expand, read within limits, replace atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


def expand_path(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home directory.

    Raises:
        FileNotFoundError: There is no such user, or no home directory is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            errno.ENOENT, "No home directory is known for this user", str(path)
        ) from None


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    A pipe, a device or a socket is refused before anything is read from it, so that it can
    neither block nor deliver without end.

    Raises:
        OSError: It cannot be opened, is not a regular file (EINVAL), or is too large (EFBIG).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes:,} bytes", str(path))
    return data


@contextlib.contextmanager
def replace_file(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yields the path of a temporary file that becomes `path` when the block ends.

    The file lies in the same folder, has a random name that begins with a dot and ends in
    ".part" and `suffix`, and is created by this call alone (O_EXCL), so no link that stands
    there is followed. It is synced and then renamed: `path` holds the old content or the new
    one, never a part. After an error, nothing is left behind.

    Raises:
        OSError: The folder cannot be written to, or `path` exists and is not a regular file
            (a link to one is followed, so that the link stays).
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if os.path.lexists(path) and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        reason = os.strerror(code) if path.is_dir() else "Not a regular file"
        raise OSError(code, reason, str(path))
    part = path.with_name(f".{secrets.token_hex(8)}.part{suffix}")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_file(path: str | Path, data: bytes | str) -> None:
    """Replace the content of `path` atomically; text is written as UTF-8.

    Raises:
        OSError: As `replace_file`.
    """
    with replace_file(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
