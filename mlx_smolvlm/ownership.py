"""Check who owns files and folders: what another user may have written is not trusted.

Root is trusted as well as the user who runs this process, since root can change everything.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_OTHERS_WRITE = 0o022


def check_owner(status: os.stat_result, path: str | Path) -> None:
    """Refuse a file or folder of another user.

    Args:
        status: Of the open file, so that nobody can exchange it after the check.
        path: For the message.

    Raises:
        PermissionError: It belongs to somebody else.
    """
    if status.st_uid not in (os.geteuid(), 0):
        raise _foreign(path, f"Owned by another user, uid {status.st_uid}")


def check_folder(path: Path) -> None:
    """Refuse a folder that another user owns, or that root owns and others can write to.

    Raises:
        PermissionError: It is such a folder.
        OSError: There is no such folder.
    """
    status = path.stat()
    check_owner(status, path)
    if status.st_uid != os.geteuid() and status.st_mode & _OTHERS_WRITE:
        raise _foreign(path, f"Owned by uid {status.st_uid}, and other users can write to it")


def make_private_folder(path: Path) -> None:
    """Make the folder `path`, and parents that are missing, with mode 0700; or check it.

    Raises:
        PermissionError: It exists and `check_folder` refuses it, or it lies in a folder that
            another user owns and others can write to.
        OSError: It cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(path)
    around = path.parent.stat()
    if around.st_uid not in (os.geteuid(), 0) and around.st_mode & _OTHERS_WRITE:
        reason = f"It lies in a folder of uid {around.st_uid} that other users can write to"
        raise _foreign(path, reason)


def _foreign(path: str | Path, reason: str) -> PermissionError:
    return PermissionError(errno.EPERM, reason, str(path))
