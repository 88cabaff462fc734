"""Where weights come from: a folder of the Hugging Face layout, local or fetched from the hub.

A `Source` keeps what was read of it, so that each file is opened and parsed once, however many
times a conversion is planned. A GGUF file becomes such a folder, which lives as long as its
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
READ_SUFFIXES = (".json", ".safetensors", ".jinja")  # suffixes of what a conversion reads


@dataclass(frozen=True)
class Source:
    """A folder to convert, and what was read of it.

    Attributes:
        name: Its hub id or the folder's name.
        revision: The commit on the hub that the folder holds; None of a local one.
        stamps: Size in bytes and time of change of every file that a conversion reads, by name,
            taken before the first of them is read.

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
            raise CheckpointError(f"{self.folder} is no checkpoint: it has no {CONFIG_FILE}")

    def has(self, name: str) -> bool:
        """Whether there is a file `name`."""
        return (self.folder / name).is_file()

    def read_text(self, name: str, max_bytes: int = MAX_JSON) -> str:
        """The text of the file `name`; errors as `read_text`."""
        if name not in self._texts:
            self._texts[name] = read_text(self.folder / name, max_bytes)
        return self._texts[name]

    def read_json(self, name: str, max_bytes: int = MAX_JSON) -> dict[str, Any]:
        """The JSON object in the file `name`, not to be modified; errors as `read_json`."""
        if name not in self._values:
            self._values[name] = parse_json(self.read_text(name, max_bytes), self.folder / name)
        values: dict[str, Any] = self._values[name]
        return values

    @cached_property
    def is_own(self) -> bool:
        """Whether it has this package's format, as what `mlx-smolvlm train` wrote."""
        try:
            return self.read_json(CONFIG_FILE).get("format") == FORMAT
        except CheckpointError:
            return False

    @cached_property
    def weights(self) -> WeightFiles:
        """Its tensors, none of which is read yet.

        Raises:
            CheckpointError: The safetensors files are absent, incomplete or damaged.
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
        """Refuse a source whose files changed, so that what was read may be of two versions.

        Raises:
            CheckpointError: It names the files.
        """
        now, then = read_stamps(self.folder), self.stamps
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if changed:
            raise CheckpointError(
                f"{self.folder} changed while it was read ({', '.join(changed)}); convert it again"
            )


def read_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in ns of the files in `folder` that a conversion reads.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in READ_SUFFIXES)
        stats = [(path.name, path.stat()) for path in paths if path.exists()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats}


def open_source(source: str | Path | Source, offline: bool = False) -> Source:
    """The folder that `source` names, downloaded first if it is a hub id.

    Args:
        source: A local folder, a GGUF file, or a hub id such as
            "HuggingFaceTB/SmolVLM-256M-Instruct". A `Source` is returned unchanged.
        offline: Take a hub id from the local cache alone.

    Raises:
        CheckpointError: There is no such folder or repository, it cannot be reached, or
            it is no checkpoint.
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
                f"{folder} is no safetensors checkpoint, and no other format is read; "
                "give a folder with config.json and safetensors files"
            )
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder")
    if isinstance(source, Path) or not is_hub_id(source):
        raise CheckpointError(f"there is no folder '{source}', and it is no hub id (owner/name)")
    return open_snapshot(download(source, offline), source)


def open_snapshot(folder: Path, repo: str) -> Source:
    """The hub's `repo` as it lies in the hub cache's `folder`, which is named after the commit."""
    is_commit = re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None
    return Source(folder, repo, folder.name if is_commit else None)


def _open_gguf(path: Path) -> Source:
    """The GGUF file `path` as a folder, which goes when the source is used no longer."""
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
    """The local snapshot folder of the hub repository `repo`, fetched where needed.

    Raises:
        CheckpointError: The repository is unknown, private or gated, the network fails,
            or `offline` and it has not been fetched before.
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
        reason = "this is no valid repository id"
    except Exception as error:  # the HTTP library, and so its errors, differ between hub versions
        reason = f"the download failed: {(str(error).splitlines() or [repr(error)])[0]}"
    raise CheckpointError(f"{repo}: {reason}")
