"""Keys, values and encoded media on disk: one safetensors file each, checked when read.

A file states its kind and version, the checkpoint that made it and a digest of its
arrays. What is cut off, damaged or made by something else is never used.
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
    make_private_folder,
    open_file,
    read_file,
    remove_leftovers,
    write_file,
)
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache
from mlx_smolvlm.reuse.content import CachedState, Content, Span

VERSION = 1
LEAST_TOKENS = 16  # of a prompt that is worth a file
OWN_FOLDER = "mlx-smolvlm-cache"  # below the folder that a user names, where other files may lie
MEMO_FILE = "checkpoints.json"
TAG_FILE = "CACHEDIR.TAG"  # tells backup programs too: https://bford.info/cachedir/
_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# A cache of mlx-smolvlm: keys and values of prompts. It can be removed at any time.
"""
_PREFIX = "prefix"  # the kind of the files here
_NAME = re.compile(rf"{_PREFIX}-([0-9a-f]{{16}})-v\d+-[0-9a-f]{{32}}\.safetensors")
_HEADER = "mlx-smolvlm"
_LARGEST_HEADER = 1 << 24  # bytes; those of the longest contexts take one hundredth of it
_LARGEST_MEMO = 1 << 24
_BLOCK = 1 << 20


class DiskStore:
    """States of prompts in a folder, for later runs of the same checkpoint.

    They lie in the subfolder `OWN_FOLDER`, which a tag file marks. Files are found by content;
    `limit` bytes are kept, and what was not used for longest goes first. Nothing is counted or
    removed that the cache did not write. Trouble with a file is told once and stops no answer.
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
        """The state that begins as `content` does for longest, if for more than `above` tokens."""
        best, chosen = above, None
        for path, stored in self._read_contents():
            length = stored.count_common(content, most)
            if length > best:
                best, chosen = length, path
        if chosen is None:
            return None
        with self._skip_unusable(chosen):
            tensors, header = read_state_file(chosen, _PREFIX, self._checkpoint)
            state = CachedState(
                parse_content(header, self._config), rebuild_cache(tensors, self._config)
            )
            os.utime(chosen)
            return state
        return None

    def save(self, state: CachedState, prompt: Content) -> None:
        """Keep keys and values of `prompt`, which `state` begins with, if that is worth it.

        What is stored already, but for less than `LEAST_TOKENS` tokens, is not stored again.
        Files that the new one holds all of are removed.
        """
        length = len(prompt.ids)
        if not is_plain(state.cache) or state.num_tokens < length:
            return
        contained = []
        for path, stored in self._read_contents():
            common = stored.count_common(prompt, length)
            if common > length - LEAST_TOKENS:
                return
            if common == len(stored.ids):
                contained.append(path)
        if length < LEAST_TOKENS:
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
        """The files of this checkpoint that can be read, with their contents."""
        for path, _ in _list_files(self._own):
            if path.name.startswith(self._start):
                with self._skip_unusable(path):
                    values = read_state_values(path, _PREFIX, self._checkpoint)
                    yield path, parse_content(values, self._config)

    def _shrink(self, newest: Path) -> None:
        """Remove what was not used for longest until the limit holds, and what was left half."""
        remove_leftovers(self._own)
        files = [(status, path) for path, status in _list_files(self._own)]
        if sum(status.st_size for status, _ in files) <= self._limit:
            return  # without reading every header
        files = [one for one in files if _is_own(one[1])]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda one: (one[1] == newest, one[0].st_mtime_ns)):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size

    @contextlib.contextmanager
    def _skip_unusable(self, path: Path) -> Iterator[None]:
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


def _make_folder(folder: Path) -> Path:
    """The cache's own subfolder of `folder`, made if it is not there, for this user alone.

    Raises:
        CheckpointError: Something else has its name.
        OSError: It cannot be made, or other users can write to it.
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
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:  # made by an earlier version
        own.chmod(0o700)
    return own


def _mark(own: Path) -> None:
    """Write the tag into the cache's folder, if it has none; errors as `_make_folder`."""
    _make_folder(own.parent)
    if not _is_marked(own):
        write_file(own / TAG_FILE, _TAG, follow_links=False)


def _is_marked(own: Path) -> bool:
    """Whether the folder `own` holds the tag of this cache."""
    try:
        return read_file(own / TAG_FILE, 4096).startswith(_TAG.encode())
    except OSError:
        return False


