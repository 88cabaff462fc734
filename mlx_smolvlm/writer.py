"""Files of a checkpoint as they are written, each hashed on its way to the disk.

Memory is bounded by one file of weights (`SHARD_BYTES`), not by the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_smolvlm.checksums import SUMS_FILE, sums_text
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import open_file
from mlx_smolvlm.safetensors import INDEX_FILE, WEIGHTS_FILE, write_arrays

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


class ShardWriter:
    """Tensors collected into files of at most about `SHARD_BYTES`."""

    def __init__(self, outbox: Outbox) -> None:
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
