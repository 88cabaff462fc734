"""Read, attach and save LoRA adapters.

An adapter folder holds `adapters.safetensors`, with two matrices `lora_a` and `lora_b` for each
adapted module, and `adapter_config.json`, an `AdapterConfig`. The layers are in `model/lora.py`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_smolvlm.checkpoint.headers import load_tensors, read_header, save_tensors
from mlx_smolvlm.checkpoint.load import NEVER_QUANTIZED
from mlx_smolvlm.config import MAX_SOURCE_LENGTH, find_part
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import write_file
from mlx_smolvlm.model.lora import Adaptable, adapt
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.records import read_json, read_record

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
FORMAT = "mlx-smolvlm-adapter"
FORMAT_VERSION = 1
LARGEST_RANK, LARGEST_SCALE = 4096, 1e6

_SIGNATURE = 64  # how many weights of the final norm identify a checkpoint
_TOLERANCE = 0.01  # relative to the largest weight; rounding to bfloat16 costs at most half of it


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of `adapter_config.json`.

    Attributes:
        base: `source` of the checkpoint that the adapter was trained on.
        base_signature: Weights that identify that checkpoint, see `compute_signature`.
        rank: Rank of the low-rank matrices.
        scale: Factor of their product.
        dropout: Dropout probability of a module's inputs in training.
        modules: Paths of the adapted modules.

    Raises:
        ValueError: A value is out of its range, or a module is listed twice.
    """

    base: str
    base_signature: tuple[float, ...]
    rank: int
    scale: float
    dropout: float
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank is {self.rank}; it must be from 1 to {LARGEST_RANK}")
        if not 0 < self.scale <= LARGEST_SCALE:
            raise ValueError(
                f"scale is {self.scale}; it must be above 0 and at most {LARGEST_SCALE:g}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if len(self.base) > MAX_SOURCE_LENGTH:
            raise ValueError(f"base has more than {MAX_SOURCE_LENGTH:,} characters")
        if len(set(self.modules)) < len(self.modules):
            raise ValueError("modules names one twice")

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `adapter_config.json`; `read_adapter_config` is the inverse."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json in `folder`.

    Raises:
        CheckpointError: The folder does not hold an adapter of this format and version.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    if values.pop("format", None) != FORMAT or values.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is not an adapter of {FORMAT} version {FORMAT_VERSION}; train one with "
            "mlx-smolvlm train"
        )
    try:
        return read_record(AdapterConfig, values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; train the adapter again") from None


def compute_signature(model: Model) -> tuple[float, ...]:
    """Return weights of the final norm, which neither quantization nor an adapter changes."""
    numbers: Any = model.text_model.norm.weight[:_SIGNATURE].astype(mx.float32).tolist()
    return tuple(numbers)


def list_adaptable(model: Model, parts: tuple[str, ...]) -> tuple[str, ...]:
    """List the paths of matrices in `parts` (see `config.PARTS`) that can have an adapter."""
    return tuple(
        sorted(
            path
            for path, module in model.named_modules()
            if isinstance(module, Adaptable)
            and path not in NEVER_QUANTIZED
            and find_part(path) in parts
        )
    )


def attach_adapter(model: Model, config: AdapterConfig) -> None:
    """Add new low-rank matrices to the modules that `config` names; the output stays the same.

    Raises:
        CheckpointError: `model` has no such module.
    """
    modules = dict(model.named_modules())
    usable = set(list_adaptable(model, ("text", "vision", "connector", "embeddings")))
    adapted = []
    for path in config.modules:
        if path not in usable:
            raise CheckpointError(
                f"the adapter changes {path!r:.100}, which this checkpoint does not have; "
                f"it was trained on {config.base:.100}"
            )
        adapted.append((path, adapt(modules[path], config.rank, config.scale, config.dropout)))
    model.update_modules(tree_unflatten(adapted))


def load_adapter(model: Model, folder: Path, source: str) -> AdapterConfig:
    """Attach the adapter in `folder` to `model` and return its configuration.

    Args:
        model: Modified in place. Its matrices may be quantized.
        folder: Written by `save_adapter`.
        source: `source` of the model's checkpoint.

    Raises:
        CheckpointError: There is no adapter, or it was trained on another checkpoint.
    """
    config = read_adapter_config(folder)
    own, theirs = np.array(compute_signature(model)), np.array(config.base_signature)
    near = _TOLERANCE * float(np.abs(own).max())
    if own.shape != theirs.shape or not np.allclose(own, theirs, 0, near):
        raise CheckpointError(
            f"{folder} was trained on {config.base:.100}, and this checkpoint, {source}, has other "
            "weights; load the checkpoint that the adapter belongs to"
        )
    if source != config.base:
        warnings.warn(
            f"{folder} was trained on {config.base:.100}, and the checkpoint is of {source}",
            SmolVLMWarning,
            stacklevel=3,
        )
    attach_adapter(model, config)
    path = folder / WEIGHTS_FILE
    shapes = {name: info.shape for name, info in read_header(path).items()}
    wanted = {name: tuple(array.shape) for name, array in get_adapter_arrays(model, config).items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{path}: {name!r:.100} has the shape {shapes.get(name)}, and this checkpoint "
                f"wants {wanted.get(name)}; the adapter was trained on {config.base:.100}"
            )
    arrays = load_tensors(path)
    weights = [(name, array.astype(model.dtype)) for name, array in arrays.items()]
    model.load_weights(weights, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return config


def get_adapter_arrays(model: Model, config: AdapterConfig) -> dict[str, mx.array]:
    """Return the low-rank matrices of `model`, by name."""
    modules = dict(model.named_modules())
    return {
        f"{path}.{name}": modules[path][name]
        for path in config.modules
        for name in ("lora_a", "lora_b")
    }


def save_adapter(model: Model, folder: Path, config: AdapterConfig) -> None:
    """Write the adapter of `model` into `folder`.

    If `folder` holds an adapter with the same `config`, it is replaced atomically.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_file(folder / CONFIG_FILE, text, follow_links=False)
    save_tensors(folder / WEIGHTS_FILE, get_adapter_arrays(model, config), {"format": "mlx"})