def _list_files(own: Path) -> list[tuple[Path, os.stat_result]]:
    """Regular files of `own` that are called as the cache calls its own, in order; no links."""
    found = []
    with contextlib.suppress(OSError), os.scandir(own) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            with contextlib.suppress(OSError):  # removed by another run
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append((own / entry.name, entry.stat(follow_symlinks=False)))
    return found


def _is_own(path: Path) -> bool:
    """Whether the header of the file at `path` is one that the cache wrote under this name."""
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
    """Write `tensors` and the JSON `values` to `path`, whole or not at all; its owner reads it.

    Raises:
        OSError: There is no room, the folder cannot be written to, or `path` is no regular file.
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
    """The JSON values in the file at `path`, of the given kind and checkpoint.

    Raises:
        CheckpointError: It is none, or of another version or checkpoint, or damaged.
    """
    return _check_header(path, kind, checkpoint)["values"]  # type: ignore[no-any-return]


def read_state_file(
    path: Path, kind: str, checkpoint: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and JSON values in the file at `path`, of the given kind and checkpoint.

    Raises:
        CheckpointError: It is none, or of another version or checkpoint, or damaged.
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
    """What `write` stated in the file at `path`, of whatever kind; None if it wrote nothing.

    Args:
        path: A file.
        own_only: Refuse a file of another user, with a CheckpointError.
    """
    metadata = read_metadata(path, _LARGEST_HEADER, own_only=own_only)
    try:
        header = json.loads(metadata.get(_HEADER, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _check_header(path: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """What `write` stated in the file at `path`.

    A conversation is a file that the user names; the others are found by name in a folder,
    where another user may have put one.
    """
    header = _read_header(path, own_only=kind == _PREFIX)
    if header is None or header.get("kind") != kind:
        raise CheckpointError(f"{path} is no {kind} file of mlx-smolvlm")
    if header.get("version") != VERSION or not isinstance(header.get("values"), dict):
        raise CheckpointError(f"{path} was written by another version of mlx-smolvlm")
    if header.get("checkpoint") != checkpoint:
        raise CheckpointError(f"{path} was written with another checkpoint")
    return header


def is_plain(cache: KVCache) -> bool:
    """Whether `cache` holds every token as it was computed, as `extract_tensors` needs it."""
    return type(cache) is KVCache and cache.storage is FLOAT_STORAGE


def extract_tensors(cache: KVCache, length: int) -> dict[str, mx.array]:
    """Keys and values of the first `length` tokens, by name."""
    return {f"layer.{i}": buffer[:, :, :length] for i, buffer in enumerate(cache.arrays)}


def rebuild_cache(tensors: Mapping[str, mx.array], config: Config) -> KVCache:
    """The cache that `extract_tensors` took apart.

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
        if not mx.issubdtype(array.dtype, mx.floating):
            raise CheckpointError(f"keys and values of layer {i} are {array.dtype}, not floats")
        cache.buffers[i] = (array,)
        cache.offset = length
    return cache


def parse_content(values: Any, config: Config) -> Content:
    """The content that `serialize_content` described.

    Raises:
        CheckpointError: It describes none, or tokens that the checkpoint does not have.
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


def digest_checkpoint(folder: Path, memo: Path | None = None, adapter: Path | None = None) -> str:
    """Digest of the checkpoint's files in `folder`, without its card, which may grow.

    Hidden files are notes and leftovers, which say nothing of the model.

    Args:
        memo: A JSON file that remembers digests by name, size and time of the files, since
            reading gigabytes takes seconds; None reads them.
        adapter: The folder of its adapter, which counts as well.

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
        known: dict[str, Any] = {}
        if memo is not None:
            known = _read_memo(memo)
        found = known.get(str(folder.resolve()))
        if isinstance(found, list) and len(found) == 2 and found[0] == stamp:
            digest = str(found[1])
            if re.fullmatch("[0-9a-f]{64}", digest):  # it becomes part of the files' names
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
            known[str(folder.resolve())] = [stamp, digest]
            write_file(memo, json.dumps(known), follow_links=False)
    return digest


def _read_memo(memo: Path) -> dict[str, Any]:
    """The digests that were remembered; none if the file cannot be used."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(read_file(memo, _LARGEST_MEMO, own_only=True))
        if isinstance(values, dict):
            return values
    return {}
