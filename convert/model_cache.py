"""List and remove converted checkpoints, and list the downloads in the hub's cache."""

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
from mlx_smolvlm.checkpoint.provenance import measure_parts, read_origin
from mlx_smolvlm.checkpoint.writer import PARTIAL_SUFFIX
from mlx_smolvlm.config import DTYPE_BITS, FORMAT, FORMAT_VERSION, PARTS, Config
from mlx_smolvlm.convert.hf_config import MODEL_TYPES
from mlx_smolvlm.convert.hub import ALIASES, find_cache_folder, read_last_used
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path, lock
from mlx_smolvlm.records import read_json

CacheState = Literal["whole", "outdated", "damaged", "unfinished", "in progress"]

_LEAF = re.compile(r"[\w.-]+-(source|\d+bit)(-\w+)?-v\d+")  # the names that hub.py gives


@dataclass(frozen=True)
class CachedModel:
    """A converted checkpoint in the cache, complete or not.

    Attributes:
        name: owner/name/conversion, or local/name-hash/conversion; see `find_models`.
        path: Its folder.
        state: "outdated" has another format version, "unfinished" was left by a killed
            conversion, "in progress" is being written.
        nbytes: Size of its files in bytes.
        bits: Bits of the decoder, 16 for float; 0 unless `state` is "whole".
        parts: Bits of the weights by part, 32 for float32; where precisions are mixed, their mean
            with scales. Empty unless `state` is "whole".
        source: Hub id, or name of the local folder; empty unless `state` is "whole".
        revision: Commit on the hub; None for a local source or if unknown.
        last_used_s: When it was last loaded, in seconds since 1970; None if unknown.
    """

    name: str
    path: Path
    state: CacheState
    nbytes: int
    bits: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    source: str = ""
    revision: str | None = None
    last_used_s: float | None = None


def list_cached_models() -> list[CachedModel]:
    """List every conversion in the cache, complete or not, sorted by path."""
    models = []
    for path in sorted(find_cache_folder().glob("*/*")):
        with contextlib.suppress(OSError):  # removed by another process
            model = _describe(path)
            if model is not None:
                models.append(model)
    return models


def _describe(path: Path) -> CachedModel | None:
    """Describe the conversion in the folder `path`; None if it is not one."""
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
        _list_part_bits(path, config),
        config.source,
        None if origin is None else origin.revision,
        read_last_used(path),
    )


def _list_part_bits(folder: Path, config: Config) -> dict[str, float]:
    """Return the bits of each part of the checkpoint in `folder`; of a mixture, the mean."""
    if config.quantization.overrides:
        return {part: round(one.bits_per_weight, 1) for part, one in measure_parts(folder).items()}
    kinds = {part: getattr(config.quantization, part) for part in PARTS}
    floats = DTYPE_BITS[config.dtype]
    return {part: kind.bits if kind is not None else floats for part, kind in kinds.items()}


def measure_folder(folder: Path) -> int:
    """Return the total size of the files in `folder` in bytes; missing files count 0."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _read_version(path: Path) -> object:
    """Read the format version from config.json; None if it is not of our format."""
    try:
        values = read_json(path / CONFIG_FILE)
    except CheckpointError:
        return None
    return values.get("format_version", 0) if values.get("format") == FORMAT else None


def _has_weights(path: Path) -> bool:
    """Whether the folder `path` has a config.json or a safetensors file."""
    return (path / CONFIG_FILE).exists() or any(path.glob("*.safetensors"))


def _is_locked(folder: Path) -> bool:
    """Whether a running conversion is writing `folder`."""
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
    """Return those of `models` that `name` refers to.

    Args:
        name: Name or path of a conversion; or a hub id, an alias or owner/name@revision for all
            of its conversions.
        models: From `list_cached_models`.

    Raises:
        CheckpointError: `name` refers to none of them.
    """
    wanted = ALIASES.get(name.lower(), name).rstrip("/")
    repo, at, revision = wanted.partition("@")
    start = f"{repo}/{revision[:12]}" if at and revision else f"{wanted}/"
    path = ""
    with contextlib.suppress(OSError):  # not a valid path, but maybe a name
        path = os.path.abspath(expand_path(name))
    matches = [
        model
        for model in models
        if model.name == wanted
        or (wanted.count("/") and model.name.startswith(start))
        or os.path.abspath(model.path) == path
    ]
    if not matches:
        raise CheckpointError(
            f"there is no checkpoint '{name}' in the cache {find_cache_folder()}; "
            "`mlx-smolvlm models` lists all of them"
        )
    return matches


def remove_model(model: CachedModel) -> None:
    """Remove a conversion from the cache; of a symbolic link, only the link.

    The folder is renamed first, so that a killed removal leaves an "unfinished" folder and not a
    damaged checkpoint.

    Raises:
        CheckpointError: It is in use, is outside the cache, or cannot be removed.
    """
    path, parent = model.path, model.path.parent
    if parent.resolve().parent != find_cache_folder().resolve():
        raise CheckpointError(f"{parent} is a link out of the cache; remove its contents by hand")
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
    """Remove the folder `path`; raise BlockingIOError if it is being written."""
    with _hold_lock(path):
        hidden = path
        if not path.name.startswith("."):
            hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
            path.rename(hidden)
        shutil.rmtree(hidden)


@dataclass(frozen=True)
class FetchedModel:
    """A download in the hub's cache.

    Attributes:
        name: Its hub id.
        revision: The commit.
        path: The snapshot folder.
        nbytes: Size of its files in bytes.
        is_own: Whether it has this package's format, so that it needs no conversion.
        last_used_s: When one of its files was last opened, in seconds since 1970.
    """

    name: str
    revision: str
    path: Path
    nbytes: int
    is_own: bool
    last_used_s: float


def list_fetched_models() -> list[FetchedModel]:
    """List the downloads that can be converted or loaded, sorted by name and revision."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    models = []
    for repo in repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            path = revision.snapshot_path
            kind = _read_kind(path)
            if kind is not None:
                models.append(
                    FetchedModel(
                        repo.repo_id,
                        revision.commit_hash,
                        path,
                        revision.size_on_disk,
                        kind == FORMAT,
                        repo.last_accessed,
                    )
                )
    return sorted(models, key=lambda one: (one.name, one.revision))


def _read_kind(folder: Path) -> str | None:
    """Return `FORMAT`, the `model_type` if it can be converted, or None."""
    try:
        values = read_json(folder / "config.json")
    except CheckpointError:
        return None
    if values.get("format") == FORMAT:
        return FORMAT
    kind = values.get("model_type")
    return kind if kind in MODEL_TYPES else None
