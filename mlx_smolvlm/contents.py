"""How many weights a checkpoint holds, and in how many bytes, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.checkpoint import read_config
from mlx_smolvlm.config import PARTS, Config, part_of
from mlx_smolvlm.safetensors import TensorInfo, read_headers


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


def part_sizes(folder: Path) -> dict[str, PartSize]:
    """The size of each part of the checkpoint in `folder`; only headers are read.

    Raises:
        CheckpointError: It is no whole checkpoint of this format.
    """
    config = read_config(folder)
    sizes = dict.fromkeys(PARTS, PartSize(0, 0))
    tensors = read_headers(folder)
    for name, info in tensors.items():
        weights = _weights(name, info, config, tensors)
        sizes[part_of(name)] += PartSize(weights, info.nbytes)
    return sizes


def _weights(name: str, info: TensorInfo, config: Config, tensors: dict[str, TensorInfo]) -> int:
    """Weights that the tensor `name` stands for; none of scales and of their biases."""
    path, _, suffix = name.rpartition(".")
    count = 1
    for side in info.shape:
        count *= side
    if f"{path}.scales" not in tensors:
        return count
    if suffix in ("scales", "biases"):
        return 0
    packed = config.quantization.of(path)
    return count * 32 // packed.bits if suffix == "weight" and packed is not None else count
