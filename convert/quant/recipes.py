"""Recipes: TOML files that say what precision each part and each matrix gets.

bits = 4                  # the options of `convert`, by the same names
vision_bits = 8
group_size = 64

[overrides]               # patterns over the paths of matrices; the last that fits counts
"text_model.layers.*.mlp.down_proj" = { bits = 6, group_size = 32 }
"lm_head" = { bits = 16 }
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.options import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOAT_BITS,
    FLOAT_MODES,
    ConvertOptions,
)
from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.files import expand_path, read_toml
from mlx_smolvlm.records import read_value

# What each costs was measured: docs/decisions/precision.md.
RECIPES = {
    "tiny": ConvertOptions(bits=4, embeddings_bits=4, group_size=64),
    "balanced": ConvertOptions(bits=6, embeddings_bits=6, group_size=64),
    "quality": ConvertOptions(bits=8, group_size=64),
}


def read_recipe(name: str) -> ConvertOptions:
    """The precision that `name` stands for: one of `RECIPES`, or the path of a TOML file.

    Raises:
        CheckpointError: It is neither, or the file asks for what does not exist.
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        path = expand_path(name)
        values = read_toml(path)
    except OSError as error:
        raise CheckpointError(
            f"the recipe {name} is none of {', '.join(RECIPES)}, and no file that can be "
            f"read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is {error}") from None
    try:
        return _options(values)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _options(values: dict[str, Any]) -> ConvertOptions:
    """`values` of a file as options."""
    known = [field.name for field in dataclasses.fields(ConvertOptions)]
    overrides = values.pop("overrides", {})
    if not isinstance(overrides, dict):
        raise CheckpointError(f"overrides must be a table, not {shorten(overrides)}")
    for key, value in values.items():
        if key not in known:
            raise CheckpointError(f"the key {shorten(key)} is not known; known: {', '.join(known)}")
        read_value(str if key in ("mode", "dtype") else int, value, key)
    group_size = values.get("group_size", ConvertOptions.group_size)
    pairs = (
        (pattern, _quantization(pattern, one, group_size)) for pattern, one in overrides.items()
    )
    return ConvertOptions(**values, overrides=tuple(pairs))


def _quantization(pattern: str, value: Any, group_size: int) -> Quantization | None:
    """What the override at `pattern` asks for; None is float."""
    where = f"overrides, {shorten(pattern)}"
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} must be a table such as {{ bits = 6, group_size = 32 }}, not {shorten(value)}"
        )
    unknown = set(value) - {"bits", "group_size", "mode"}
    if unknown:
        raise CheckpointError(
            f"{where}: the key {shorten(min(unknown))} is not known; known: bits, group_size, mode"
        )
    mode = value.get("mode", "affine")
    if isinstance(mode, str) and mode in FLOAT_MODES:
        fixed = Quantization(*FLOAT_MODES[mode], mode)
        for key in ("bits", "group_size"):
            if value.get(key, getattr(fixed, key)) != getattr(fixed, key):
                own, found = getattr(fixed, key), shorten(value[key])
                raise CheckpointError(f"{where}: mode {mode} has {key} {own}, not {found}")
        return fixed
    bits, group_size = value.get("bits"), value.get("group_size", group_size)
    if mode != "affine":
        raise CheckpointError(
            f"{where}: mode {shorten(mode)} is none of affine, {', '.join(FLOAT_MODES)}"
        )
    if bits == FLOAT_BITS and type(bits) is int:
        return None
    if bits not in AFFINE_BITS or type(bits) is not int:
        choices = ", ".join(str(n) for n in AFFINE_BITS)
        raise CheckpointError(
            f"{where}: bits is {shorten(bits)}; choose {choices}, or 16 for float"
        )
    if group_size not in AFFINE_GROUPS:
        raise CheckpointError(f"{where}: group_size is {shorten(group_size)}; choose 32, 64 or 128")
    return Quantization(bits, group_size, "affine")
