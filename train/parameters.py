"""Which parameters of a model are trained, and how what was trained is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_smolvlm.checkpoint.load import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    load_model,
    read_config,
)
from mlx_smolvlm.checkpoint.lora import (
    AdapterConfig,
    attach_adapter,
    compute_signature,
    list_adaptable,
    load_adapter,
)
from mlx_smolvlm.checkpoint.writer import FolderWriter, ShardWriter, stage_folder
from mlx_smolvlm.config import Config, find_part
from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.train.settings import LoraSettings

TUNED_SUFFIX = ", fine-tuned"  # what follows the source of a checkpoint that was trained further


def start_adapter(
    model: Model, parts: tuple[str, ...], lora: LoraSettings, source: str
) -> AdapterConfig:
    """New adapters of `parts`, the only parameters of `model` that are left to train."""
    config = AdapterConfig(
        base=source,
        base_signature=compute_signature(model),
        rank=lora.rank,
        scale=float(lora.scale),
        dropout=float(lora.dropout),
        modules=list_adaptable(model, parts),
    )
    model.freeze()
    attach_adapter(model, config)
    model.unfreeze(keys=["lora_a", "lora_b"])
    mx.eval(model.parameters())
    return config


def freeze_other_parts(model: Model, parts: tuple[str, ...]) -> None:
    """Freeze all of `model` but `parts`.

    Raises:
        TrainingError: One of them is quantized, so that it cannot be trained in full.
    """
    packed = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    for path, module in model.named_modules():
        if isinstance(module, packed) and find_part(path) in parts:
            raise TrainingError(
                f"'{path}' is quantized to {module.bits} bits, and method full trains floats; "
                'use method "lora", leave the part out, or convert the checkpoint with --bits 16'
            )
    model.freeze()
    for path, module in model.named_modules():
        own = [name for name, value in module.items() if isinstance(value, mx.array)]
        trained = [name for name in own if find_part(f"{path}.{name}") in parts]
        if trained:
            module.unfreeze(recurse=False, keys=trained)


def trains_encoder(model: Model) -> bool:
    """Whether what `model` makes of a picture changes in training."""
    names: Any = tree_flatten(model.trainable_parameters())
    return any(find_part(name) in ("vision", "connector") for name, _ in names)


def write_model(model: Model, base: Path, config: Config, dest: Path) -> None:
    """Write `model`, which `config` describes, as a checkpoint to `dest`.

    Args:
        base: The checkpoint that tokenizer and template come from.
        dest: A folder that is absent, empty or an older checkpoint.

    Raises:
        CheckpointError: It cannot be written.
    """
    dtype: mx.Dtype = getattr(mx, config.dtype)
    parameters: Any = tree_flatten(model.parameters())
    with stage_folder(dest, force=True) as folder:
        outbox = FolderWriter(folder)
        writer = ShardWriter(outbox)
        for name, array in parameters:
            is_float = mx.issubdtype(array.dtype, mx.floating)
            writer.add({name: array.astype(dtype) if is_float else array})
        writer.finish()
        for file in (TOKENIZER_FILE, TEMPLATE_FILE):
            outbox.copy(base / file)
        outbox.write_text(CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
        outbox.finish()


def mark_as_tuned(config: Config) -> Config:
    """`config` of a checkpoint that was trained further."""
    return replace(config, source=config.source.removesuffix(TUNED_SUFFIX) + TUNED_SUFFIX)


def fuse(base: Path, adapter: Path, dest: Path) -> Path:
    """The checkpoint `dest`: that in `base` with the adapter added to its weights.

    Matrices that were adapted are floats in it, of the type that the checkpoint's floats have:
    packed again they would lose what little was added. The others stay as they are.

    Raises:
        CheckpointError: The adapter does not fit, or `dest` is taken.
    """
    config = read_config(base)
    model = load_model(base, "float32")
    adapted = load_adapter(model, adapter, config.source)
    modules: dict[str, Any] = dict(model.named_modules())
    whole = [(path, modules[path].fuse(dequantize=True)) for path in adapted.modules]
    model.update_modules(tree_unflatten(whole))
    old = config.quantization
    kept = tuple(one for one in old.overrides if one[0] not in adapted.modules)
    unpacked = tuple((path, None) for path in adapted.modules if old.find(path) is not None)
    quantization = replace(old, overrides=(*kept, *unpacked))
    write_model(model, base, mark_as_tuned(replace(config, quantization=quantization)), dest)
    return dest
