"""Where weights come from: a folder of the Hugging Face layout, local or fetched from the hub.

A GGUF file becomes such a folder, which lives as long as its `Source`.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.checkpoint import CONFIG_FILE, is_own, read_config
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.offline import is_offline
from mlx_smolvlm.safetensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    read_header,
    read_headers,
)
from mlx_smolvlm.staging import make_temporary

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "SHA256SUMS")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READ = (".json", ".safetensors", ".jinja")  # suffixes of what a conversion reads


@dataclass(frozen=True)
class Source:
    """A folder to convert.

    Attributes:
        name: Its hub id or the folder's name.
        revision: The commit on the hub that the folder holds; None of a local one.
    """

    folder: Path
    name: str
    revision: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether it has this package's format, as what `mlx-smolvlm train` wrote."""
        return is_own(self.folder)

    def checked(self) -> Source:
        """Itself, if it has a config.json and, where its format is ours, weights in floats.

        Raises:
            CheckpointError: It has none, or its weights are quantized already.
        """
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is no checkpoint: it has no {CONFIG_FILE}")
        if self.is_own and read_config(self.folder).quantization.is_quantized:
            raise CheckpointError(
                f"{self.folder} is already a quantized mlx-smolvlm checkpoint; convert its source "
                "again for another precision"
            )
        return self

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of change of every file that a conversion reads, by name.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        return file_stamps(self.folder)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, by its name in the source; no weight is read.

        Raises:
            CheckpointError: The safetensors files are absent, incomplete or damaged.
        """
        single, index = self.folder / WEIGHTS_FILE, self.folder / INDEX_FILE
        if single.is_file():
            return read_header(single)
        if index.is_file():
            return read_headers(self.folder)
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


def file_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in ns of the files in `folder` that a conversion reads.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in READ)
        stats = [(path.name, path.stat()) for path in paths if path.exists()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats}


def open_source(source: str | Path, offline: bool = False) -> Source:
    """The folder that `source` names, downloaded first if it is a hub id.

    Args:
        source: A local folder, a GGUF file, or a hub id such as
            "HuggingFaceTB/SmolVLM-256M-Instruct".
        offline: Take a hub id from the local cache alone.

    Raises:
        CheckpointError: There is no such folder or repository, it cannot be reached, or
            it is no checkpoint.
    """
    folder = expand_path(source, CheckpointError)
    if folder.is_dir():
        return Source(folder, folder.resolve().name).checked()
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
    return from_snapshot(download(source, offline), source).checked()


def from_snapshot(folder: Path, repo: str) -> Source:
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
            source = Source(folder, path.stem).checked()
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
