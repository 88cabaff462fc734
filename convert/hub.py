"""Find or make the checkpoint folder for a model name, hub id or path.

A checkpoint of another format is converted once, into

    <cache>/<owner>--<name>/<revision>-<precision>-v<format version>/
    <cache>/local--<name>-<hash of the path>/<hash of the files>-<precision>-v<...>/

and later found there without network access. A checkpoint of this format on the hub is used from
the hub's own cache. The cache is $MLX_SMOLVLM_CACHE, else $XDG_CACHE_HOME/mlx-smolvlm, else
~/.cache/mlx-smolvlm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import (
    CONFIG_FILE,
    find_tokenizer,
    is_own,
    read_chat_template,
    read_config,
)
from mlx_smolvlm.config import DEMO_FOLDER, FORMAT, FORMAT_VERSION
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import (
    check_folder,
    check_owner,
    expand_path,
    locate_cache,
    lock,
    make_private_folder,
    read_file,
    write_file,
)
from mlx_smolvlm.generate.memory_plan import Machine
from mlx_smolvlm.records import read_integer, read_json

if TYPE_CHECKING:
    from mlx_smolvlm.convert.source import Source

DEMO = "demo"
BITS = (16, 8, 4)  # for conversions on first use
_USED_FILE = ".last-used"  # in a converted folder; its modification time counts
_REVISIONS_FILE = ".revisions"  # in a converted folder: the requested revisions, one per line
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
    """How to fetch and convert a model that is not in the cache.

    Attributes:
        bits: Bits of the decoder, 4, 8 or 16; None keeps the source's precision.
        offline: Never use the network.
        progress: Called during a conversion with the bytes done, the total bytes and the path of
            the current module.
        dtype: Type of weights that are not quantized; None keeps the source's.
        machine: If `bits` is None, convert to 8 or 4 bits what takes more than half of its memory
            at 16, with a warning; None converts to the source's precision whatever it takes.

    Raises:
        ValueError: `bits` is none of 4, 8 and 16.
    """

    bits: int | None = None
    offline: bool = False
    progress: Callable[[int, int, str], None] | None = None
    dtype: str | None = None
    machine: Machine | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            bits = read_integer("bits", self.bits, lambda bits: bits in BITS, "4, 8 or 16")
            object.__setattr__(self, "bits", bits)

    @property
    def precision(self) -> str:
        """Name of the options that change the converted weights, such as "4bit-float16"."""
        bits = "source" if self.bits is None else f"{self.bits}bit"
        return bits if self.dtype is None else f"{bits}-{self.dtype}"


def resolve(model: str | Path, options: ResolveOptions | None = None) -> Path:
    """Return the checkpoint folder of `model`, converting it first if needed.

    Args:
        model: "demo", an alias of `ALIASES`, a hub id (owner/name or owner/name@revision), or a
            local folder.
        options: How to fetch and convert it; None is `ResolveOptions()`.

    Raises:
        CheckpointError: The model does not exist, or cannot be fetched or converted.
    """
    options = options or ResolveOptions()
    if model == DEMO:
        return DEMO_FOLDER
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


def shorten_source(source: str) -> str:
    """Return the alias of the hub id `source`; another source unchanged."""
    return next((alias for alias, repo in ALIASES.items() if repo == source), source)


def describe_demo(advice: str) -> str:
    """Return one line that says what the demo knows, and what to use for photographs.

    Args:
        advice: How to use another model, with {} for its name.
    """
    name, download, answer = _describe_photo_model()
    return (
        "the demo knows drawn shapes, print, charts and pages only; photographs: "
        f"{advice.format(name)} ({download / 1e9:.1f} GB download, {answer / 1e9:.1f} GB memory)"
    )


@functools.cache
def _describe_photo_model() -> tuple[str, int, int]:
    """Return the model for photographs, its download and an answer's memory here, in bytes."""
    from mlx_smolvlm.convert.catalog import MODELS, PHOTO_MODEL
    from mlx_smolvlm.convert.fit import choose_bits
    from mlx_smolvlm.generate.memory_plan import find_machine

    model = MODELS[PHOTO_MODEL]
    suited = choose_bits(model.config, find_machine())
    return PHOTO_MODEL, model.download_bytes, suited.answer_bytes


def find_folder(name: str | Path) -> Path | None:
    """Return the path of the folder `name`; None if it does not exist."""
    try:
        folder = expand_path(name)
        return folder if str(name) and folder.is_dir() else None
    except OSError:  # no such home directory, or not a valid path
        return None


