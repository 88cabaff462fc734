"""Files of a checkpoint as they are written, each hashed on its way to the disk.

Memory is bounded by one file of weights (`SHARD_BYTES`), not by the checkpoint.
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

PARTIAL_SUFFIX = ".partial"  # how the names of folders end that are not whole yet


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
def stage_folder(dest: Path, force: bool) -> Iterator[Path]:
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


def _explain_error(dest: Path, error: OSError) -> str:
    """That `dest` cannot be written, why, and what to do."""
    text = f"{dest} cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; make room, or choose a destination on another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}; choose a destination that you may write to"
    return f"{text} ({error.filename})" if error.filename else text


def _make_hidden_path(dest: Path) -> Path:
    """A new name beside `dest`."""
    return dest.parent / f".{dest.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


def _make_locked(dest: Path, mode: int) -> tuple[Path, int]:
    """A new hidden folder beside `dest` and the descriptor that holds its lock."""
    while True:  # another writer may take it for a leftover until the lock is held
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
    """Remove what writers of `dest` that live no more left beside it; no other user's files."""
    for path in dest.parent.iterdir():
        if not (path.name.startswith(f".{dest.name}.") and path.name.endswith(PARTIAL_SUFFIX)):
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
    with contextlib.suppress(OSError):  # it is in place, and whole
        sync(dest.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


SHARD_BYTES = 512 * 10**6
_BLOCK = 1 << 20


class HashedFile:
    """A file that is written from its beginning to its end; what MLX takes for a stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._file.closed

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`."""
        count = self._file.write(data)
        self._digest.update(data)
        return count

    def tell(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Refused: what was hashed cannot be taken back."""
        raise OSError(f"a hashed file is written in one go, not from {offset} ({whence})")

    def hexdigest(self) -> str:
        """The SHA-256 of what was written."""
        return self._digest.hexdigest()


class FolderWriter:
    """The files that a conversion writes into `folder`, and their sums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sums: dict[str, str] = {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[HashedFile]:
        """The new file `name`, to be written within the block."""
        with (self.folder / name).open("xb") as raw:
            file = HashedFile(raw)
            yield file
        self._sums[name] = file.hexdigest()

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the new file `name`."""
        with self.open(name) as file:
            file.write(text.encode())

    def copy(self, source: Path) -> None:
        """Write a copy of the file `source` under its own name.

        Raises:
            CheckpointError: It cannot be read.
        """
        try:
            reading = open_file(source)
        except FileNotFoundError:
            raise CheckpointError(f"{source} is missing; fetch the checkpoint again") from None
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror}") from None
        with reading, self.open(source.name) as file:
            while block := _read(reading, source):
                file.write(block)

    def rename(self, old: str, new: str) -> None:
        """Give the file `old` its final name."""
        (self.folder / old).rename(self.folder / new)
        self._sums[new] = self._sums.pop(old)

    def finish(self) -> None:
        """Write the list of sums."""
        (self.folder / SUMS_FILE).write_text(format_sums(self._sums), encoding="utf-8")


class ShardWriter:
    """Tensors collected into files of at most about `SHARD_BYTES`."""

    def __init__(self, outbox: FolderWriter) -> None:
        self._outbox = outbox
        self._shards: list[list[str]] = []
        self._tensors: dict[str, mx.array] = {}
        self._nbytes = self.total = 0

    def add(self, tensors: dict[str, mx.array]) -> None:
        """Keep `tensors` until their file is full."""
        size = sum(array.nbytes for array in tensors.values())
        if self._tensors and self._nbytes + size > SHARD_BYTES:
            self._flush()
        self._tensors.update(tensors)
        self._nbytes += size
        self.total += size

    def _flush(self) -> None:
        """Write what is kept, and keep it no longer."""
        self._shards.append(sorted(self._tensors))
        with self._outbox.open(f"part-{len(self._shards)}.safetensors") as file:
            write_arrays(file, self._tensors, {"format": "mlx"})
        self._tensors, self._nbytes = {}, 0

    def finish(self) -> None:
        """Write the rest, give the files their names, and write the index if there are several."""
        self._flush()
        count = len(self._shards)
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            name = WEIGHTS_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._outbox.rename(f"part-{number}.safetensors", name)
            index |= dict.fromkeys(names, name)
        if count > 1:
            values = {"metadata": {"total_size": self.total}, "weight_map": index}
            self._outbox.write_text(INDEX_FILE, json.dumps(values, indent=2) + "\n")


def _read(file: BinaryIO, path: Path) -> bytes:
    """The next bytes of the source `path`."""
    try:
        return file.read(_BLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
