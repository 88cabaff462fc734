"""A checkpoint's checksums, its origin, and the size of its parts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint.headers import TensorInfo, read_headers
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.config import PARTS, Config, find_part
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import compute_sha256
from mlx_smolvlm.records import read_json, read_record, read_text

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")
_LARGEST_LIST = 1 << 20  # bytes


def format_sums(sums: Mapping[str, str]) -> str:
    """Return the contents of `SUMS_FILE` for hexadecimal `sums` by file name."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str] | None:
    """Read `SUMS_FILE` in `folder`: SHA-256 sums by file name; None if there is no such file.

    Raises:
        CheckpointError: The file cannot be read, or names files in other folders.
    """
    path = folder / SUMS_FILE
    if not path.exists():
        return None
    sums = {}
    for line in read_text(path, _LARGEST_LIST).splitlines():
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            raise CheckpointError(f"{path} is damaged; convert or fetch the checkpoint again")
        sums[match[2]] = match[1]
    return sums


def check_sums(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Check the files in `folder` against `SUMS_FILE`, one at a time.

    Yields:
        The name of a file, and what is wrong with it or None. A weight file that `SUMS_FILE`
        does not list is wrong. Yields nothing if there is no `SUMS_FILE`.

    Raises:
        CheckpointError: As in `read_sums`.
    """
    sums = read_sums(folder)
    if sums is None:
        return
    for name, wanted in sums.items():
        try:
            actual = compute_sha256(folder / name)
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"
        else:
            yield name, None if actual == wanted else f"differs from its sum in {SUMS_FILE}"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in sums:
            yield path.name, f"is not listed in {SUMS_FILE}"


ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint's weights come from; None and () mean unknown.

    Attributes:
        source: Hub id, or name of a local folder.
        revision: Commit on the hub.
        base_model: Hub id of the model that was converted.
        license: Hub identifier such as "apache-2.0".
        license_name: Name of the licence if `license` is "other".
        license_link: Its URL or file.
        languages: Codes such as "en".
        converter: Name and version of the program that wrote the folder.
    """

    source: str
    revision: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    converter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `ORIGIN_FILE`."""
        return dataclasses.asdict(self)


def read_origin(folder: Path) -> Origin | None:
    """Read `ORIGIN_FILE` in `folder`; None if there is no such file.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / ORIGIN_FILE
    return parse_origin(read_json(path), path) if path.is_file() else None


def parse_origin(values: dict[str, Any], path: Path) -> Origin:
    """Make an `Origin` from `values` of the file at `path`; unknown keys are ignored.

    Raises:
        CheckpointError: A value has the wrong type, or `source` is missing.
    """
    names = [one.name for one in dataclasses.fields(Origin)]
    stated = {name: values[name] for name in names if values.get(name) is not None}
    try:
        return read_record(Origin, stated)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; delete or repair the file") from None


@dataclass(frozen=True)
class PartSize:
    """Number of weights of a part, and their size in bytes with scales and biases."""

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight, scales and biases included; 0.0 without weights."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(self.weights + other.weights, self.nbytes + other.nbytes)


def measure_parts(folder: Path) -> dict[str, PartSize]:
    """Measure each part of the checkpoint in `folder` from its headers.

    Raises:
        CheckpointError: The folder is not a complete checkpoint of this format.
    """
    config = read_config(folder)
    sizes = dict.fromkeys(PARTS, PartSize(0, 0))
    tensors = read_headers(folder)
    for name, info in tensors.items():
        weights = _count_weights(name, info, config, tensors)
        sizes[find_part(name)] += PartSize(weights, info.nbytes)
    return sizes


def _count_weights(
    name: str, info: TensorInfo, config: Config, tensors: dict[str, TensorInfo]
) -> int:
    """Count the weights that the tensor `name` represents; 0 for scales and their biases."""
    path, _, suffix = name.rpartition(".")
    count = math.prod(info.shape)
    if f"{path}.scales" not in tensors:
        return count
    if suffix in ("scales", "biases"):
        return 0
    quantization = config.quantization.find(path)
    if suffix == "weight" and quantization is not None:
        return count * 32 // quantization.bits  # packed into uint32
    return count
