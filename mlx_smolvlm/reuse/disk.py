"""Keys and values on disk: the store of prompts, the file format, and the checkpoint's digest.

A state file is a safetensors file whose header holds its kind, its version, the digest of the
checkpoint and a digest of its arrays. Truncated, damaged or foreign files are never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.checkpoint.headers import load_tensors, read_metadata, save_tensors
from mlx_smolvlm.checkpoint.load import CARD_FILE
from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import (
    expand_path,
    locate_cache,
    make_private_folder,
    open_file,
    read_file,
    remove_leftovers,
    write_file,
)
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache
from mlx_smolvlm.reuse.content import CachedState, Content, Span

VERSION = 1
MIN_TOKENS = 16  # shorter prompts are not stored
OWN_FOLDER = "mlx-smolvlm-cache"  # in the user's folder, which may hold other files
MEMO_FILE = "checkpoints.json"
TAG_FILE = (
    "CACHEDIR.TAG"  # also tells backup programs to skip the folder: https://bford.info/cachedir/
)
_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# A cache of mlx-smolvlm: keys and values of prompts. It can be removed at any time.
"""
_PREFIX = "prefix"  # the kind of the store's files
_NAME = re.compile(rf"{_PREFIX}-([0-9a-f]{{16}})-v\d+-[0-9a-f]{{32}}\.safetensors")
_HEADER = "mlx-smolvlm"
_MAX_HEADER = 1 << 24  # bytes; the longest context needs one hundredth of it
_MAX_MEMO = 1 << 24
_BLOCK = 1 << 20


class DiskStore:
    """States of prompts in a folder, for later runs of the same checkpoint.

    The files are in the subfolder `OWN_FOLDER`, which contains a tag file, and are found by their
    content. When they exceed `limit` bytes, the least recently used are removed. Files that the
    cache did not write are neither counted nor removed. The first unusable file causes a
    warning; none causes an error.

    Raises:
        CheckpointError: The folder or the checkpoint cannot be used.
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
            self._own = _make_folder(expand_path(folder))
            with contextlib.suppress(OSError):  # no room: `save` tries again, and says so
                _mark(self._own)
            memo = self._own / MEMO_FILE if _is_marked(self._own) else None
            self._checkpoint = digest_checkpoint(checkpoint, memo, adapter)
        except OSError as error:
            raise CheckpointError(
                f"the cache folder {folder} cannot be used ({error.strerror}); choose another"
            ) from None
        self._start = f"{_PREFIX}-{self._checkpoint[:16]}-v{VERSION}-"
        self._limit, self._config = limit, config
        self._warned = False

    def find(self, content: Content, most: int, above: int) -> CachedState | None:
        """Find the stored state with the longest common prefix with `content`.

        Returns:
            The state; None if no prefix, of at most `most` tokens, is longer than `above`.
        """
        best, best_path = above, None
        for path, stored in self._read_contents():
            length = stored.count_common(content, most)
            if length > best:
                best, best_path = length, path
        if best_path is None:
            return None
        with self._skip_unusable(best_path):
            tensors, header = read_state_file(best_path, _PREFIX, self._checkpoint)
            state = CachedState(
                parse_content(header, self._config), rebuild_cache(tensors, self._config)
            )
            os.utime(best_path)
            return state
        return None

    def save(self, state: CachedState, prompt: Content) -> None:
        """Store the keys and values of `prompt`, a prefix of `state`.

        Does nothing if the prompt is shorter than `MIN_TOKENS`, or if a file already holds all
        but fewer than `MIN_TOKENS` of its tokens. Removes files that are prefixes of the new one.
        """
        length = len(prompt.ids)
        if not is_plain(state.cache) or state.num_tokens < length:
            return
        contained = []
        for path, stored in self._read_contents():
            common = stored.count_common(prompt, length)
            if common > length - MIN_TOKENS:
                return
            if common == len(stored.ids):
                contained.append(path)
        if length < MIN_TOKENS:
            return
        name = hashlib.sha256(json.dumps(serialize_content(prompt)).encode()).hexdigest()[:32]
        path = self._own / f"{self._start}{name}.safetensors"
        with self._skip_unusable(path):
            _mark(self._own)
            tensors = extract_tensors(state.cache, length)
            write_state_file(path, _PREFIX, self._checkpoint, tensors, serialize_content(prompt))
            for old in contained:
                old.unlink(missing_ok=True)
            self._shrink(path)

    def _read_contents(self) -> Iterator[tuple[Path, Content]]:
        """Yields path and content of every readable file of this checkpoint."""
        for path, _ in _list_files(self._own):
            if path.name.startswith(self._start):
                with self._skip_unusable(path):
                    values = read_state_values(path, _PREFIX, self._checkpoint)
                    yield path, parse_content(values, self._config)

    def _shrink(self, newest: Path) -> None:
        """Remove leftovers, then the least recently used files until the rest fits the limit.

        `newest` is removed last.
        """
        remove_leftovers(self._own)
        files = [(status, path) for path, status in _list_files(self._own)]
        if sum(status.st_size for status, _ in files) <= self._limit:
            return  # avoids reading every header
        files = [one for one in files if _is_own(one[1])]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda one: (one[1] == newest, one[0].st_mtime_ns)):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size

    @contextlib.contextmanager
    def _skip_unusable(self, path: Path) -> Iterator[None]:
        """Suppress errors of the file at `path`; the first one in this store causes a warning."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror if isinstance(error, OSError) else error
                warnings.warn(
                    f"the cache file {path} is not used: {reason}", SmolVLMWarning, stacklevel=4
                )


