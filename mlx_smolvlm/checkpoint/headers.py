"""Read and write safetensors files: headers, single tensors, whole files, and the shard index."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import open_file, replace_file
from mlx_smolvlm.records import read_json, read_unique_keys

if TYPE_CHECKING:
    import mlx.core as mx

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
ITEM_BYTES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
ITEM_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)
_MLX_TYPES = FLOATS | {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}
_MLX_TYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {"BOOL": "bool_"}
LARGEST_HEADER = 25 * 10**6  # bytes; 100,000 tensors take half of it
MOST_DIMENSIONS = 8  # of a tensor; MLX counts each in an int32


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, safetensors type such as "BF16", shape, and first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_items(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEM_BYTES[self.dtype] * self.num_items


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read which tensors the safetensors file at `path` holds, by name; no weights are read.

    Raises:
        CheckpointError: The file is cut off, damaged or not safetensors. The tensors must be
            contiguous, as the safetensors library also requires.
    """
    with _open(path) as file:
        return _read_tensor_infos(path, file)


def _open(path: Path, own_only: bool = False) -> BinaryIO:
    """Open the regular file at `path` for reading; errors as in `read_metadata`."""
    try:
        return open_file(path, own_only=own_only)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _read_tensor_infos(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    """Read the header of `file`, opened from `path`; errors as in `read_header`."""
    header, data_bytes, data_start = _parse_header(path, file)
    header.pop("__metadata__", None)
    tensors = {
        name: _parse_entry(path, name, entry, data_bytes, data_start)
        for name, entry in header.items()
    }
    previous_end = 0
    for start, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if start != previous_end:
            raise CheckpointError(f"{path}: the header's tensors overlap or leave gaps")
        previous_end = end
    if previous_end != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - previous_end} bytes follow the last tensor")
    return tensors


def read_metadata(
    path: Path, largest: int = LARGEST_HEADER, *, own_only: bool = False
) -> dict[str, str]:
    """Read the metadata strings in the header of the safetensors file at `path`.

    Args:
        path: A safetensors file.
        largest: Largest header to read, in bytes.
        own_only: Refuse a file of another user.

    Raises:
        CheckpointError: As in `read_header`, or another user owns the file.
    """
    with _open(path, own_only) as file:
        metadata: dict[str, str] = _parse_header(path, file, largest)[0]["__metadata__"]
    return metadata


def load_tensors(path: Path) -> dict[str, mx.array]:
    """Load the safetensors file at `path` with MLX, after checking its header.

    Raises:
        CheckpointError: As in `read_header`, or a tensor has a type that MLX lacks.
    """
    import mlx.core as mx

    read_header(path)
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def _parse_header(
    path: Path, file: BinaryIO, largest: int = LARGEST_HEADER
) -> tuple[dict[str, Any], int, int]:
    """Return the header's JSON object, the number of data bytes, and the offset of the data."""
    try:
        total = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if 8 + length > total:
            raise CheckpointError(
                f"{path} is cut off or not safetensors: {total} bytes; fetch it again"
            )
        if length > largest:
            raise CheckpointError(f"{path} has a header of {length} bytes; fetch it again")
        text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=read_unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a damaged safetensors header; fetch it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged safetensors header; fetch it again")
    if header.get("__metadata__") is None:  # MLX writes null for empty metadata
        header["__metadata__"] = {}
    metadata = header["__metadata__"]
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path} has a damaged safetensors header; fetch it again")
    return header, total - 8 - length, 8 + length


def _parse_entry(path: Path, name: str, entry: Any, data_bytes: int, data_start: int) -> TensorInfo:
    """Check the header's `entry` for tensor `name`; its offsets count from `data_start`."""
    damaged = CheckpointError(f"{path}: the header's entry for {name!r:.100} is damaged")
    fields = ("dtype", "shape", "data_offsets")
    kind, shape, offsets = (entry.get(f) if isinstance(entry, dict) else None for f in fields)
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise damaged
    if kind not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r:.100} has type {kind!r:.20}; "
            f"{', '.join(FLOATS)} (and U32, U8 when quantized) can be read"
        )
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise damaged
    if len(offsets) != 2 or len(shape) > MOST_DIMENSIONS or max(shape, default=0) >= 2**31:
        raise damaged
    start, end = offsets
    info = TensorInfo(path, kind, tuple(shape), data_start + start)
    if end - start != info.nbytes:
        raise damaged
    if end > data_bytes:
        raise CheckpointError(
            f"{path} is cut off: tensor {name!r:.100} ends at byte {end} of {data_bytes}; "
            "fetch it again"
        )
    return info


