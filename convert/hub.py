"""From what a user calls a model to a checkpoint folder of this package's format.

A checkpoint of another format is converted once, into

    <cache>/<owner>--<name>/<revision>-<precision>-v<format version>/
    <cache>/local--<name>-<hash of the path>/<hash of the files>-<precision>-v<...>/

and from then on found there, without asking the network. A checkpoint of this format
on the hub is used where the hub's own cache keeps it. The cache is
$MLX_SMOLVLM_CACHE, else $XDG_CACHE_HOME/mlx-smolvlm, else ~/.cache/mlx-smolvlm.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx_smolvlm
from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import (
    CONFIG_FILE,
    find_tokenizer,
    is_own,
    read_chat_template,
    read_config,
)
from mlx_smolvlm.config import FORMAT, FORMAT_VERSION
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import (
    check_folder,
    check_owner,
    expand_path,
    lock,
    make_private_folder,
    read_file,
    write_file,
)
from mlx_smolvlm.records import read_integer, read_json

DEMO = "demo"
BITS = (4, 8, 16)  # that a model can be converted to on first use
_USED_FILE = ".last-used"  # in a converted folder, of which the time counts
_REVISIONS_FILE = ".revisions"  # in a converted folder: what was asked for, a line each
_MAX_REVISIONS_BYTES = 1 << 16
ALIASES = {
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "smoldocling": "docling-project/SmolDocling-256M-preview",
    "granite-docling": "ibm-granite/granite-docling-258M",
}


@dataclass(frozen=True)
class ResolveOptions:
    """How a model that is not converted yet is fetched and converted.

    Attributes:
        bits: Of the decoder, one of `BITS`; None keeps the source's precision.
        offline: Never ask the network.
        progress: Called during a conversion with the bytes done, the bytes in all and
            the module at hand.
        dtype: Type of what is not quantized; None keeps the source's.

    Raises:
        ValueError: `bits` is none of `BITS`.
    """

    bits: int | None = None
    offline: bool = False
    progress: Callable[[int, int, str], None] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            bits = read_integer("bits", self.bits, lambda bits: bits in BITS, "4, 8 or 16")
            object.__setattr__(self, "bits", bits)

    @property
    def precision(self) -> str:
        """A name for the choices that change what is written."""
        bits = "source" if self.bits is None else f"{self.bits}bit"
        return bits if self.dtype is None else f"{bits}-{self.dtype}"


def resolve(model: str | Path, options: ResolveOptions | None = None) -> Path:
    """The checkpoint folder that `model` names, converted now if it never was.

    Args:
        model: "demo", an alias of `ALIASES`, a hub id (owner/name, or
            owner/name@revision), or a local folder.

    Raises:
        CheckpointError: There is no such model, it cannot be fetched, or it is not one
            that can be converted.
    """
    options = options or ResolveOptions()
    if model == DEMO:
        return Path(mlx_smolvlm.__file__).parent / DEMO
    folder = find_folder(model)
    if folder is not None:
        if read_json(folder / CONFIG_FILE).get("format") == FORMAT:
            return folder
        return _resolve_local(folder.resolve(), options)
    repo = ALIASES.get(str(model).lower(), str(model))
    if isinstance(model, Path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", repo):
        raise CheckpointError(
            f"there is no model '{model}': neither a folder, nor a hub id (owner/name), "
            f"nor one of {', '.join([DEMO, *ALIASES])}"
        )
    return _resolve_remote(repo, options)


def find_folder(name: str | Path) -> Path | None:
    """The folder that `name` is the path of; None if there is none."""
    try:
        folder = expand_path(name)
        return folder if str(name) and folder.is_dir() else None
    except OSError:  # no such home, or no name that a file can have
        return None


def _resolve_local(folder: Path, options: ResolveOptions) -> Path:
    """The converted form of the checkpoint in the local `folder`, as it is now."""
    stamp = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja"):
            stat = path.stat()
            stamp.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    parent = find_cache_folder() / f"local--{folder.name}-{place}"
    dest = parent / _name_folder(stamp.hexdigest()[:12], options)
    with _hold_lock(parent):
        if not _is_usable(dest):
            _convert(folder, dest, options)
            for old in parent.glob(f"*{dest.name[12:]}"):  # of the folder as it was
                if old != dest:
                    shutil.rmtree(old, ignore_errors=True)
        _mark_used(dest)
    return dest


def _resolve_remote(repo: str, options: ResolveOptions) -> Path:
    """The converted form of the hub's `repo`, owner/name or owner/name@revision."""
    name, _, revision = repo.partition("@")
    parent = find_cache_folder() / name.replace("/", "--")
    with _hold_lock(parent):
        if re.fullmatch("[0-9a-f]{40}", revision):  # a commit, of which folders have the name
            found = [parent / _name_folder(revision[:12], options)]
        else:
            paths = parent.glob(_name_folder("*", options))
            found = [path for path in paths if revision in _read_revisions(path)]
        found = [path for path in found if _is_usable(path)]
        if found:
            dest = max(found, key=lambda path: (path / CONFIG_FILE).stat().st_mtime)
        else:
            snapshot = _fetch(name, revision or None, options)
            if is_own(snapshot):
                return snapshot
            dest = parent / _name_folder(snapshot.name[:12], options)
            if not _is_usable(dest):
                _convert(name, dest, options, snapshot)
        _note_revision(dest, revision)
        _mark_used(dest)
    return dest


