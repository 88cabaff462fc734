"""Match source tensors with the modules to write.

Everything is checked here, from headers alone, before weights are read or anything is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_smolvlm.checkpoint.headers import FLOATS, TensorInfo
from mlx_smolvlm.config import Config, Quantization, find_part
from mlx_smolvlm.convert.names import Entry, list_entries, normalize_name
from mlx_smolvlm.convert.options import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOAT_MODES,
    check_width,
    compute_packed_shapes,
    match_overrides,
    summarize_quantization,
)
from mlx_smolvlm.errors import CheckpointError, shorten

SourceTensors = dict[str, tuple[str, TensorInfo]]  # normalized name -> (name in the source, info)


@dataclass(frozen=True)
class Member:
    """A source module: its tensors by suffix ("weight", "scales", ...) and its quantization."""

    tensors: Mapping[str, tuple[str, TensorInfo]]
    quantization: Quantization | None


@dataclass(frozen=True)
class Step:
    """One module to write: the concatenated rows of `members`, padded, quantized to `target`."""

    entry: Entry
    members: tuple[Member, ...]
    target: Quantization | None
    extra_rows: int = 0
    extra_columns: int = 0

    @property
    def source_nbytes(self) -> int:
        """Bytes to read from the source."""
        return sum(info.nbytes for m in self.members for _, info in m.tensors.values())

    def nbytes(self, item_bytes: int) -> int:
        """Return the number of bytes to write, with floats of `item_bytes` bytes."""
        rows = sum(shape[0] for shape in self.entry.shapes) + self.extra_rows
        width = self.extra_columns + math.prod(self.entry.shapes[0][1:])
        size = rows * item_bytes if self.entry.bias else 0
        if self.target is None:
            return size + rows * width * item_bytes
        arrays = compute_packed_shapes((rows, width), self.target)
        return size + sum(
            math.prod(shape) * {"U32": 4, "U8": 1}.get(types[0], item_bytes)
            for shape, types in arrays.values()
        )


def match_tensors(tensors: Mapping[str, TensorInfo]) -> SourceTensors:
    """Return `tensors` by normalized name.

    Raises:
        CheckpointError: Two names are the same when normalized.
    """
    found: SourceTensors = {}
    for name, info in tensors.items():
        key = normalize_name(name)
        if key is None:
            continue
        if key in found:
            raise CheckpointError(f"tensors '{found[key][0]}' and '{name}' are the same one twice")
        found[key] = (name, info)
    return found


def read_quantization(settings: Mapping[str, Any]) -> dict[str, Quantization]:
    """Read the quantization of the source's modules, by normalized path; "" is the default.

    Args:
        settings: The source's config.json. mlx-vlm writes "quantization", with overrides by path.

    Raises:
        CheckpointError: It was quantized by another program, or the entry is damaged.
    """
    values = settings.get("quantization") or settings.get("quantization_config")
    if values is None:
        return {}
    if not isinstance(values, dict) or "quant_method" in values:
        method = values.get("quant_method") if isinstance(values, dict) else values
        raise CheckpointError(
            f"config.json: weights quantized by {shorten(method)} cannot be read; convert the "
            "checkpoint that they were made from"
        )
    result = {"": _parse_quantization(values, "quantization")}
    for path, value in values.items():
        if isinstance(value, dict):
            key = normalize_name(f"{path}.weight") or ""
            result[key.removesuffix(".weight")] = _parse_quantization(
                value, f"quantization, {path}"
            )
    return result


def _parse_quantization(values: Mapping[str, Any], where: str) -> Quantization:
    """Make a `Quantization` from `values`, called `where` in errors."""
    bits, group_size = values.get("bits"), values.get("group_size")
    mode = values.get("mode", "affine")
    if type(bits) is not int or type(group_size) is not int or not isinstance(mode, str):
        raise CheckpointError(
            f"config.json: {where} needs bits and group_size, not {shorten(dict(values))}"
        )
    is_supported = FLOAT_MODES.get(mode) == (bits, group_size)
    if mode == "affine":
        is_supported = bits in AFFINE_BITS and group_size in AFFINE_GROUPS
    if not is_supported:
        raise CheckpointError(
            f"config.json: {where} is {bits} bits in groups of {group_size}, mode {shorten(mode)}, "
            "which MLX cannot read"
        )
    return Quantization(bits, group_size, mode)


def make_steps(
    config: Config,
    found: SourceTensors,
    packing: Mapping[str, Quantization],
    wanted: Mapping[str, Quantization | None],
    overrides: Iterable[tuple[str, Quantization | None]] = (),
    expected: Sequence[Entry] | None = None,
) -> tuple[Config, list[Step]]:
    """Return the configuration to write, and a step for each of its modules, in order.

    Args:
        config: The source's, with `tie_word_embeddings` as its weights require.
        found: From `match_tensors`.
        packing: From `read_quantization`.
        wanted: From `choose_quantization`.
        overrides: Pairs of a pattern over paths and a quantization, see `ConvertOptions`.
        expected: The modules; None means those of a Hugging Face checkpoint.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape or type; a group size
            does not fit; or a pattern matches nothing.
    """
    steps, used = [], set()
    expected = list_entries(config) if expected is None else expected
    wanted = {**wanted, **match_overrides((e.path for e in expected if e.quantizable), overrides)}
    for entry in expected:
        members = tuple(
            _make_member(name, shape, entry, found, packing)
            for name, shape in zip(entry.members, entry.shapes, strict=True)
        )
        used |= {name for member in members for name, _ in member.tensors.values()}
        steps.append(_set_target(Step(entry, members, None), wanted))
    for name, _ in found.values():
        if name not in used:
            raise CheckpointError(f"tensor '{name}' is not part of an idefics3 or smolvlm model")
    return _pad_vision_mlp(config, steps)


def _make_member(
    path: str,
    shape: tuple[int, ...],
    entry: Entry,
    found: SourceTensors,
    packing: Mapping[str, Quantization],
) -> Member:
    """Make the source module at `path`, after checking its tensors against `shape`."""
    packed: Quantization | None = None
    floats = tuple(FLOATS)
    shapes = {
        "weight": ((shape, (shape[0], *shape[2:], shape[1])) if len(shape) == 4 else (shape,))
    }
    types = {"weight": floats}
    if f"{path}.scales" in found and len(shape) == 2:
        packed = packing.get(path, packing.get(""))
        if packed is None:
            raise CheckpointError(
                f"tensor '{found[f'{path}.scales'][0]}' belongs to quantized weights, and "
                "config.json has no quantization"
            )
        expected = compute_packed_shapes(shape, packed)
        shapes = {suffix: (one,) for suffix, (one, _) in expected.items()}
        types = {suffix: kinds for suffix, (_, kinds) in expected.items()}
    if entry.bias:
        shapes["bias"], types["bias"] = (shape[:1],), floats
    tensors = {}
    for suffix, allowed in shapes.items():
        if f"{path}.{suffix}" not in found:
            raise CheckpointError(
                f"tensor '{_guess_source_name(f'{path}.{suffix}', found)}' is missing"
            )
        name, info = found[f"{path}.{suffix}"]
        if info.shape not in allowed:
            raise CheckpointError(
                f"tensor '{name}' has shape {info.shape}; config.json asks for {allowed[0]}"
            )
        if info.dtype not in types[suffix]:
            raise CheckpointError(
                f"tensor '{name}' is stored as {info.dtype}; {', '.join(types[suffix])} can be read"
            )
        tensors[suffix] = (name, info)
    return Member(tensors, packed)


def _guess_source_name(key: str, found: SourceTensors) -> str:
    """Return the normalized name `key` in the style of similar names in the source."""
    top, rest = key.split(".", 1)
    for other, (name, _) in found.items():
        other_top, other_rest = other.split(".", 1) if "." in other else (other, "")
        if other_top == top and name.endswith(other_rest):
            return name.removesuffix(other_rest) + rest
    prefixed = any(name.startswith("model.") for name, _ in found.values())
    return f"model.{key}" if prefixed and top != "lm_head" else key


def _set_target(step: Step, wanted: Mapping[str, Quantization | None]) -> Step:
    """Set the target of `step`: `wanted` for its path, else its part, else as in the source."""
    if not step.entry.quantizable:
        return step
    for key in (step.entry.path, find_part(step.entry.path)):
        if key in wanted:
            return dataclasses.replace(step, target=wanted[key])
    kinds = {member.quantization for member in step.members}
    if len(kinds) == 1:
        return dataclasses.replace(step, target=kinds.pop())
    packed = [kind for kind in kinds if kind is not None]
    if len(packed) < len(kinds):
        return step  # if one member is float, all become float
    return dataclasses.replace(step, target=max(packed, key=lambda q: (q.bits, -q.group_size)))


def _pad_vision_mlp(config: Config, steps: list[Step]) -> tuple[Config, list[Step]]:
    """Pad the vision MLP to whole groups, in the configuration and in the steps.

    A hidden unit with zero weights and bias gives gelu(0) = 0, so the output stays the same.
    """
    vision = config.vision
    sizes = [
        step.target.group_size
        for step in steps
        if step.target is not None and step.entry.path.endswith(".mlp.fc2")
    ]
    extra = -vision.intermediate_size % max(sizes, default=1)
    result = []
    for step in steps:
        if extra and step.entry.path.endswith(".mlp.fc1"):
            step = dataclasses.replace(step, extra_rows=extra)
        elif extra and step.entry.path.endswith(".mlp.fc2"):
            step = dataclasses.replace(step, extra_columns=extra)
        if step.target is not None:
            check_width(step.entry.path, step.entry.width + step.extra_columns, step.target)
        result.append(step)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(vision, intermediate_size=vision.intermediate_size + extra),
        quantization=summarize_quantization(
            {s.entry.path: s.target for s in steps if s.entry.quantizable}
        ),
    )
    return config, result


def find_usual_dtype(steps: list[Step]) -> str:
    """Return the float type of most of the source's bytes."""
    sizes: Counter[str] = Counter()
    for info in _list_infos(steps):
        if info.dtype in FLOATS:
            sizes[FLOATS[info.dtype]] += info.nbytes
    return sizes.most_common(1)[0][0]


def _list_infos(steps: list[Step]) -> Iterator[TensorInfo]:
    """List the source tensors of `steps`."""
    for step in steps:
        for member in step.members:
            for _, info in member.tensors.values():
                yield info
