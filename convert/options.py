"""The precision of each part, given by numbers or by a recipe, and packing.

A recipe is a TOML file with the fields of `ConvertOptions`:

    bits = 4
    vision_bits = 8
    group_size = 64

    [overrides]  # patterns over the paths of matrices; the last match counts
    "text_model.layers.*.mlp.down_proj" = { bits = 6, group_size = 32 }
    "lm_head" = { bits = 16 }
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx

from mlx_smolvlm.config import DTYPES, PARTS, Quantization, QuantizationConfig, find_part
from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.files import expand_path, read_toml
from mlx_smolvlm.records import read_value

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
FLOAT_BITS = 16  # means "not quantized" in options
FINE_BITS = 8  # default of the parts that rounding hurts most


@dataclass(frozen=True)
class ConvertOptions:
    """The precision of a converted checkpoint.

    Attributes:
        bits: Bits of the decoder's layers: 2, 3, 4, 5, 6 or 8; 16 means float, None keeps the
            source's precision. The other parts default to float with 16, to None with None, and
            to 8 bits otherwise.
        vision_bits: Bits of the vision encoder; None is the default above.
        connector_bits: Bits of the connector.
        embeddings_bits: Bits of the token embeddings and the output head.
        group_size: Weights that share a scale in affine mode: 32, 64 or 128.
        mode: "affine", or one of "mxfp4", "mxfp8" and "nvfp4", whose bits and group size are fixed;
            parts with other bits are affine.
        dtype: Type of weights that are not quantized; None is the source's most common type.
        overrides: Pairs of a pattern over module paths, such as
            "text_model.layers.*.mlp.down_proj", and the quantization of these modules (None:
            float) instead of their part's. `*` also matches dots; the last match counts.

    Raises:
        CheckpointError: Bits, group size, mode or dtype do not exist.
    """

    bits: int | None = None
    vision_bits: int | None = None
    connector_bits: int | None = None
    embeddings_bits: int | None = None
    group_size: int = 64
    mode: str = "affine"
    dtype: str | None = None
    overrides: tuple[tuple[str, Quantization | None], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise CheckpointError(f"dtype {shorten(self.dtype)} is none of {', '.join(DTYPES)}")
        if self.mode != "affine" and self.mode not in FLOAT_MODES:
            raise CheckpointError(
                f"mode {shorten(self.mode)} is none of affine, {', '.join(FLOAT_MODES)}"
            )
        if self.group_size not in AFFINE_GROUPS or type(self.group_size) is not int:
            raise CheckpointError(f"group size {shorten(self.group_size)} is none of 32, 64, 128")
        if self.mode in FLOAT_MODES and self.bits not in (None, FLOAT_MODES[self.mode][0]):
            raise CheckpointError(
                f"mode {self.mode} has {FLOAT_MODES[self.mode][0]} bits, not {shorten(self.bits)}"
            )
        for bits in (self.bits, self.vision_bits, self.connector_bits, self.embeddings_bits):
            if bits is not None and (
                bits not in (*AFFINE_BITS, FLOAT_BITS) or type(bits) is not int
            ):
                choices = ", ".join(str(n) for n in AFFINE_BITS)
                raise CheckpointError(
                    f"{shorten(bits)} bits are not available: {choices}, or 16 for float"
                )


# Their size and quality were measured: docs/decisions/precision.md.
RECIPES = {
    "tiny": ConvertOptions(bits=4, embeddings_bits=4, group_size=64),
    "balanced": ConvertOptions(bits=6, embeddings_bits=6, group_size=64),
    "quality": ConvertOptions(bits=8, group_size=64),
}


def read_recipe(name: str) -> ConvertOptions:
    """Read a recipe.

    Args:
        name: One of `RECIPES`, or the path of a TOML file.

    Raises:
        CheckpointError: `name` is neither, or the file has an unknown key or an invalid value.
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        path = expand_path(name)
        values = read_toml(path)
    except OSError as error:
        raise CheckpointError(
            f"the recipe {name} is none of {', '.join(RECIPES)}, and not a readable file: "
            f"{error.strerror}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is {error}") from None
    try:
        return _parse_options(values)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _parse_options(values: dict[str, Any]) -> ConvertOptions:
    """Make options from the `values` of a TOML file."""
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
        (pattern, _parse_override(pattern, one, group_size)) for pattern, one in overrides.items()
    )
    return ConvertOptions(**values, overrides=tuple(pairs))


