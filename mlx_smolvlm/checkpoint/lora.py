"""Adapters: low-rank additions to a checkpoint's matrices, in a folder of their own.

The folder holds `adapters.safetensors`, two matrices `lora_a` and `lora_b` for each adapted
module, and `adapter_config.json`, an `AdapterConfig`. The layers are mlx-lm's, which is
imported only when there is an adapter.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_smolvlm.checkpoint.headers import load_tensors, read_header, save_tensors
from mlx_smolvlm.checkpoint.load import NEVER_QUANTIZED
from mlx_smolvlm.config import LONGEST_SOURCE, find_part
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import write_file
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.records import read_json, read_record

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
FORMAT = "mlx-smolvlm-adapter"
FORMAT_VERSION = 1
LARGEST_RANK, LARGEST_SCALE = 4096, 1e6

_SIGNATURE = 64  # numbers of the base's last norm that tell one checkpoint from another
_TOLERANCE = 0.01  # of the largest; a type of 8 bits of precision is off by half of it


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` states.

    Attributes:
        base: The `source` of the checkpoint that it was trained on.
        base_signature: Numbers of that checkpoint that no quantization changes.
        rank: Width of the low-rank matrices.
        scale: What their product is multiplied with.
        dropout: Share of a module's inputs that its matrices did not see in training.
        modules: Paths of the adapted modules.
    """

    base: str
    base_signature: tuple[float, ...]
    rank: int
    scale: float
    dropout: float
    modules: tuple[str, ...]

    def check(self) -> None:
        """Refuse what no training writes.

        Raises:
            ValueError: It names the key and the range.
        """
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank is {self.rank}; it must be from 1 to {LARGEST_RANK}")
        if not 0 < self.scale <= LARGEST_SCALE:
            raise ValueError(f"scale is {self.scale}; it must be from 0 to {LARGEST_SCALE:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if len(self.base) > LONGEST_SOURCE:
            raise ValueError(f"base has more than {LONGEST_SOURCE:,} characters")
        if len(set(self.modules)) < len(self.modules):
            raise ValueError("modules names one twice")

    def to_dict(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`; `read_adapter_config` reads them back."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What the adapter in `folder` states of itself.

    Raises:
        CheckpointError: The folder holds no adapter of this format and version.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    if values.pop("format", None) != FORMAT or values.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is no adapter of {FORMAT} version {FORMAT_VERSION}; train one with "
            "mlx-smolvlm train"
        )
    try:
        config = read_record(AdapterConfig, values)
        config.check()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; train the adapter again") from None
    return config


def compute_signature(model: Model) -> tuple[float, ...]:
    """Numbers of `model` that its quantization does not change and its adapters neither."""
    found: Any = model.text_model.norm.weight[:_SIGNATURE].astype(mx.float32).tolist()
    return tuple(found)


def list_adaptable(model: Model, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the matrices of `parts` (see `config.PARTS`) that can have an adapter, in order."""
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return tuple(
        sorted(
            path
            for path, module in model.named_modules()
            if isinstance(module, kinds)
            and path not in NEVER_QUANTIZED
            and find_part(path) in parts
        )
    )


def attach_adapter(model: Model, config: AdapterConfig) -> None:
    """Put new low-rank matrices beside the modules that `config` names; they change nothing yet.

    Raises:
        CheckpointError: `model` has no such module.
    """
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    modules = dict(model.named_modules())
    usable = set(list_adaptable(model, ("text", "vision", "connector", "embeddings")))
    adapted = []
    for path in config.modules:
        if path not in usable:
            raise CheckpointError(
                f"the adapter changes {path!r:.100}, which this checkpoint does not have; "
                f"it was trained on {config.base:.100}"
            )
        base = modules[path]
        is_table = isinstance(base, nn.Embedding | nn.QuantizedEmbedding)
        kind = LoRAEmbedding if is_table else LoRALinear
        adapted.append((path, kind.from_base(base, config.rank, config.dropout, config.scale)))
    model.update_modules(tree_unflatten(adapted))


def load_adapter(model: Model, folder: Path, source: str) -> AdapterConfig:
    """Give `model` the adapter in `folder`; what the adapter states of itself.

    Args:
        model: With its weights. Its matrices may be quantized.
        folder: As `save_adapter` writes it.
        source: Where the checkpoint of `model` came from.

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
    found = {name: info.shape for name, info in read_header(path).items()}
    wanted = {name: tuple(array.shape) for name, array in get_adapter_arrays(model, config).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: {name!r:.100} has the shape {found.get(name)}, and this checkpoint "
                f"wants {wanted.get(name)}; the adapter was trained on {config.base:.100}"
            )
    arrays = load_tensors(path)
    weights = [(name, array.astype(model.dtype)) for name, array in arrays.items()]
    model.load_weights(weights, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return config


def get_adapter_arrays(model: Model, config: AdapterConfig) -> dict[str, mx.array]:
    """The low-rank matrices of `model`, by name."""
    modules = dict(model.named_modules())
    return {
        f"{path}.{name}": modules[path][name]
        for path in config.modules
        for name in ("lora_a", "lora_b")
    }


def save_adapter(model: Model, folder: Path, config: AdapterConfig) -> None:
    """Write the adapter of `model` into `folder`; of one of the same `config`, at once."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_file(folder / CONFIG_FILE, text, follow_links=False)
    save_tensors(folder / WEIGHTS_FILE, get_adapter_arrays(model, config), {"format": "mlx"})
