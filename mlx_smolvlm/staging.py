"""A folder that appears whole or not at all.

Files are written to a hidden sibling that is locked while its writer lives, synced,
and renamed into place. What a killed writer left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_smolvlm.checkpoint import CONFIG_FILE, read_config
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import lock, sync

PARTIAL = ".partial"  # how the names of folders end that are not whole yet


def check_destination(dest: Path, force: bool) -> None:
    """Refuse a `dest` that holds something, unless `force` and it is a checkpoint of ours.

    Raises:
        CheckpointError: It says what is there.
    """
    if not os.path.lexists(dest):
        return
    if not dest.is_dir():
        raise CheckpointError(f"{dest} is no folder; choose another destination")
    if not any(dest.iterdir()):
        return
    try:
        read_config(dest)
    except CheckpointError:
        raise CheckpointError(
            f"{dest} is not empty and no mlx-smolvlm checkpoint; choose another folder"
        ) from None
    if not force:
        raise CheckpointError(f"{dest} already holds a checkpoint; use force to replace it")


@contextlib.contextmanager
def staged(dest: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside `dest` that takes its place when the block ends without an error.

    Raises:
        CheckpointError: `dest` holds something (see `check_destination`), before the
            block or after it, or the disk refuses.
    """
    dest = dest.resolve()
    check_destination(dest, force)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(dest)
        partial, descriptor = _make_locked(dest, 0o777)
    except OSError as error:
        raise CheckpointError(_refusal(dest, error)) from None
    try:
        yield partial
        _sync(partial)
        _publish(partial, dest, force)
    except OSError as error:
        raise CheckpointError(_refusal(dest, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def make_temporary() -> tuple[Path, Callable[[], None]]:
    """A new folder in the system's temporary directory, for this user alone, and its removal.

    It is locked until then. What a killed process left is not locked any more, and the next
    call removes it.

    Raises:
        OSError: It cannot be made.
    """
    dest = Path(tempfile.gettempdir()) / f"mlx-smolvlm-{os.geteuid()}"
    with contextlib.suppress(OSError):  # a directory that may not be listed
        remove_leftovers(dest)
    folder, descriptor = _make_locked(dest, 0o700)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)

    return folder, remove


def _refusal(dest: Path, error: OSError) -> str:
    """That `dest` cannot be written, why, and what to do."""
    text = f"{dest} cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; make room, or choose a destination on another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}; choose a destination that you may write to"
    return f"{text} ({error.filename})" if error.filename else text


def _hidden(dest: Path) -> Path:
    """A new name beside `dest`."""
    return dest.parent / f".{dest.name}.{secrets.token_hex(4)}{PARTIAL}"


def _make_locked(dest: Path, mode: int) -> tuple[Path, int]:
    """A new hidden folder beside `dest` and the descriptor that holds its lock."""
    while True:  # another writer may take it for a leftover until the lock is held
        partial = _hidden(dest)
        partial.mkdir(mode)
        try:
            descriptor = lock(partial, wait=True)
        except FileNotFoundError:
            continue
        if partial.is_dir():
            return partial, descriptor
        os.close(descriptor)


def remove_leftovers(dest: Path) -> None:
    """Remove what writers of `dest` that live no more left beside it; no other user's files."""
    for path in dest.parent.iterdir():
        if not (path.name.startswith(f".{dest.name}.") and path.name.endswith(PARTIAL)):
            continue
        try:
            descriptor = lock(path, flags=os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # its writer is alive, or it is no folder
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    """Wait until every file of `folder`, and the folder itself, is on the disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _publish(partial: Path, dest: Path, force: bool) -> None:
    """Rename `partial` to `dest`, which another writer may have filled in the meantime."""
    check_destination(dest, force)
    replaced = None
    if force and (dest / CONFIG_FILE).exists():
        replaced = _hidden(dest)
        dest.rename(replaced)
    try:
        partial.rename(dest)
    except OSError:
        if replaced is not None:
            replaced.rename(dest)
        else:
            check_destination(dest, force=False)
        raise
    with contextlib.suppress(OSError):  # it is in place, and whole
        sync(dest.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
