"""The checkpoints to measure: a model at one or several precisions, and its source for peers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.bench.random_model import make_config, make_random_source
from mlx_smolvlm.checkpoint.load import is_own, read_config
from mlx_smolvlm.config import FORMAT_VERSION, Config
from mlx_smolvlm.convert.hub import ALIASES, DEMO, ResolveOptions, find_folder, resolve
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.convert.source import download, is_hub_id, read_stamps
from mlx_smolvlm.errors import CheckpointError

FLOAT_BITS = 16
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchModel:
    """A model at one or several precisions.

    Attributes:
        name: For the report.
        folders: The checkpoints in this package's format, by the name of their precision.
        source: The checkpoint in Hugging Face's format, which peers read; None without one.
    """

    name: str
    folders: dict[str, Path]
    source: Path | None

    @property
    def config(self) -> Config:
        """The configuration of the first checkpoint."""
        return read_config(next(iter(self.folders.values())))

    def get_source(self) -> Path:
        """Return the folder for peers.

        Raises:
            CheckpointError: There is none.
        """
        if self.source is None:
            raise CheckpointError(
                f"{self.name} is not a checkpoint in Hugging Face's format, which other programs "
                "read; give such a folder, a hub id, or --random 256m"
            )
        return self.source


def make_random_model(
    size: str, bits: tuple[int, ...], work: Path, progress: Progress | None = None
) -> BenchModel:
    """Make a model of `size` with random weights in `work`; what is there already is used.

    Weights are float32 on a CPU and bfloat16 on a GPU, so that all programs compute in the same
    type.

    Raises:
        CheckpointError: `work` cannot be written, or has a folder of this name that was not
            made here.
    """
    import mlx.core as mx

    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    config = make_config(size, "float32" if on_cpu else "bfloat16")
    try:
        source = make_random_source(work / f"{size}-hf", config)
    except OSError as error:
        raise CheckpointError(f"{work} cannot be written: {error.strerror or error}") from None
    folders = {
        f"{one} bits": _convert(source, work, f"{size}-{one}", one, progress)
        for one in bits or (FLOAT_BITS,)
    }
    return BenchModel(f"random weights of {size}", folders, source)


def open_model(
    model: str,
    bits: tuple[int, ...],
    work: Path,
    offline: bool = False,
    progress: Progress | None = None,
    *,
    for_peers: bool = False,
) -> BenchModel:
    """Open a model, and convert it to `bits`.

    Args:
        model: A folder, a hub id (owner/name or owner/name@revision), an alias, or "demo".
        bits: Precisions; empty for the model as it is.
        work: Where conversions are written.
        offline: Never use the network.
        progress: Called during conversions.
        for_peers: Whether the source is needed, too. Without, and without `bits`, a model that was
            converted before is used as it is, and nothing is downloaded.

    Raises:
        CheckpointError: The model cannot be found or converted.
    """
    source = _find_source(model, offline) if bits or for_peers else None
    if not bits:
        own = resolve(model, ResolveOptions(offline=offline, progress=progress))
        return BenchModel(model, {"": own}, source)
    origin = source or resolve(model, ResolveOptions(offline=offline, progress=progress))
    name = Path(model).name or "model"  # for "."
    folders = {
        f"{one} bits": _convert(origin, work, f"{name}-{one}", one, progress) for one in bits
    }
    return BenchModel(model, folders, source)


def _find_source(model: str, offline: bool) -> Path | None:
    """Return the folder of `model` in Hugging Face's format, downloaded if needed; None without."""
    if model == DEMO:
        return None
    folder = find_folder(model)
    if folder is None:
        repo, _, revision = ALIASES.get(model.lower(), model).partition("@")
        if not is_hub_id(repo):
            return None
        folder = download(repo, offline, revision or None)
    return None if is_own(folder) else folder


def _convert(source: Path, work: Path, name: str, bits: int, progress: Progress | None) -> Path:
    """Convert `source` to a folder in `work`, unless that was done before, and return it.

    Its name begins with `name`, and has a digest of what is in it: another source of the same
    name, or other weights in the same place, get a folder of their own.
    """
    stamps = sorted(read_stamps(source).items())
    what = repr((str(source.resolve()), stamps, bits, FORMAT_VERSION))
    dest = work / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if not is_own(dest):
        convert_checkpoint(source, dest, ConvertOptions(bits=bits), progress)
    return dest
