"""Selects the parameters to train, and writes trained models as checkpoints."""

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

TUNED_SUFFIX = ", fine-tuned"  # appended to the source of a fine-tuned checkpoint


def start_adapter(
    model: Model, parts: tuple[str, ...], lora: LoraSettings, source: str
) -> AdapterConfig:
    """Add new LoRA matrices to `parts` of `model`, and freeze everything else.

    Args:
        model: Changed in place.
        parts: Parts of the network, of `config.PARTS`.
        lora: Rank, scale and dropout.
        source: The `source` of the checkpoint's configuration.
    """
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
    """Freeze all parameters of `model` except those of `parts`.

    Raises:
        TrainingError: A matrix in `parts` is quantized, and so cannot be trained itself.
    """
    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    for path, module in model.named_modules():
        if isinstance(module, quantized) and find_part(path) in parts:
            raise TrainingError(
                f"'{path}' is quantized to {module.bits} bits, and method full trains floats; "
                'use method "lora", leave out the part, or convert the checkpoint with --bits 16'
            )
    model.freeze()
    for path, module in model.named_modules():
        names = [name for name, value in module.items() if isinstance(value, mx.array)]
        names = [name for name in names if find_part(f"{path}.{name}") in parts]
        if names:
            module.unfreeze(recurse=False, keys=names)


def trains_encoder(model: Model) -> bool:
    """Whether training changes the embeddings that `model` computes for an image."""
    names: Any = tree_flatten(model.trainable_parameters())
    return any(find_part(name) in ("vision", "connector") for name, _ in names)


def write_model(model: Model, base: Path, config: Config, dest: Path) -> None:
    """Write `model` as a checkpoint.

    Args:
        model: The model.
        base: The checkpoint to copy the tokenizer and the chat template from.
        config: The configuration of `model`; floats are written in its `dtype`.
        dest: A folder that does not exist, is empty or holds a checkpoint to replace.

    Raises:
        CheckpointError: The checkpoint cannot be written.
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
    """Return `config` with ", fine-tuned" at the end of its source."""
    return replace(config, source=config.source.removesuffix(TUNED_SUFFIX) + TUNED_SUFFIX)


def fuse(base: Path, adapter: Path, dest: Path) -> Path:
    """Write a checkpoint of a base model with an adapter added to its weights.

    Adapted matrices become floats of the base's `dtype`: quantizing them again would lose most of
    the small change that the adapter adds. The other matrices stay as they are.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The folder of the adapter.
        dest: The folder to write.

    Returns:
        `dest`.

    Raises:
        CheckpointError: The adapter does not fit the base, or `dest` cannot be written.
    """
    config = read_config(base)
    model = load_model(base, "float32")
    adapted = load_adapter(model, adapter, config.source)
    modules: dict[str, Any] = dict(model.named_modules())
    fused = [(path, modules[path].fuse()) for path in adapted.modules]
    model.update_modules(tree_unflatten(fused))
    old = config.quantization
    kept = tuple(one for one in old.overrides if one[0] not in adapted.modules)
    unpacked = tuple((path, None) for path in adapted.modules if old.find(path) is not None)
    quantization = replace(old, overrides=(*kept, *unpacked))
    write_model(model, base, mark_as_tuned(replace(config, quantization=quantization)), dest)
    return dest