def _make_folder(folder: Path) -> Path:
    """Create or check the cache's subfolder of `folder`, private to the user.

    Raises:
        CheckpointError: A folder of that name exists and is not a cache.
        OSError: It cannot be created, or other users can write to it.
    """
    own = folder / OWN_FOLDER
    make_private_folder(own)
    names = [name for name in os.listdir(own) if not name.startswith(".")]
    if own.is_symlink() or (names and not _is_marked(own)):
        raise CheckpointError(
            f"{own} is not a cache of mlx-smolvlm, so nothing is written there; choose another "
            "folder"
        )
    status = own.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:  # created by an earlier version
        own.chmod(0o700)
    return own


def _mark(own: Path) -> None:
    """Create the tag file in the cache's folder if it is missing; errors as in `_make_folder`."""
    _make_folder(own.parent)
    if not _is_marked(own):
        write_file(own / TAG_FILE, _TAG, follow_links=False)


def _is_marked(own: Path) -> bool:
    """Whether the folder `own` contains the tag file of this cache."""
    try:
        return read_file(own / TAG_FILE, 4096).startswith(_TAG.encode())
    except OSError:
        return False


def _list_files(own: Path) -> list[tuple[Path, os.stat_result]]:
    """Paths and status of the regular files in `own` with names of the cache, sorted; no links."""
    files = []
    with contextlib.suppress(OSError), os.scandir(own) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            with contextlib.suppress(OSError):  # removed by another run
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    files.append((own / entry.name, entry.stat(follow_symlinks=False)))
    return files


def _is_own(path: Path) -> bool:
    """Whether the cache wrote the file at `path`: its header must match its name."""
    match = _NAME.fullmatch(path.name)
    try:
        header = _read_header(path, own_only=True)
    except CheckpointError:
        return False
    if match is None or header is None or header.get("kind") != _PREFIX:
        return False
    return str(header.get("checkpoint")).startswith(match[1])


def write_state_file(
    path: Path,
    kind: str,
    checkpoint: str,
    tensors: dict[str, mx.array],
    values: dict[str, Any],
    follow_links: bool = False,
) -> None:
    """Write a state file atomically, readable by its owner only.

    Args:
        path: The file to create or replace.
        kind: What the file holds, such as "conversation".
        checkpoint: Digest of the checkpoint.
        tensors: Arrays by name.
        values: JSON values.
        follow_links: As in `files.replace_file`.

    Raises:
        OSError: The disk is full, the folder cannot be written to, or `path` is no regular file.
    """
    header = {
        "kind": kind,
        "version": VERSION,
        "checkpoint": checkpoint,
        "digest": _digest(tensors),
        "values": values,
    }
    metadata = {_HEADER: json.dumps(header)}
    save_tensors(path, tensors, metadata, mode=0o600, follow_links=follow_links)