class WeightFiles:
    """The safetensors files of a folder, kept open as long as this object lives.

    Attributes:
        tensors: The `TensorInfo` of every tensor, by name.

    Raises:
        CheckpointError: There are no safetensors files, one is missing or damaged, the
            index disagrees with them, or two files hold the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, BinaryIO] = {}
        open_files = contextlib.ExitStack()
        weakref.finalize(self, open_files.close)

        def read_infos(path: Path) -> dict[str, TensorInfo]:
            self._files[path] = open_files.enter_context(_open(path))
            return _read_tensor_infos(path, self._files[path])

        self.tensors = _read_folder(folder, read_infos)

    def read(self, name: str) -> mx.array:
        """Read the tensor `name` into memory.

        Raises:
            CheckpointError: The file cannot be read, was truncated, or has a type that MLX lacks.
        """
        import mlx.core as mx

        info = self.tensors[name]
        if info.dtype not in _MLX_TYPES:
            raise CheckpointError(f"{info.file} cannot be read: tensor '{name}' is {info.dtype}")
        file, array = self._files[info.file], mx.zeros(info.nbytes, mx.uint8)
        mx.eval(array)
        try:
            file.seek(info.start)
            # Reading into the array avoids a second copy of the largest tensor.
            count = file.readinto(memoryview(array))  # type: ignore[attr-defined, arg-type]
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from None
        if count < info.nbytes:
            raise CheckpointError(f"{info.file} changed while it was read; convert it again")
        dtype: mx.Dtype = getattr(mx, _MLX_TYPES[info.dtype])
        return array.view(dtype).reshape(info.shape)


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read which tensors the safetensors files in `folder` hold, by name; no weights are read.

    Raises:
        CheckpointError: As in `WeightFiles`.
    """
    return _read_folder(folder, read_header)


def _read_folder(
    folder: Path, read_infos: Callable[[Path], dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Collect the tensors of the safetensors files in `folder`, using `read_infos` per file."""
    index: dict[str, Any] = {}
    if (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        index = read_json(folder / INDEX_FILE).get("weight_map") or {}
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map")
    files = [WEIGHTS_FILE] if not index else sorted({str(name) for name in index.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_FILE} names '{name}', which is not a file in this folder"
            )
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        path = folder / name
        if not os.path.isfile(path):  # Path.is_file raises if a name is too long
            raise CheckpointError(f"{path} is missing; fetch or convert the checkpoint again")
        for tensor, info in read_infos(path).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"tensor '{tensor}' is in both {tensors[tensor].file.name} and {name}"
                )
            if index and index.get(tensor) != name:
                raise CheckpointError(
                    f"tensor '{tensor}' is in {name}, and {INDEX_FILE} puts it in "
                    f"{index.get(tensor)}"
                )
            tensors[tensor] = info
    for tensor in index:
        if tensor not in tensors:
            raise CheckpointError(f"tensor '{tensor}' is missing from {folder / index[tensor]}")
    return tensors


def write_arrays(file: Any, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write `arrays` and `metadata` to `file` in the safetensors format.

    Args:
        file: A binary file, or any object with `write`, `tell`, `seek` and `closed`. With a path,
            MLX would not report why writing failed.
        arrays: By name.
        metadata: Strings, by name.

    Raises:
        OSError: The disk is full or fails.
    """
    import mlx.core as mx

    mx.eval(arrays)  # so that a RuntimeError below comes from writing
    try:
        mx.save_safetensors(file, arrays, metadata)
    except RuntimeError as error:
        raise OSError(errno.EIO, " ".join(str(error).split())) from None


def save_tensors(
    path: Path,
    arrays: dict[str, mx.array],
    metadata: dict[str, str],
    *,
    mode: int = 0o666,
    follow_links: bool = False,
) -> None:
    """Write `arrays` and `metadata` to the safetensors file `path` atomically.

    Args:
        path: The file; any suffix.
        arrays: By name.
        metadata: Strings, by name.
        mode: As in `replace_file`.
        follow_links: As in `replace_file`.

    Raises:
        OSError: The file cannot be written.
    """
    with (
        replace_file(path, ".safetensors", mode=mode, follow_links=follow_links) as part,
        part.open("wb") as file,
    ):
        write_arrays(file, arrays, metadata)
