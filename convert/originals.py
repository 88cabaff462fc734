"""Checkpoints of the family in the hub's own cache, which other programs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.config import FORMAT
from mlx_smolvlm.convert.settings import MODEL_TYPES
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.json_files import read_json


@dataclass(frozen=True)
class Original:
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


def list_originals() -> list[Original]:
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
            kind = _kind(path)
            if kind is not None:
                found.append(
                    Original(
                        repo.repo_id,
                        revision.commit_hash,
                        path,
                        revision.size_on_disk,
                        kind == FORMAT,
                        repo.last_accessed,
                    )
                )
    return sorted(found, key=lambda one: (one.name, one.revision))


def _kind(folder: Path) -> str | None:
    """Our format's name, or the type of a model that can be converted; else None."""
    try:
        values = read_json(folder / "config.json")
    except CheckpointError:
        return None
    if values.get("format") == FORMAT:
        return FORMAT
    kind = values.get("model_type")
    return kind if kind in MODEL_TYPES else None