def _read_revisions(folder: Path) -> list[str]:
    """The revisions that led to the converted `folder`, "" for the repository's newest.

    A folder's name tells its commit, but not which branch or tag that commit was.
    """
    try:
        return read_file(folder / _REVISIONS_FILE, _MAX_REVISIONS_BYTES).decode().split("\n")
    except (OSError, ValueError):
        return []


def _note_revision(folder: Path, revision: str) -> None:
    """Note that `revision` led to the converted `folder`, if it can be written."""
    known = _read_revisions(folder)
    if revision not in known:
        with contextlib.suppress(OSError):
            text = "\n".join([*known, revision])
            write_file(folder / _REVISIONS_FILE, text, follow_links=False)


def _fetch(repo: str, revision: str | None, options: ResolveOptions) -> Path:
    """The folder with the hub's `repo`; of our format, the network is not asked a second time."""
    from mlx_smolvlm.convert.source import download

    if not options.offline:
        with contextlib.suppress(CheckpointError):
            snapshot = download(repo, True, revision)
            if is_own(snapshot) and _is_whole(snapshot):
                return snapshot
    return download(repo, options.offline, revision)


def _mark_used(folder: Path) -> None:
    """Note that the converted `folder` is used now; a cache that is only read goes without."""
    with contextlib.suppress(OSError):
        (folder / _USED_FILE).touch()


def read_last_used(folder: Path) -> float | None:
    """When the converted `folder` was last used, in seconds since 1970; None if not known."""
    try:
        return (folder / _USED_FILE).stat().st_mtime
    except OSError:
        return None


def _name_folder(revision: str, options: ResolveOptions) -> str:
    """Name of a converted folder below its model's."""
    return f"{revision}-{options.precision}-v{FORMAT_VERSION}"


def _convert(
    source: str | Path, dest: Path, options: ResolveOptions, snapshot: Path | None = None
) -> None:
    """Write `source`, already in the folder `snapshot` if it is a hub id, to `dest`."""
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import plan_checkpoint, write_checkpoint
    from mlx_smolvlm.convert.source import open_snapshot, open_source

    opened = open_source(source) if snapshot is None else open_snapshot(snapshot, str(source))
    plan = plan_checkpoint(opened, ConvertOptions(bits=options.bits, dtype=options.dtype))
    write_checkpoint(plan, dest, options.progress, force=False)


def _is_usable(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint; a damaged one is removed.

    Raises:
        CheckpointError: Another user owns it or a file in it, or can write to it.
    """
    if not folder.is_dir():
        return False
    try:
        check_folder(folder)
        for path in folder.iterdir():
            check_owner(path.lstat(), path)
    except OSError as error:
        raise CheckpointError(
            f"the cached model {folder} is not used ({error.filename}: {error.strerror}); set "
            "MLX_SMOLVLM_CACHE to another folder, or, if you trust it, give this folder as the "
            "model"
        ) from None
    if _is_whole(folder):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint in `folder` is there, as far as headers tell."""
    try:
        read_config(folder)
        read_headers(folder)
        find_tokenizer(folder)
        read_chat_template(folder)
    except CheckpointError:
        return False
    return True


def find_cache_folder() -> Path:
    """Where converted checkpoints are kept; it may not exist yet.

    Raises:
        CheckpointError: No home directory is known to keep them in.
    """
    own, general = os.environ.get("MLX_SMOLVLM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return expand_path(own) if own else expand_path(general or "~/.cache") / "mlx-smolvlm"
    except OSError as error:
        raise CheckpointError(
            f"the cache {error.filename} cannot be used ({error.strerror}); set MLX_SMOLVLM_CACHE "
            "to another folder"
        ) from None


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a model's `folder` in the cache; a second process waits here."""
    try:
        descriptor = _take_lock(folder)
    except OSError as error:
        raise CheckpointError(
            f"the cache {folder.parent} cannot be used ({error.strerror}); "
            "set MLX_SMOLVLM_CACHE to another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # left empty by a failure
        os.close(descriptor)


def _take_lock(folder: Path) -> int:
    """The descriptor that holds the lock of `folder`, which is made if need be."""
    while True:
        make_private_folder(folder)
        descriptor = lock(folder, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == folder.stat().st_ino:  # not removed while waiting
                return descriptor
        os.close(descriptor)