def _resolve_local(folder: Path, options: ResolveOptions) -> Path:
    """Find or make the conversion of the current files in the local `folder`."""
    from mlx_smolvlm.convert.source import open_source

    files_hash = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja"):
            stat = path.stat()
            files_hash.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    path_hash = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    parent = find_cache_folder() / f"local--{folder.name}-{path_hash}"
    name = files_hash.hexdigest()[:12]
    with _hold_lock(parent):
        dest = _find_converted(options, lambda one: [parent / _name_folder(name, one)])
        if dest is None:
            source = open_source(folder)
            options = _choose_precision(source, options)
            dest = parent / _name_folder(name, options)
            _convert(source, dest, options)
            for old in parent.glob(f"*{dest.name[12:]}"):  # of earlier versions of the files
                if old != dest:
                    shutil.rmtree(old, ignore_errors=True)
        _mark_used(dest)
    return dest


def _resolve_remote(repo: str, options: ResolveOptions) -> Path:
    """Find or make the conversion of the hub's `repo`, owner/name or owner/name@revision."""
    from mlx_smolvlm.convert.source import open_snapshot

    name, _, revision = repo.partition("@")
    parent = find_cache_folder() / name.replace("/", "--")

    def list_folders(options: ResolveOptions) -> list[Path]:
        if re.fullmatch("[0-9a-f]{40}", revision):  # a commit, which names its folder
            return [parent / _name_folder(revision[:12], options)]
        paths = parent.glob(_name_folder("*", options))
        return [path for path in paths if revision in _read_revisions(path)]

    with _hold_lock(parent):
        dest = _find_converted(options, list_folders)
        if dest is None:
            snapshot = _fetch(name, revision or None, options)
            if is_own(snapshot):
                return snapshot
            source = open_snapshot(snapshot, name)
            options = _choose_precision(source, options)
            dest = parent / _name_folder(snapshot.name[:12], options)
            if not _is_usable(dest):
                _convert(source, dest, options)
        _note_revision(dest, revision)
        _mark_used(dest)
    return dest


def _find_converted(
    options: ResolveOptions, list_folders: Callable[[ResolveOptions], list[Path]]
) -> Path | None:
    """Return the newest conversion that `options` ask for; None if there is none.

    Args:
        options: Without `bits`, a conversion to fewer bits that was chosen for this machine counts
            too.
        list_folders: Lists the folders that a conversion with these options may be in.
    """
    newest = _find_newest(list_folders(options))
    if newest is not None or options.bits is not None or options.machine is None:
        return newest
    from mlx_smolvlm.convert.fit import choose_bits

    for bits in BITS[1:]:
        newest = _find_newest(list_folders(replace(options, bits=bits)))
        if newest is not None and choose_bits(read_config(newest), options.machine).bits == bits:
            return newest
    return None


def _find_newest(folders: list[Path]) -> Path | None:
    """Return the usable one of `folders` that was written last; None if there is none."""
    usable = [folder for folder in folders if _is_usable(folder)]
    return max(usable, key=lambda one: (one / CONFIG_FILE).stat().st_mtime, default=None)


def _choose_precision(source: Source, options: ResolveOptions) -> ResolveOptions:
    """Return `options`, with the bits that suit `options.machine` if these are fewer than 16.

    A warning then says why.
    """
    from mlx_smolvlm.convert.fit import choose_bits
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import plan_checkpoint

    machine = options.machine
    if options.bits is not None or machine is None or machine.memory is None:
        return options
    config = plan_checkpoint(source, ConvertOptions(dtype=options.dtype)).config
    choice = choose_bits(config, machine)
    if config.quantization.is_quantized or choice.bits == BITS[0]:
        return options
    warnings.warn(
        f"{source.name} is converted to {choice.bits} bits, since an answer at 16 would take about "
        f"{choice.float_bytes / 1e9:.1f} GB, more than half of this machine's "
        f"{machine.memory / 1e9:.1f} GB; bits=16 (--bits 16) keeps full precision",
        SmolVLMWarning,
        stacklevel=6,
    )
    return replace(options, bits=choice.bits)


def _read_revisions(folder: Path) -> list[str]:
    """Read the revisions that the converted `folder` was requested by; "" is the default branch.

    The folder's name contains the commit, but no branch or tag.
    """
    try:
        return read_file(folder / _REVISIONS_FILE, _MAX_REVISIONS_BYTES).decode().split("\n")
    except (OSError, ValueError):
        return []


