"""Files: paths, owners, reading within limits, atomic writing, locks, digests; TOML."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_smolvlm.errors import SmolVLMError

_OTHERS_WRITE = 0o022


def check_owner(status: os.stat_result, path: str | Path) -> None:
    """Check that the user or root owns a file or folder.

    Args:
        status: Status of the open file, so that it cannot be exchanged after the check.
        path: Its path, for the message.

    Raises:
        PermissionError: Another user owns it.
    """
    if status.st_uid not in (os.geteuid(), 0):
        raise _make_owner_error(path, f"Owned by another user, uid {status.st_uid}")


def check_folder(path: Path) -> None:
    """Check that only the user, or root, can write to a folder.

    A folder that the user owns is accepted whatever its permissions.

    Raises:
        PermissionError: Another user owns it, or root owns it and others can write to it.
        OSError: The folder does not exist.
    """
    status = path.stat()
    check_owner(status, path)
    if status.st_uid != os.geteuid() and status.st_mode & _OTHERS_WRITE:
        raise _make_owner_error(
            path, f"Owned by uid {status.st_uid}, and other users can write to it"
        )


def make_private_folder(path: Path) -> None:
    """Create the folder `path` and its missing parents with mode 0700, and check it.

    Raises:
        PermissionError: `check_folder` refuses it, or its parent belongs to another user and
            others can write to it.
        OSError: The folder cannot be created.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(path)
    around = path.parent.stat()
    if around.st_uid not in (os.geteuid(), 0) and around.st_mode & _OTHERS_WRITE:
        reason = f"It lies in a folder of uid {around.st_uid} that other users can write to"
        raise _make_owner_error(path, reason)


def _make_owner_error(path: str | Path, reason: str) -> PermissionError:
    return PermissionError(errno.EPERM, reason, str(path))


MAX_TOML = 2**18  # bytes
MAX_LINE = 2000  # characters of a line of TOML
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part(\.\w+)?")  # how `replace_file` names its files
_STALE_S = 3600.0  # a temporary file that old has no living writer
_BLOCK = 1 << 18  # bytes digested at a time


def expand_path(path: str | Path, error: type[SmolVLMError] | None = None) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home directory.

    Args:
        path: A file or folder.
        error: The error to raise instead of an OSError.

    Raises:
        FileNotFoundError: The user does not exist, or has no known home directory.
        OSError: No file can have this name: it has a null character, or one that the
            system's encoding lacks.
    """
    try:
        expanded = Path(path).expanduser()
        if b"\0" not in os.fsencode(expanded):
            return expanded
        fault = OSError(errno.EINVAL, "No file can have this name", ascii(str(path)))
    except RuntimeError:
        reason = "No home directory is known for this user"
        fault = FileNotFoundError(errno.ENOENT, reason, str(path))
    except UnicodeEncodeError:
        fault = OSError(errno.EINVAL, "No file can have this name", ascii(str(path)))
    if error is None:
        raise fault
    raise error(f"{fault.filename} cannot be used: {fault.strerror}; give another path")


def locate_cache() -> Path:
    """Return the cache folder of this package, which may not exist yet.

    Raises:
        OSError: The home directory is unknown, or the path is invalid.
    """
    own, general = os.environ.get("MLX_SMOLVLM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return expand_path(own) if own else expand_path(general or "~/.cache") / "mlx-smolvlm"


def open_regular(path: str | Path, flags: int) -> int:
    """Open the regular file `path` and return its descriptor; never waits for a pipe or device.

    Args:
        path: A file.
        flags: Flags of `os.open`.

    Raises:
        OSError: The file cannot be opened, or is not a regular file (EISDIR, EINVAL).
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except ValueError:  # a null character, or one that the system's encoding lacks
        raise OSError(errno.EINVAL, "No file can have this name", ascii(str(path))) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise _make_type_error(path, mode)


def open_file(path: str | Path, *, own_only: bool = False) -> BinaryIO:
    """Open a regular file for reading.

    Pipes, devices and sockets are refused before anything is read: they could block or never
    end.

    Args:
        path: A file.
        own_only: Refuse a file of another user (EPERM), see `check_owner`.

    Raises:
        OSError: The file cannot be opened, or is not a regular file (EISDIR, EINVAL).
    """
    file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
    try:
        if own_only:
            check_owner(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def read_file(path: str | Path, max_bytes: int, *, own_only: bool = False) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Args:
        path: A file.
        max_bytes: The largest size to read.
        own_only: As in `open_file`.

    Raises:
        OSError: As in `open_file`, or the file is too large (EFBIG).
    """
    with open_file(path, own_only=own_only) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes:,} bytes", str(path))
    return data


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in the TOML file at `path`.

    The parser takes quadratic time in the number of a key's parts, so lines are bounded too.

    Raises:
        OSError: As in `read_file`; the limit is `MAX_TOML` bytes.
        ValueError: The file is not UTF-8 or not TOML, or has a line of more than `MAX_LINE`
            characters.
    """
    import tomllib

    data = read_file(path, MAX_TOML)
    try:
        text = data.decode("utf-8-sig")
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"line {number} has more than {MAX_LINE:,} characters")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError("not valid TOML: it is nested too deeply") from None
    except ValueError as error:  # from the parser, or from Python for numbers with many digits
        raise ValueError(f"not valid TOML: {error!s:.200}") from None


