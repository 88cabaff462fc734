"""Open a checkpoint to convert: a local folder, a hub id, or a GGUF file.

A `Source` keeps the files that it has read, so that each is opened and parsed once, even if several
conversions are planned. A GGUF file is unpacked into a temporary folder, which is removed with its
`Source`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint.headers import (
    INDEX_FILE,
    WEIGHTS_FILE,
    WeightFiles,
)
from mlx_smolvlm.checkpoint.load import CONFIG_FILE
from mlx_smolvlm.checkpoint.writer import make_temporary
from mlx_smolvlm.config import FORMAT
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.media.fetch import is_offline
from mlx_smolvlm.records import MAX_JSON, parse_json, read_text

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "SHA256SUMS")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READ_SUFFIXES = (".json", ".safetensors", ".jinja")  # of files that a conversion reads


@dataclass(frozen=True)
class Source:
    """A folder to convert, with a cache of the files that were read.

    Attributes:
        folder: A folder in the Hugging Face layout, or of this package's format.
        name: Hub id, or name of a local folder.
        revision: Commit on the hub; None for a local folder.
        stamps: Size in bytes and modification time in ns of every file that a conversion reads, by
            name, before any of them is read.

    Raises:
        CheckpointError: The folder cannot be read, or has no config.json.
    """

    folder: Path
    name: str
    revision: str | None = None
    stamps: Mapping[str, tuple[int, int]] = field(init=False, repr=False, compare=False)
    _texts: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _values: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", read_stamps(self.folder))
        if not self.has(CONFIG_FILE):
            raise CheckpointError(f"{self.folder} is not a checkpoint: it has no {CONFIG_FILE}")

    def has(self, name: str) -> bool:
        """Whether the folder has a file `name`."""
        return (self.folder / name).is_file()

    def read_text(self, name: str, max_bytes: int = MAX_JSON) -> str:
        """Read the text file `name`; errors as in `records.read_text`."""
        if name not in self._texts:
            self._texts[name] = read_text(self.folder / name, max_bytes)
        return self._texts[name]

    def read_json(self, name: str, max_bytes: int = MAX_JSON) -> dict[str, Any]:
        """Read the JSON object in the file `name`. Do not modify it.

        Raises:
            CheckpointError: As in `records.read_json`.
        """
        if name not in self._values:
            self._values[name] = parse_json(self.read_text(name, max_bytes), self.folder / name)
        values: dict[str, Any] = self._values[name]
        return values

    @cached_property
    def is_own(self) -> bool:
        """Whether the checkpoint has this package's format, such as one that was trained."""
        try:
            return self.read_json(CONFIG_FILE).get("format") == FORMAT
        except CheckpointError:
            return False

    @cached_property
    def weights(self) -> WeightFiles:
        """The open safetensors files; only their headers have been read.

        Raises:
            CheckpointError: The safetensors files are missing, incomplete or damaged.
        """
        if (self.folder / WEIGHTS_FILE).is_file() or (self.folder / INDEX_FILE).is_file():
            return WeightFiles(self.folder)
        for pattern in PICKLES:
            for path in sorted(self.folder.glob(pattern)):
                raise CheckpointError(
                    f"{self.folder} has only pickled weights ({path.name}), which can run code "
                    "when they are read: refused, ask its author for safetensors"
                )
        raise CheckpointError(
            f"{self.folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; other formats, such as "
            "pickled weights and GGUF, are not read"
        )

    def check_unchanged(self) -> None:
        """Check that no file changed since the source was opened.

        Raises:
            CheckpointError: Files changed, so different versions may have been mixed.
        """
        now, then = read_stamps(self.folder), self.stamps
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if changed:
            raise CheckpointError(
                f"{self.folder} changed while it was read ({', '.join(changed)}); convert it again"
            )


def read_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and modification time in ns of files that a conversion reads.

    Raises:
        CheckpointError: `folder` cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in READ_SUFFIXES)
        stats = [(path.name, path.stat()) for path in paths if path.exists()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats}


def open_source(source: str | Path | Source, offline: bool = False) -> Source:
    """Open a checkpoint to convert, downloading it first if `source` is a hub id.

    Args:
        source: A local folder, a GGUF file, or a hub id such as
            "HuggingFaceTB/SmolVLM-256M-Instruct". A `Source` is returned unchanged.
        offline: Look up hub ids in the local cache only.

    Raises:
        CheckpointError: There is no such folder or repository, it cannot be reached, or it is not
            a checkpoint.
    """
    if isinstance(source, Source):
        return source
    folder = expand_path(source, CheckpointError)
    if folder.is_dir():
        return Source(folder, folder.resolve().name)
    if folder.is_file() and folder.suffix == ".gguf":
        return _open_gguf(folder)
    if folder.exists():
        if any(folder.match(pattern) for pattern in PICKLES):
            raise CheckpointError(
                f"{folder} is not a safetensors checkpoint, and no other format is read; "
                "give a folder with config.json and safetensors files"
            )
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder")
    if isinstance(source, Path) or not is_hub_id(source):
        raise CheckpointError(f"there is no folder '{source}', and it is not a hub id (owner/name)")
    return open_snapshot(download(source, offline), source)


def open_snapshot(folder: Path, repo: str) -> Source:
    """Open the hub's `repo`, which is in the hub cache's `folder`, named after the commit."""
    is_commit = re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None
    return Source(folder, repo, folder.name if is_commit else None)


def _open_gguf(path: Path) -> Source:
    """Unpack the GGUF file `path` into a temporary folder, removed with the returned `Source`."""
    from mlx_smolvlm.convert.gguf import unpack_gguf

    try:
        folder, remove = make_temporary()
        try:
            unpack_gguf(path, folder)
            source = Source(folder, path.stem)
        except BaseException:
            remove()
            raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be unpacked into the temporary directory: "
            f"{error.strerror or error}; make room there, or set TMPDIR to another folder"
        ) from None
    weakref.finalize(source, remove)
    return source


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) is not None


def download(repo: str, offline: bool = False, revision: str | None = None) -> Path:
    """Download the hub repository `repo` if needed and return its local snapshot folder.

    Raises:
        CheckpointError: The repository is unknown, private or gated, the network fails, or
            `offline` is set and the repository is not in the local cache.
    """
    from huggingface_hub import errors, snapshot_download

    offline = is_offline(offline)
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(PATTERNS),
                local_files_only=offline,
            )
        )
    except errors.GatedRepoError:
        reason = "its owner asks for a login: accept the terms on its page, then `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private: `hf auth login`"
    except errors.LocalEntryNotFoundError:
        reason = (
            "it is not in the local cache, and offline was asked for"
            if offline
            else "it is not in the local cache, and the hub cannot be reached"
        )
    except errors.HFValidationError:
        reason = "this is not a valid repository id"
    except Exception as error:  # its HTTP library differs between versions, and so do the errors
        reason = f"the download failed: {(str(error).splitlines() or [repr(error)])[0]}"
    raise CheckpointError(f"{repo}: {reason}")
