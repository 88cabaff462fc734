"""Keys, values and encoded media on disk: one safetensors file each, checked when read.

A file states its kind and version, the checkpoint that made it and a digest of its
arrays. What is cut off, damaged or made by something else is never used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.checkpoint import CARD_FILE
from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.reuse import Content, Span, State
from mlx_smolvlm.safetensors import read_header, read_metadata
from mlx_smolvlm.storage import FLOAT

VERSION = 1
LEAST_TOKENS = 16  # of a prompt that is worth a file
_HEADER = "mlx-smolvlm"
_BLOCK = 1 << 20
_STALE_S = 3600.0  # an unfinished file that old is nobody's


class Store:
    """States of prompts in a folder, for later runs of the same checkpoint.

    Files are found by content; `limit` bytes are kept, and what was not used for longest
    goes first. Trouble with a file is told once and stops no answer.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        checkpoint: Path,
        config: Config,
        adapter: Path | None = None,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            memo = folder / "checkpoints.json"
            self._checkpoint = checkpoint_digest(checkpoint, memo, adapter)
            self._own = folder / f"{self._checkpoint[:16]}-v{VERSION}"
            self._own.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the cache folder {folder} cannot be used ({error.strerror}); choose another"
            ) from None
        self._folder, self._limit, self._config = folder, limit, config
        self._warned = False

    def find(self, content: Content, most: int, above: int) -> State | None:
        """The state that begins as `content` does for longest, if for more than `above` tokens."""
        best, chosen = above, None
        for path, stored in self._stored():
            length = stored.common(content, most)
            if length > best:
                best, chosen = length, path
        if chosen is None:
            return None
        with self._tolerant(chosen):
            tensors, header = read(chosen, "prefix", self._checkpoint)
            state = State(content_in(header), restored(tensors, self._config))
            os.utime(chosen)
            return state
        return None

    def put(self, state: State, prompt: Content) -> None:
        """Keep keys and values of `prompt`, which `state` begins with, if that is worth it.

        What is stored already, but for less than `LEAST_TOKENS` tokens, is not stored again.
        Files that the new one holds all of are removed.
        """
        length = len(prompt.ids)
        if not is_plain(state.cache) or state.held < length:
            return
        contained = []
        for path, stored in self._stored():
            common = stored.common(prompt, length)
            if common > length - LEAST_TOKENS:
                return
            if common == len(stored.ids):
                contained.append(path)
        if length < LEAST_TOKENS:
            return
        name = hashlib.sha256(json.dumps(content_values(prompt)).encode()).hexdigest()[:32]
        path = self._own / f"{name}.safetensors"
        with self._tolerant(path):
            tensors = kept(state.cache, length)
            write(path, "prefix", self._checkpoint, tensors, content_values(prompt))
            for old in contained:
                old.unlink(missing_ok=True)
            self._shrink(path)

    def _stored(self) -> Iterator[tuple[Path, Content]]:
        """The files of this checkpoint that can be read, with their contents."""
        for path in sorted(self._own.glob("[!.]*.safetensors")):
            with self._tolerant(path):
                yield path, content_in(read_values(path, "prefix", self._checkpoint))

    def _shrink(self, newest: Path) -> None:
        """Remove what was not used for longest until the limit holds, and what was left half."""
        for part in self._folder.glob("*/.*.part.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - _STALE_S:
                    part.unlink()
        files = [(path.stat(), path) for path in self._folder.glob("*/[!.]*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda one: (one[1] == newest, one[0].st_mtime_ns)):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size

    @contextlib.contextmanager
    def _tolerant(self, path: Path) -> Iterator[None]:
        """Within it, a file that cannot be used is told of once and passed over."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror if isinstance(error, OSError) else error
                warnings.warn(
                    f"the cache file {path} is not used: {reason}", SmolVLMWarning, stacklevel=4
                )


def write(
    path: Path, kind: str, checkpoint: str, tensors: dict[str, mx.array], values: dict[str, Any]
) -> None:
    """Write `tensors` and the JSON `values` to `path`, whole or not at all.

    Raises:
        OSError: There is no room, or the folder cannot be written to.
    """
    header = {
        "kind": kind,
        "version": VERSION,
        "checkpoint": checkpoint,
        "digest": _digest(tensors),
        "values": values,
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part.safetensors")
    os.close(handle)
    try:
        try:
            mx.save_safetensors(name, tensors, {_HEADER: json.dumps(header)})
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error)) from None
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_values(path: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """The JSON values in the file at `path`, of the given kind and checkpoint.

    Raises:
        CheckpointError: It is none, or of another version or checkpoint, or damaged.
    """
    return _header(path, kind, checkpoint)["values"]  # type: ignore[no-any-return]


def read(path: Path, kind: str, checkpoint: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and JSON values in the file at `path`, of the given kind and checkpoint.

    Raises:
        CheckpointError: It is none, or of another version or checkpoint, or damaged.
    """
    header = _header(path, kind, checkpoint)
    read_header(path)
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    assert isinstance(tensors, dict)
    if _digest(tensors) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged")
    return tensors, header["values"]


def _header(path: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """What `write` stated in the file at `path`."""
    try:
        header = json.loads(read_metadata(path).get(_HEADER, "null"))
    except (ValueError, TypeError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise CheckpointError(f"{path} is no {kind} file of mlx-smolvlm")
    if header.get("version") != VERSION or not isinstance(header.get("values"), dict):
        raise CheckpointError(f"{path} was written by another version of mlx-smolvlm")
    if header.get("checkpoint") != checkpoint:
        raise CheckpointError(f"{path} was written with another checkpoint")
    return header


def is_plain(cache: KVCache) -> bool:
    """Whether `cache` holds every token as it was computed, as `kept` needs it."""
    return type(cache) is KVCache and cache.storage is FLOAT


def kept(cache: KVCache, length: int) -> dict[str, mx.array]:
    """Keys and values of the first `length` tokens, by name."""
    return {f"layer.{i}": buffer[:, :, :length] for i, buffer in enumerate(cache.arrays)}


def restored(tensors: Mapping[str, mx.array], config: Config) -> KVCache:
    """The cache that `kept` took apart.

    Raises:
        CheckpointError: The arrays are not those of such a model.
    """
    text = config.text
    cache = KVCache(text.num_hidden_layers)
    for i in range(text.num_hidden_layers):
        array = tensors.get(f"layer.{i}")
        length = 0 if array is None or array.ndim != 4 else array.shape[2]
        shape = (1, 2 * text.num_key_value_heads, length, text.head_dim)
        if array is None or tuple(array.shape) != shape or (i and length != cache.offset):
            raise CheckpointError(f"keys and values of layer {i} are missing or of another shape")
        cache.buffers[i] = (array,)
        cache.offset = length
    return cache


def content_in(values: Mapping[str, Any]) -> Content:
    """The content that `content_values` described.

    Raises:
        CheckpointError: It describes none.
    """
    try:
        ids = np.array(values["ids"], np.int32).reshape(-1)
        spans = tuple(Span(int(a), int(b), str(digest)) for a, b, digest in values["spans"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError("the tokens of a cache file are damaged") from None
    return Content(ids, spans)


def content_values(content: Content) -> dict[str, Any]:
    """`content` as JSON values."""
    spans = [[span.start, span.stop, span.digest] for span in content.spans]
    return {"ids": content.ids.tolist(), "spans": spans}


def _digest(tensors: Mapping[str, mx.array]) -> str:
    """Digest of names, types, shapes and bytes of `tensors`."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        array = tensors[name]
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(np.array(array.view(mx.uint8))).data)
    return total.hexdigest()


def checkpoint_digest(folder: Path, memo: Path | None = None, adapter: Path | None = None) -> str:
    """Digest of every file of the checkpoint in `folder` but its card, which may grow.

    Args:
        memo: A JSON file that remembers digests by name, size and time of the files, since
            reading gigabytes takes seconds; None reads them.
        adapter: The folder of its adapter, which counts as well.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if adapter is not None:
        both = checkpoint_digest(folder, memo) + checkpoint_digest(adapter, memo)
        return hashlib.sha256(both.encode()).hexdigest()
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != CARD_FILE)
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        known: dict[str, Any] = {}
        if memo is not None:
            with contextlib.suppress(OSError, ValueError):
                known = dict(json.loads(memo.read_text(encoding="utf-8")))
        found = known.get(str(folder.resolve()))
        if isinstance(found, list) and len(found) == 2 and found[0] == stamp:
            return str(found[1])
        total = hashlib.sha256()
        for path in files:
            total.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    total.update(block)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    digest = total.hexdigest()
    if memo is not None:
        with contextlib.suppress(OSError):
            known[str(folder.resolve())] = [stamp, digest]
            part = memo.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known), encoding="utf-8")
            part.replace(memo)
    return digest
