"""Write a checkpoint folder: staged beside its destination, hashed on the way, then renamed.

Memory is bounded by one weight file (`SHARD_BYTES`), not by the checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_smolvlm.checkpoint.headers import INDEX_FILE, WEIGHTS_FILE, write_arrays
from mlx_smolvlm.checkpoint.load import CONFIG_FILE, read_config
from mlx_smolvlm.checkpoint.provenance import SUMS_FILE, format_sums
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import lock, open_file, sync

PARTIAL_SUFFIX = ".partial"  # ends the names of incomplete folders


def check_destination(dest: Path, force: bool) -> None:
    """Check that `dest` does not exist or is empty; with `force`, it may hold a checkpoint.

    Raises:
        CheckpointError: `dest` is a file, or is not empty.
    """
    if not os.path.lexists(dest):
        return
    if not dest.is_dir():
        raise CheckpointError(f"{dest} is not a folder; choose another destination")
    if not any(dest.iterdir()):
        return
    try:
        read_config(dest)
    except CheckpointError:
        raise CheckpointError(
            f"{dest} is not empty and not an mlx-smolvlm checkpoint; choose another folder"
        ) from None
    if not force:
        raise CheckpointError(f"{dest} already holds a checkpoint; use force=True to replace it")


@contextlib.contextmanager
def stage_folder(dest: Path, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `dest`, which is renamed to `dest` if the block succeeds.

    Raises:
        CheckpointError: `check_destination` refuses `dest` before or after the block, or `dest`
            cannot be written.
    """
    dest = dest.resolve()
    check_destination(dest, force)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(dest)
        partial, descriptor = _make_locked(dest, 0o777)
    except OSError as error:
        raise CheckpointError(_explain_error(dest, error)) from None
    try:
        yield partial
        _sync(partial)
        _publish(partial, dest, force)
    except OSError as error:
        raise CheckpointError(_explain_error(dest, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def make_temporary() -> tuple[Path, Callable[[], None]]:
    """Make a private, locked folder in the system's temporary directory.

    Folders that killed processes left behind are no longer locked; they are removed first.

    Returns:
        The folder, and a function that removes it.

    Raises:
        OSError: The folder cannot be made.
    """
    dest = Path(tempfile.gettempdir()) / f"mlx-smolvlm-{os.geteuid()}"
    with contextlib.suppress(OSError):  # the directory may not be listable
        remove_leftovers(dest)
    folder, descriptor = _make_locked(dest, 0o700)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)

    return folder, remove


def _explain_error(dest: Path, error: OSError) -> str:
    """Return a message: `dest` cannot be written, why, and what to do."""
    text = f"{dest} cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; make room, or choose a destination on another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}; choose a destination that you may write to"
    return f"{text} ({error.filename})" if error.filename else text


def _make_hidden_path(dest: Path) -> Path:
    """Make a new hidden path beside `dest`; nothing is created."""
    return dest.parent / f".{dest.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


def _make_locked(dest: Path, mode: int) -> tuple[Path, int]:
    """Make a hidden folder beside `dest`; return it and the descriptor that holds its lock."""
    while True:  # until it is locked, another writer may remove the folder as a leftover
        partial = _make_hidden_path(dest)
        partial.mkdir(mode)
        try:
            descriptor = lock(partial, wait=True)
        except FileNotFoundError:
            continue
        if partial.is_dir():
            return partial, descriptor
        os.close(descriptor)


def remove_leftovers(dest: Path) -> None:
    """Remove this user's hidden folders beside `dest` that no running process has locked."""
    for path in dest.parent.iterdir():
        if not (path.name.startswith(f".{dest.name}.") and path.name.endswith(PARTIAL_SUFFIX)):
            continue
        try:
            descriptor = lock(path, flags=os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # its writer is running, or it is not a folder
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    """Sync every file of `folder`, and `folder` itself, to the disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _publish(partial: Path, dest: Path, force: bool) -> None:
    """Rename `partial` to `dest`, which another process may have written in the meantime."""
    check_destination(dest, force)
    replaced = None
    if force and (dest / CONFIG_FILE).exists():
        replaced = _make_hidden_path(dest)
        dest.rename(replaced)
    try:
        partial.rename(dest)
    except OSError:
        if replaced is not None:
            replaced.rename(dest)
        else:
            check_destination(dest, force=False)
        raise
    with contextlib.suppress(OSError):  # the checkpoint is complete and in place
        sync(dest.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


SHARD_BYTES = 512 * 10**6
_BLOCK = 1 << 20


class HashedFile:
    """A sequential binary file with a running SHA-256; `mlx.core.save_safetensors` accepts it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def write(self, data: bytes | memoryview) -> int:
        """Append `data` and return the number of bytes written."""
        count = self._file.write(data)
        self._digest.update(data)
        return count

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Raise OSError: bytes that were hashed cannot be overwritten."""
        raise OSError(f"a hashed file is written in one go, not from {offset} ({whence})")

    def hexdigest(self) -> str:
        """Return the SHA-256 of the bytes written."""
        return self._digest.hexdigest()


class FolderWriter:
    """Writes new files into `folder` and records their checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sums: dict[str, str] = {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[HashedFile]:
        """Create the file `name` and yield it for writing."""
        with (self.folder / name).open("xb") as raw:
            file = HashedFile(raw)
            yield file
        self._sums[name] = file.hexdigest()

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the new file `name`."""
        with self.open(name) as file:
            file.write(text.encode())

    def copy(self, source: Path) -> None:
        """Copy the file `source`, keeping its name.

        Raises:
            CheckpointError: `source` cannot be read.
        """
        try:
            input_file = open_file(source)
        except FileNotFoundError:
            raise CheckpointError(f"{source} is missing; fetch the checkpoint again") from None
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror}") from None
        with input_file, self.open(source.name) as file:
            while block := _read_block(input_file, source):
                file.write(block)

    def rename(self, old: str, new: str) -> None:
        """Rename the file `old` to `new`."""
        (self.folder / old).rename(self.folder / new)
        self._sums[new] = self._sums.pop(old)

    def finish(self) -> None:
        """Write `SUMS_FILE`."""
        (self.folder / SUMS_FILE).write_text(format_sums(self._sums), encoding="utf-8")


class ShardWriter:
    """Writes tensors into safetensors files of about `SHARD_BYTES` at most."""

    def __init__(self, writer: FolderWriter) -> None:
        self._writer = writer
        self._shards: list[list[str]] = []
        self._tensors: dict[str, mx.array] = {}
        self._nbytes = self.total = 0

    def add(self, tensors: dict[str, mx.array]) -> None:
        """Add `tensors` to the current file; write it first if they do not fit."""
        size = sum(array.nbytes for array in tensors.values())
        if self._tensors and self._nbytes + size > SHARD_BYTES:
            self._flush()
        self._tensors.update(tensors)
        self._nbytes += size
        self.total += size

    def _flush(self) -> None:
        """Write the current file and start another."""
        self._shards.append(sorted(self._tensors))
        with self._writer.open(f"part-{len(self._shards)}.safetensors") as file:
            write_arrays(file, self._tensors, {"format": "mlx"})
        self._tensors, self._nbytes = {}, 0

    def finish(self) -> None:
        """Write the last file, give the files their final names, and write an index if needed."""
        self._flush()
        count = len(self._shards)
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            name = WEIGHTS_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._writer.rename(f"part-{number}.safetensors", name)
            index |= dict.fromkeys(names, name)
        if count > 1:
            values = {"metadata": {"total_size": self.total}, "weight_map": index}
            self._writer.write_text(INDEX_FILE, json.dumps(values, indent=2) + "\n")


def _read_block(file: BinaryIO, path: Path) -> bytes:
    """Read the next bytes of `file`, opened from `path`."""
    try:
        return file.read(_BLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
