"""Checkpoints of the family in the hub's own cache, which other programs share."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import CONFIG_FILE, read_config
from mlx_smolvlm.checkpoint.provenance import read_origin
from mlx_smolvlm.checkpoint.writer import PARTIAL_SUFFIX
from mlx_smolvlm.config import DTYPE_BITS, FORMAT, FORMAT_VERSION, PARTS, Config
from mlx_smolvlm.convert.hf_config import MODEL_TYPES
from mlx_smolvlm.convert.hub import ALIASES, find_cache_folder, read_last_used
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path, lock
from mlx_smolvlm.records import read_json

CacheState = Literal["whole", "outdated", "damaged", "unfinished", "in progress"]

_LEAF = re.compile(r"[\w.-]+-(source|\d+bit)(-\w+)?-v\d+")  # as hub.py names a conversion


@dataclass(frozen=True)
class CachedModel:
    """A converted checkpoint in the cache, or what a killed program left of one.

    Attributes:
        name: What `find` takes: owner/name/leaf, or local/name-hash/leaf.
        state: "outdated" has another format version; "unfinished" was left by a killed
            conversion, and "in progress" is written now.
        bits: Of the decoder, 16 for float; 0 if the folder cannot be read, as `parts`
            is empty then.
        parts: Bits of a weight, by part.
        revision: The hub's commit; None of a local source, or if it is not known.
        last_used_s: Seconds since 1970 when it was last loaded; None if not known.
    """

    name: str
    path: Path
    state: CacheState
    nbytes: int
    bits: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    source: str = ""
    revision: str | None = None
    last_used_s: float | None = None


def list_cached_models() -> list[CachedModel]:
    """Every conversion in the cache, whole or not, by name."""
    models = []
    for path in sorted(find_cache_folder().glob("*/*")):
        with contextlib.suppress(OSError):  # removed meanwhile
            model = _describe(path)
            if model is not None:
                models.append(model)
    return models


def _describe(path: Path) -> CachedModel | None:
    """What the folder `path` in the cache holds; None if it is nothing of ours."""
    if not path.is_dir():
        return None
    name = f"{path.parent.name.replace('--', '/', 1)}/{path.name}"
    if path.name.startswith("."):
        if not path.name.endswith(PARTIAL_SUFFIX):
            return None
        state: CacheState = "in progress" if _is_locked(path) else "unfinished"
        return CachedModel(name, path, state, measure_folder(path))
    try:
        config = read_config(path)
        read_headers(path)
    except CheckpointError:
        version = _read_version(path)
        if version is None and not (_LEAF.fullmatch(path.name) and _has_weights(path)):
            return None
        state = "damaged" if version in (None, FORMAT_VERSION) else "outdated"
        return CachedModel(name, path, state, measure_folder(path))
    text, origin = config.quantization.text, None
    with contextlib.suppress(CheckpointError):
        origin = read_origin(path)
    return CachedModel(
        name,
        path,
        "whole",
        measure_folder(path),
        16 if text is None else text.bits,
        get_part_bits(config),
        config.source,
        None if origin is None else origin.revision,
        read_last_used(path),
    )


def get_part_bits(config: Config) -> dict[str, int]:
    """Bits of a weight of each part, as most of its modules have."""
    kinds = {part: getattr(config.quantization, part) for part in PARTS}
    floats = DTYPE_BITS[config.dtype]
    return {part: kind.bits if kind is not None else floats for part, kind in kinds.items()}


def measure_folder(folder: Path) -> int:
    """Bytes of the files in `folder`; those that go away meanwhile count nothing."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _read_version(path: Path) -> object:
    """The format version that config.json states; None if it is not of our format."""
    try:
        values = read_json(path / CONFIG_FILE)
    except CheckpointError:
        return None
    return values.get("format_version", 0) if values.get("format") == FORMAT else None


def _has_weights(path: Path) -> bool:
    """Whether a file in `path` can only be a checkpoint's."""
    return (path / CONFIG_FILE).exists() or any(path.glob("*.safetensors"))


def _is_locked(folder: Path) -> bool:
    """Whether a living conversion writes `folder`."""
    try:
        with _hold_lock(folder):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; raise BlockingIOError if another process holds it."""
    descriptor = lock(folder, flags=os.O_DIRECTORY)
    try:
        yield
    finally:
        os.close(descriptor)


def find_models(name: str, models: Sequence[CachedModel]) -> list[CachedModel]:
    """Those of `models` that a user means by `name`.

    Args:
        name: A name or path of the list, or a hub id or alias for all its conversions,
            or owner/name@revision.

    Raises:
        CheckpointError: It names none of them.
    """
    wanted = ALIASES.get(name.lower(), name).rstrip("/")
    repo, at, revision = wanted.partition("@")
    start = f"{repo}/{revision[:12]}" if at and revision else f"{wanted}/"
    path = ""
    with contextlib.suppress(OSError):  # no path, but it may be a name
        path = os.path.abspath(expand_path(name))
    found = [
        model
        for model in models
        if model.name == wanted
        or (wanted.count("/") and model.name.startswith(start))
        or os.path.abspath(model.path) == path
    ]
    if not found:
        raise CheckpointError(
            f"'{name}' is no checkpoint in the cache {find_cache_folder()}; "
            "`mlx-smolvlm models` lists what there is"
        )
    return found


def remove_model(model: CachedModel) -> None:
    """Remove a conversion from the cache; of a link to another place, the link alone.

    It leaves the cache at once, so a removal that is killed leaves an unfinished folder
    and never half a checkpoint.

    Raises:
        CheckpointError: It is being written, lies elsewhere, or the disk refuses.
    """
    path, parent = model.path, model.path.parent
    if parent.resolve().parent != find_cache_folder().resolve():
        raise CheckpointError(f"{parent} is a link out of the cache; remove what it holds by hand")
    try:
        with _hold_lock(parent):
            if path.is_symlink():
                path.unlink()
            else:
                _remove_folder(path)
            with contextlib.suppress(OSError):
                parent.rmdir()
    except BlockingIOError:
        raise CheckpointError(f"{model.name} is being converted or used; try again later") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be removed: {error.strerror}") from None


def _remove_folder(path: Path) -> None:
    """Remove the folder at `path`, which nobody writes."""
    with _hold_lock(path):
        hidden = path
        if not path.name.startswith("."):
            hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
            path.rename(hidden)
        shutil.rmtree(hidden)


@dataclass(frozen=True)
class FetchedModel:
    """A checkpoint as it was fetched.

    Attributes:
        name: Its hub id.
        revision: The commit.
        is_own: Whether it has this package's format, so is used where it lies.
        last_used_s: Seconds since 1970 when a file of it was last opened.
    """

    name: str
    revision: str
    path: Path
    nbytes: int
    is_own: bool
    last_used_s: float


def list_fetched_models() -> list[FetchedModel]:
    """The fetched checkpoints that can be converted or used, by name."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            path = revision.snapshot_path
            kind = _read_kind(path)
            if kind is not None:
                found.append(
                    FetchedModel(
                        repo.repo_id,
                        revision.commit_hash,
                        path,
                        revision.size_on_disk,
                        kind == FORMAT,
                        repo.last_accessed,
                    )
                )
    return sorted(found, key=lambda one: (one.name, one.revision))


def _read_kind(folder: Path) -> str | None:
    """Our format's name, or the type of a model that can be converted; else None."""
    try:
        values = read_json(folder / "config.json")
    except CheckpointError:
        return None
    if values.get("format") == FORMAT:
        return FORMAT
    kind = values.get("model_type")
    return kind if kind in MODEL_TYPES else None