@contextlib.contextmanager
def replace_file(
    path: str | Path, suffix: str = "", *, mode: int = 0o666, follow_links: bool = True
) -> Iterator[Path]:
    """Yields the path of a temporary file that replaces `path` when the block ends.

    The temporary file is in the same folder. Its random name begins with a dot and ends in
    ".part" and `suffix`; it is created with O_EXCL, so no existing link is followed. It is synced
    and then renamed, so `path` always has the old or the new content, never a part. It is removed
    after an error; `remove_leftovers` removes those of killed processes.

    Args:
        path: A regular file, which keeps its permissions, or a new path.
        suffix: Last part of the temporary name, such as ".safetensors".
        mode: Permissions of a new file, before the umask.
        follow_links: True replaces the target of a link at `path`: for paths that a user gave.
            False replaces the link itself: for names that this package chose, where a link
            could lead out of the folder.

    Raises:
        OSError: The folder cannot be written to, or `path` exists and is not a regular file.
    """
    path = Path(path)
    if follow_links and path.is_symlink():
        path = Path(os.path.realpath(path))
    old = _read_mode(path, follow_links)
    part = path.with_name(f".{secrets.token_hex(8)}.part{suffix}")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
    try:
        if old is not None:
            part.chmod(old)
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # The system names no file in errors from writing to an open file.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
    with contextlib.suppress(OSError):  # the file is already in place and complete
        sync(path.parent)


def write_file(
    path: str | Path, data: bytes | str, *, mode: int = 0o666, follow_links: bool = True
) -> None:
    """Replace the content of `path` atomically; text is written as UTF-8.

    Arguments and errors are as in `replace_file`.
    """
    with replace_file(path, mode=mode, follow_links=follow_links) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def write_output(path: str | Path, data: bytes | str) -> None:
    """Write to a path that a user gave.

    Files are replaced as by `write_file`. Devices, pipes and the files of standard streams, such
    as /dev/stdout, are appended to.

    Raises:
        OSError: The path cannot be written to.
    """
    path = expand_path(path)
    if path.is_file() and not _is_standard_stream(path):
        write_file(path, data)
    elif path.exists() and not path.is_dir():
        with path.open("ab") as file:
            file.write(data.encode() if isinstance(data, str) else data)
    else:
        write_file(path, data)


def append_file(path: str | Path, text: str) -> None:
    """Append `text` to the regular file `path`, which is created if it does not exist.

    Raises:
        OSError: The path is a link or no regular file, or cannot be written to.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(open_regular(path, flags), "ab") as file:
        file.write(text.encode())


def remove_leftovers(folder: Path, older_than_s: float = _STALE_S) -> None:
    """Remove the temporary files of killed `replace_file` calls from `folder`.

    Args:
        folder: A folder of this package.
        older_than_s: Minimum age of the last write, in seconds; 0 if nobody else writes there.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                if entry.stat(follow_symlinks=False).st_mtime <= time.time() - older_than_s:
                    os.unlink(entry.path)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: str | Path, *, wait: bool = False, flags: int = 0) -> int:
    """Lock the file or folder `path` exclusively.

    Args:
        path: A file or folder.
        wait: Wait if another process holds the lock, instead of raising an error.
        flags: Further flags for `os.open`.

    Returns:
        A descriptor; closing it releases the lock.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The path cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        lock_descriptor(descriptor, wait=wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def lock_descriptor(descriptor: int, *, wait: bool = False) -> None:
    """Lock an open file or folder; closing the descriptor releases the lock.

    Arguments and errors are as in `lock`.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def compute_sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of the regular file `path`; errors as in `open_file`."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def digest_stream(stream: BinaryIO) -> bytes:
    """Digest, 16 bytes, of the rest of `stream`.

    It hashes a checksum per block, which takes half the time of hashing all bytes: videos have
    gigabytes. It is not safe against files made to collide on purpose.
    """
    total = hashlib.blake2b(digest_size=16)
    while block := stream.read(_BLOCK):
        total.update(b"%d %d;" % (len(block), zlib.crc32(block)))
    return total.digest()


def _make_type_error(path: str | Path, mode: int) -> OSError:
    """The error for a path that is not a regular file; `mode` is its `st_mode`."""
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return OSError(errno.EINVAL, "Not a regular file", str(path))


def _read_mode(path: Path, follow_links: bool) -> int | None:
    """The permissions of the regular file to replace; None if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode) and not follow_links:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise _make_type_error(path, status.st_mode)
    if _is_standard_stream(path):
        raise OSError(errno.EINVAL, "Open as a standard stream", str(path))
    return stat.S_IMODE(status.st_mode)


def _is_standard_stream(path: Path) -> bool:
    """Whether stdin, stdout or stderr is the file `path`; replacing it would lose later output."""
    status = path.stat()
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), status):
                return True
    return False