def read_state_values(path: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """The JSON values in the state file at `path`.

    Raises:
        CheckpointError: The file is of another kind, version or checkpoint, or is damaged.
    """
    return _check_header(path, kind, checkpoint)["values"]  # type: ignore[no-any-return]


def read_state_file(
    path: Path, kind: str, checkpoint: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the JSON values in the state file at `path`.

    Raises:
        CheckpointError: The file is of another kind, version or checkpoint, or is damaged.
    """
    header = _check_header(path, kind, checkpoint)
    tensors = load_tensors(path)
    try:
        is_whole = _digest(tensors) == header.get("digest")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not is_whole:
        raise CheckpointError(f"{path} is damaged")
    return tensors, header["values"]


def _read_header(path: Path, own_only: bool) -> dict[str, Any] | None:
    """The header of the state file at `path`; None if it has none.

    Raises:
        CheckpointError: The file cannot be read, or with `own_only` it has another owner.
    """
    metadata = read_metadata(path, _MAX_HEADER, own_only=own_only)
    try:
        header = json.loads(metadata.get(_HEADER, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _check_header(path: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """Read and check the header of the state file at `path`.

    Files of the store are found by name in a folder, where another user may have put them, so
    their owner is checked. A conversation is a file that the user names.

    Raises:
        CheckpointError: As `read_state_file`.
    """
    try:
        header = _read_header(path, own_only=kind == _PREFIX)
    except CheckpointError as error:
        if str(error).endswith("; fetch it again"):  # which is no advice here
            raise CheckpointError(f"{path} is no {kind} file of mlx-smolvlm, or damaged") from None
        raise
    if header is None or header.get("kind") != kind:
        raise CheckpointError(f"{path} is no {kind} file of mlx-smolvlm")
    if header.get("version") != VERSION or not isinstance(header.get("values"), dict):
        raise CheckpointError(f"{path} was written by another version of mlx-smolvlm")
    if header.get("checkpoint") != checkpoint:
        raise CheckpointError(f"{path} was written with another checkpoint")
    return header


def is_plain(cache: KVCache) -> bool:
    """Whether `cache` keeps all tokens as computed; `extract_tensors` requires it."""
    return type(cache) is KVCache and cache.storage is FLOAT_STORAGE


def extract_tensors(cache: KVCache, length: int) -> dict[str, mx.array]:
    """Keys and values of the first `length` tokens of `cache`, one array per layer, by name."""
    return {f"layer.{i}": buffer[:, :, :length] for i, buffer in enumerate(cache.arrays)}


def rebuild_cache(tensors: Mapping[str, mx.array], config: Config) -> KVCache:
    """Build a cache from the arrays of `extract_tensors`.

    Raises:
        CheckpointError: An array is missing or does not suit the model.
    """
    text = config.text
    cache = KVCache(text.num_hidden_layers)
    for i in range(text.num_hidden_layers):
        array = tensors.get(f"layer.{i}")
        length = 0 if array is None or array.ndim != 4 else array.shape[2]
        shape = (1, 2 * text.num_key_value_heads, length, text.head_dim)
        if array is None or tuple(array.shape) != shape or (i and length != cache.offset):
            raise CheckpointError(f"keys and values of layer {i} are missing or of another shape")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise CheckpointError(f"keys and values of layer {i} are {array.dtype}, not floats")
        cache.buffers[i] = (array,)
        cache.offset = length
    return cache


def parse_content(values: Any, config: Config) -> Content:
    """Read the JSON values of `serialize_content`.

    Raises:
        CheckpointError: The values are malformed, or a token id is outside the vocabulary.
    """
    try:
        ids, spans = values["ids"], tuple(Span(*span) for span in values["spans"])
        places = [place for span in spans for place in (span.start, span.stop)]
        if (
            {*map(type, ids), *map(type, places)} <= {int}
            and {type(span.digest) for span in spans} <= {str}
            and all(0 <= token_id < config.text.vocab_size for token_id in ids)
            and all(span.start < span.stop for span in spans)
            and [0, *places, len(ids)] == sorted([0, *places, len(ids)])
        ):
            return Content(np.array(ids, np.int32), spans)
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError("the tokens of a cache file are damaged")


def serialize_content(content: Content) -> dict[str, Any]:
    """`content` as JSON values; `parse_content` reads them."""
    spans = [[span.start, span.stop, span.digest] for span in content.spans]
    return {"ids": content.ids.tolist(), "spans": spans}


def _digest(tensors: Mapping[str, mx.array]) -> str:
    """Digest of the names, types, shapes and bytes of `tensors`."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        array = tensors[name]
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(np.array(array.view(mx.uint8))).data)
    return total.hexdigest()


def digest_checkpoint(folder: Path, memo: Path | None = None, adapter: Path | None = None) -> str:
    """Hexadecimal SHA-256 of a checkpoint's files, except its card and hidden files.

    Args:
        folder: The checkpoint.
        memo: A JSON file that stores digests by name, size and time of the files, because
            reading gigabytes takes seconds; None reads the files.
        adapter: The folder of a LoRA adapter to include, or None.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if adapter is not None:
        both = digest_checkpoint(folder, memo) + digest_checkpoint(adapter, memo)
        return hashlib.sha256(both.encode()).hexdigest()
    try:
        paths = [path for path in folder.iterdir() if path.name[0] != "." and path.is_file()]
        files = sorted(path for path in paths if path.name != CARD_FILE)
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        memory = {} if memo is None else _read_memo(memo)
        entry = memory.get(str(folder.resolve()))
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp:
            digest = str(entry[1])
            if re.fullmatch("[0-9a-f]{64}", digest):  # becomes part of file names
                return digest
        total = hashlib.sha256()
        for path in files:
            total.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open_file(path) as file:
                while block := file.read(_BLOCK):
                    total.update(block)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    digest = total.hexdigest()
    if memo is not None:
        with contextlib.suppress(OSError):
            memory[str(folder.resolve())] = [stamp, digest]
            write_file(memo, json.dumps(memory), follow_links=False)
    return digest


def find_memo() -> Path | None:
    """Return the file in the cache for digests of checkpoints; None if there is no cache."""
    try:
        folder = locate_cache()
    except OSError:
        return None
    return folder / "digests.json" if folder.is_dir() else None


def _read_memo(memo: Path) -> dict[str, Any]:
    """The digests in `memo`; empty if the file cannot be used."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(read_file(memo, _MAX_MEMO, own_only=True))
        if isinstance(values, dict):
            return values
    return {}
