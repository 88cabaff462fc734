"""What was typed in earlier conversations, in a file that only its owner can read.

It is $MLX_SMOLVLM_HISTORY, else `history` in the cache folder; an empty variable turns it off.
A file that cannot be read or written is done without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.files import expand_path, open_file, write_file
from mlx_smolvlm.hub import cache_folder
from mlx_smolvlm.ownership import make_private_folder

VARIABLE = "MLX_SMOLVLM_HISTORY"
MAX_BYTES = 1 << 20  # of a file; its older half goes


def open_history() -> History:
    """The history for this conversation."""
    name = os.environ.get(VARIABLE)
    if name == "":
        return InMemoryHistory()
    try:
        if name is None:
            path = cache_folder() / "history"
            make_private_folder(path.parent)
        else:
            path = expand_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, "", mode=0o600)
        _shorten(path)
    except (OSError, SmolVLMError):
        return InMemoryHistory()
    return _History(str(path))


def _shorten(path: Path) -> None:
    """Drop the older half of a long history."""
    with open_file(path, own_only=True) as file:  # it refuses a pipe, which would be waited for
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - MAX_BYTES // 2))
        end = file.read(MAX_BYTES)
    if size > MAX_BYTES:
        write_file(path, b"\n" + end.partition(b"\n\n")[2])


class _History(FileHistory):
    """A file that may fail, and takes what is no UTF-8."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode())
