"""How many weights a checkpoint holds, and in how many bytes, part by part."""

from __future__ import annotations

import dataclasses
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
    """The contents of `SUMS_FILE` for hexadecimal `sums` by file name."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str] | None:
    """The stated sums of the files in `folder`, by name; None if it states none.

    Raises:
        CheckpointError: The list cannot be read, or names files elsewhere.
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
    """The name of each file with a stated sum, and what is wrong with it, one after another.

    A weight file that the list does not name is wrong too. Nothing if there is no list.

    Raises:
        CheckpointError: As `read_sums`.
    """
    sums = read_sums(folder)
    if sums is None:
        return
    for name, wanted in sums.items():
        try:
            found = compute_sha256(folder / name)
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"
        else:
            yield name, None if found == wanted else f"differs from its sum in {SUMS_FILE}"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in sums:
            yield path.name, f"is not listed in {SUMS_FILE}"


ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Where weights come from; None and () stand for what is not known.

    Attributes:
        source: The hub id or the folder's name.
        revision: The commit on the hub.
        base_model: The hub id of the model that was converted.
        license: As on the hub, such as "apache-2.0"; `license_name` and `license_link`
            say more of "other".
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
        """The contents of `ORIGIN_FILE`."""
        return dataclasses.asdict(self)


def read_origin(folder: Path) -> Origin | None:
    """The origin that `folder` states; None if it states none.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / ORIGIN_FILE
    return parse_origin(read_json(path), path) if path.is_file() else None


def parse_origin(values: dict[str, Any], path: Path) -> Origin:
    """The origin that `values` of the file at `path` state; unknown keys are ignored.

    Raises:
        CheckpointError: A value is of another type, or the source is missing.
    """
    names = [one.name for one in dataclasses.fields(Origin)]
    known = {name: values[name] for name in names if values.get(name) is not None}
    try:
        return read_record(Origin, known)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; delete the file, or mend it") from None


@dataclass(frozen=True)
class PartSize:
    """Numbers that a part holds, and the bytes that they take with their scales."""

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, its share of scales and biases included."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(self.weights + other.weights, self.nbytes + other.nbytes)


def measure_parts(folder: Path) -> dict[str, PartSize]:
    """The size of each part of the checkpoint in `folder`; only headers are read.

    Raises:
        CheckpointError: It is no whole checkpoint of this format.
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
    """Weights that the tensor `name` stands for; none of scales and of their biases."""
    path, _, suffix = name.rpartition(".")
    count = 1
    for side in info.shape:
        count *= side
    if f"{path}.scales" not in tensors:
        return count
    if suffix in ("scales", "biases"):
        return 0
    packed = config.quantization.find(path)
    return count * 32 // packed.bits if suffix == "weight" and packed is not None else count
