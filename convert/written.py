"""Files of a checkpoint as they are written, each hashed on its way to the disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mlx_smolvlm.checksums import SUMS_FILE, sums_text
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import open_file

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


class Outbox:
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
        (self.folder / SUMS_FILE).write_text(sums_text(self._sums), encoding="utf-8")


def _read(file: BinaryIO, path: Path) -> bytes:
    """The next bytes of the source `path`."""
    try:
        return file.read(_BLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