def _parse_override(pattern: str, value: Any, group_size: int) -> Quantization | None:
    """Make a quantization from the `value` of the override for `pattern`; None is float."""
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
                message = f"mode {mode} has {key} {getattr(fixed, key)}, not {shorten(value[key])}"
                raise CheckpointError(f"{where}: {message}")
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


def choose_quantization(options: ConvertOptions) -> dict[str, Quantization | None]:
    """Return the quantization of each part, None for float; parts to keep are absent."""
    bits = FLOAT_MODES[options.mode][0] if options.mode in FLOAT_MODES else options.bits
    others = bits if bits in (None, FLOAT_BITS) else FINE_BITS
    part_bits = {
        "text": bits,
        "vision": others if options.vision_bits is None else options.vision_bits,
        "connector": others if options.connector_bits is None else options.connector_bits,
        "embeddings": others if options.embeddings_bits is None else options.embeddings_bits,
    }
    return {part: _make_quantization(n, options) for part, n in part_bits.items() if n is not None}


def _make_quantization(bits: int, options: ConvertOptions) -> Quantization | None:
    """Return the quantization for `bits` under `options`; None is float."""
    if bits == FLOAT_BITS:
        return None
    if options.mode in FLOAT_MODES and FLOAT_MODES[options.mode][0] == bits:
        return Quantization(bits, FLOAT_MODES[options.mode][1], options.mode)
    return Quantization(bits, options.group_size, "affine")


def match_overrides(
    paths: Iterable[str], overrides: Iterable[tuple[str, Quantization | None]]
) -> dict[str, Quantization | None]:
    """Return the quantization, None for float, of those of `paths` that `overrides` match.

    Raises:
        CheckpointError: A pattern matches none of them.
    """
    paths = list(paths)
    result: dict[str, Quantization | None] = {}
    for pattern, quantization in overrides:
        matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            raise CheckpointError(
                f"the pattern {pattern!r:.200} matches no matrix of this model; its matrices have "
                f"paths such as {paths[0]} and {paths[-1]}"
            )
        result |= dict.fromkeys(matches, quantization)
    return result


def check_width(path: str, width: int, quantization: Quantization) -> None:
    """Check that the group size divides `width`, the row length of the module at `path`.

    Raises:
        CheckpointError: It does not; the message lists the group sizes that do.
    """
    if width % quantization.group_size == 0:
        return
    usable = [str(size) for size in AFFINE_GROUPS if width % size == 0]
    advice = f"usable: {', '.join(usable)}" if usable else "leave this part float (16 bits)"
    raise CheckpointError(
        f"group size {quantization.group_size} does not divide the width {width} of {path}; "
        f"{advice}"
    )


def summarize_quantization(modules: Mapping[str, Quantization | None]) -> QuantizationConfig:
    """Summarize the quantization of `modules`, by path: each part's most common, and overrides."""
    usual: dict[str, Quantization | None] = {}
    for part in PARTS:
        counts = Counter(q for path, q in modules.items() if find_part(path) == part)
        usual[part] = counts.most_common(1)[0][0] if counts else None
    overrides = tuple((path, q) for path, q in modules.items() if q != usual[find_part(path)])
    return QuantizationConfig(**usual, overrides=overrides)


def pack(weight: mx.array, quantization: Quantization) -> dict[str, mx.array]:
    """Quantize `weight` (rows, width) to "weight", "scales" and, in affine mode, "biases"."""
    arrays = mx.quantize(weight, quantization.group_size, quantization.bits, mode=quantization.mode)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def unpack(arrays: Mapping[str, mx.array], quantization: Quantization, dtype: mx.Dtype) -> mx.array:
    """Dequantize the packed `arrays` to a matrix (rows, width) of type `dtype`."""
    weight: mx.array = mx.dequantize(
        arrays["weight"],
        arrays["scales"],
        arrays.get("biases"),
        quantization.group_size,
        quantization.bits,
        mode=quantization.mode,
    )
    return weight.astype(dtype)


def compute_packed_shapes(
    shape: tuple[int, ...], quantization: Quantization
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Return shape and allowed safetensors types of each array of a packed `shape` matrix."""
    rows, width = shape
    groups = (rows, width // quantization.group_size)
    weight = (rows, width * quantization.bits // 32)
    if quantization.mode != "affine":
        return {"weight": (weight, ("U32",)), "scales": (groups, ("U8",))}
    floats = ("F32", "F16", "BF16")
    return {"weight": (weight, ("U32",)), "scales": (groups, floats), "biases": (groups, floats)}