def _note_revision(folder: Path, revision: str) -> None:
    """Record that the converted `folder` was requested as `revision`, if it is writable."""
    revisions = _read_revisions(folder)
    if revision not in revisions:
        with contextlib.suppress(OSError):
            text = "\n".join([*revisions, revision])
            write_file(folder / _REVISIONS_FILE, text, follow_links=False)


def _fetch(repo: str, revision: str | None, options: ResolveOptions) -> Path:
    """Download the hub's `repo`, unless it is in the hub's cache, complete and of our format."""
    from mlx_smolvlm.convert.source import download

    if not options.offline:
        with contextlib.suppress(CheckpointError):
            snapshot = download(repo, True, revision)
            if is_own(snapshot) and _is_complete(snapshot):
                return snapshot
    return download(repo, options.offline, revision)


def _mark_used(folder: Path) -> None:
    """Record that the converted `folder` is used now, if it is writable."""
    with contextlib.suppress(OSError):
        (folder / _USED_FILE).touch()


def read_last_used(folder: Path) -> float | None:
    """Return when the converted `folder` was last used, in seconds since 1970; None if unknown."""
    try:
        return (folder / _USED_FILE).stat().st_mtime
    except OSError:
        return None


def find_last_used() -> Path | None:
    """Return the conversion in the cache that was used last, which it then is again.

    Damaged ones, and those that others may have changed, do not count; nothing is removed.

    Returns:
        Its folder; None if there is none.
    """
    stamps: dict[Path, float] = {}
    with contextlib.suppress(CheckpointError, OSError):
        for folder in find_cache_folder().glob("*/[!.]*"):
            stamp = read_last_used(folder)
            if stamp is not None:
                stamps[folder] = stamp
    for folder in sorted(stamps, key=lambda one: (-stamps[one], one)):
        with contextlib.suppress(OSError):
            _check_owners(folder)
            if _is_complete(folder):
                _mark_used(folder)
                return folder
    return None


def _name_folder(revision: str, options: ResolveOptions) -> str:
    """Return the name of a converted folder inside its model's folder."""
    return f"{revision}-{options.precision}-v{FORMAT_VERSION}"


def _convert(source: Source, dest: Path, options: ResolveOptions) -> None:
    """Convert `source` to `dest`."""
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import plan_checkpoint, write_checkpoint

    plan = plan_checkpoint(source, ConvertOptions(bits=options.bits, dtype=options.dtype))
    write_checkpoint(plan, dest, options.progress, force=False)


def _is_usable(folder: Path) -> bool:
    """Whether `folder` holds a complete checkpoint; an incomplete one is removed.

    Raises:
        CheckpointError: Another user owns the folder or a file in it, or can write to it.
    """
    if not folder.is_dir():
        return False
    try:
        _check_owners(folder)
    except OSError as error:
        raise CheckpointError(
            f"the cached model {folder} is not used ({error.filename}: {error.strerror}); set "
            "MLX_SMOLVLM_CACHE to another folder, or, if you trust it, give this folder as the "
            "model"
        ) from None
    if _is_complete(folder):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _check_owners(folder: Path) -> None:
    """Raise an OSError if another user owns `folder` or a file in it, or can write to it."""
    check_folder(folder)
    for path in folder.iterdir():
        check_owner(path.lstat(), path)


def _is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a checkpoint, with readable headers."""
    try:
        read_config(folder)
        read_headers(folder)
        find_tokenizer(folder)
        read_chat_template(folder)
    except CheckpointError:
        return False
    return True


def find_cache_folder() -> Path:
    """Return the folder for converted checkpoints, which may not exist yet.

    Raises:
        CheckpointError: The home directory is unknown, or the path is invalid.
    """
    try:
        return locate_cache()
    except OSError as error:
        raise CheckpointError(
            f"the cache {error.filename} cannot be used ({error.strerror}); set MLX_SMOLVLM_CACHE "
            "to another folder"
        ) from None


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a model's `folder` in the cache, waiting for other processes first."""
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
            folder.rmdir()  # if a failure left it empty
        os.close(descriptor)


def _take_lock(folder: Path) -> int:
    """Make `folder` if needed, lock it, and return the descriptor that holds the lock."""
    while True:
        make_private_folder(folder)
        descriptor = lock(folder, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == folder.stat().st_ino:  # not removed while waiting
                return descriptor
        os.close(descriptor)
