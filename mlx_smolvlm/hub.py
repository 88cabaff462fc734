"""From what a user calls a model to a checkpoint folder of this package's format.

A checkpoint of another format is converted once, into

    <cache>/<owner>--<name>/<revision>-<precision>-v<format version>/
    <cache>/local--<name>-<hash of the path>/<hash of the files>-<precision>-v<...>/

and from then on found there, without asking the network. The cache is
$MLX_SMOLVLM_CACHE, else $XDG_CACHE_HOME/mlx-smolvlm, else ~/.cache/mlx-smolvlm.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.checkpoint import CONFIG_FILE, read_config
from mlx_smolvlm.config import FORMAT, FORMAT_VERSION
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.safetensors import read_headers, read_json

DEMO = "demo"
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
        bits: Of the decoder, see `ConvertOptions`; None keeps the source's precision.
        offline: Never ask the network.
        progress: Called during a conversion with the bytes done, the bytes in all and
            the module at hand.
        dtype: Type of what is not quantized; None keeps the source's.
    """

    bits: int | None = None
    offline: bool = False
    progress: Callable[[int, int, str], None] | None = None
    dtype: str | None = None

    @property
    def precision(self) -> str:
        """A name for the choices that change what is written."""
        bits = "source" if self.bits is None else f"{self.bits}bit"
        return bits if self.dtype is None else f"{bits}-{self.dtype}"


@dataclass(frozen=True)
class CachedModel:
    """A converted checkpoint in the cache; `bits` of the decoder is 16 for float."""

    name: str
    path: Path
    bits: int
    nbytes: int
    source: str


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
        return Path(__file__).parent / DEMO
    folder = Path(model).expanduser()
    if folder.is_dir() and str(model):
        if read_json(folder / CONFIG_FILE).get("format") == FORMAT:
            return folder
        return _local(folder.resolve(), options)
    repo = ALIASES.get(str(model).lower(), str(model))
    if isinstance(model, Path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", repo):
        raise CheckpointError(
            f"there is no model '{model}': neither a folder, nor a hub id (owner/name), "
            f"nor one of {', '.join([DEMO, *ALIASES])}"
        )
    return _remote(repo, options)


def _local(folder: Path, options: ResolveOptions) -> Path:
    """The converted form of the checkpoint in the local `folder`, as it is now."""
    stamp = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja"):
            stat = path.stat()
            stamp.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    parent = cache_folder() / f"local--{folder.name}-{place}"
    dest = parent / _leaf(stamp.hexdigest()[:12], options)
    with _locked(parent):
        if not _usable(dest):
            _convert(folder, dest, options)
            for old in parent.glob(f"*{dest.name[12:]}"):  # of the folder as it was
                if old != dest:
                    shutil.rmtree(old, ignore_errors=True)
    return dest


def _remote(repo: str, options: ResolveOptions) -> Path:
    """The converted form of the hub's `repo`, owner/name or owner/name@revision."""
    name, _, revision = repo.partition("@")
    parent = cache_folder() / name.replace("/", "--")
    with _locked(parent):
        found = [path for path in parent.glob(_leaf(f"{revision[:12]}*", options)) if _usable(path)]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
        from mlx_smolvlm.convert.source import download

        snapshot = download(name, options.offline, revision or None)
        dest = parent / _leaf(snapshot.name[:12], options)
        if not _usable(dest):
            _convert(name, dest, options, snapshot)
    return dest


def _leaf(revision: str, options: ResolveOptions) -> str:
    """Name of a converted folder below its model's."""
    return f"{revision}-{options.precision}-v{FORMAT_VERSION}"


def _convert(
    source: str | Path, dest: Path, options: ResolveOptions, snapshot: Path | None = None
) -> None:
    """Write `source`, already in the folder `snapshot` if it is a hub id, to `dest`."""
    from mlx_smolvlm.convert.quantize import ConvertOptions
    from mlx_smolvlm.convert.run import plan_checkpoint, write_checkpoint
    from mlx_smolvlm.convert.source import Source, open_source

    opened = open_source(source) if snapshot is None else Source(snapshot, str(source)).checked()
    plan = plan_checkpoint(opened, ConvertOptions(bits=options.bits, dtype=options.dtype))
    write_checkpoint(plan, dest, options.progress, force=False)


def _usable(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint; a damaged one is removed."""
    if not folder.is_dir():
        return False
    try:
        read_config(folder)
        read_headers(folder)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def cache_folder() -> Path:
    """Where converted checkpoints are kept; it may not exist yet."""
    own, general = os.environ.get("MLX_SMOLVLM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(general) if general else Path.home() / ".cache") / "mlx-smolvlm"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a model's `folder` in the cache; a second process waits here."""
    try:
        lock = _lock(folder)
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
        os.close(lock)


def _lock(folder: Path) -> int:
    """The descriptor that holds the lock of `folder`, which is made if need be."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == folder.stat().st_ino:  # not removed while waiting
                return lock
        os.close(lock)


def list_cached() -> list[CachedModel]:
    """Every converted checkpoint in the cache, by name."""
    models = []
    for path in sorted(cache_folder().glob("*/*")):
        if path.name.startswith(".") or not path.is_dir():
            continue
        with contextlib.suppress(CheckpointError):
            config = read_config(path)
            text = config.quantization.text
            nbytes = sum(file.stat().st_size for file in path.iterdir())
            name = f"{path.parent.name.replace('--', '/', 1)} ({path.name})"
            bits = 16 if text is None else text.bits
            models.append(CachedModel(name, path, bits, nbytes, config.source))
    return models
