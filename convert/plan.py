"""Source tensors matched with the modules that the configuration asks for.

Everything is checked here, from the headers alone, before a weight is read or a
byte is written.
"""

from __future__ import annotations

import dataclasses
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

SourceTensors = dict[str, tuple[str, TensorInfo]]  # canonical name -> name in the source, place


@dataclass(frozen=True)
class Member:
    """A source module: its tensors by suffix ("weight", "scales", ...) and how it is packed."""

    tensors: Mapping[str, tuple[str, TensorInfo]]
    quantization: Quantization | None


@dataclass(frozen=True)
class Step:
    """One module to write: `members` one below the other, padded, packed as `target` says."""

    entry: Entry
    members: tuple[Member, ...]
    target: Quantization | None
    extra_rows: int = 0
    extra_columns: int = 0

    @property
    def source_nbytes(self) -> int:
        """Bytes to read for it."""
        return sum(info.nbytes for m in self.members for _, info in m.tensors.values())

    def nbytes(self, item_bytes: int) -> int:
        """Bytes that it will take, with floats of `item_bytes` bytes."""
        rows = sum(shape[0] for shape in self.entry.shapes) + self.extra_rows
        width = self.extra_columns
        width += _count(self.entry.shapes[0][1:])
        size = rows * item_bytes if self.entry.bias else 0
        if self.target is None:
            return size + rows * width * item_bytes
        arrays = compute_packed_shapes((rows, width), self.target)
        return size + sum(
            _count(shape) * {"U32": 4, "U8": 1}.get(types[0], item_bytes)
            for shape, types in arrays.values()
        )


def _count(shape: tuple[int, ...]) -> int:
    """How many numbers an array of `shape` holds."""
    result = 1
    for side in shape:
        result *= side
    return result


def match_tensors(tensors: Mapping[str, TensorInfo]) -> SourceTensors:
    """`tensors` by their canonical names.

    Raises:
        CheckpointError: Two of them are the same tensor in two styles.
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
    """How the source's packed modules are packed, by canonical path; "" is the usual way.

    Args:
        settings: Its config.json; mlx-vlm writes "quantization", with exceptions by path.

    Raises:
        CheckpointError: It was quantized by something else, or the entry is damaged.
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
    """`values` as a Quantization."""
    bits, group_size = values.get("bits"), values.get("group_size")
    mode = values.get("mode", "affine")
    if type(bits) is not int or type(group_size) is not int or not isinstance(mode, str):
        raise CheckpointError(
            f"config.json: {where} needs bits and group_size, not {shorten(dict(values))}"
        )
    known = FLOAT_MODES.get(mode) == (bits, group_size)
    if mode == "affine":
        known = bits in AFFINE_BITS and group_size in AFFINE_GROUPS
    if not known:
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
    """The configuration to write and the steps that write its modules, in order.

    Args:
        config: Of the source, its `tie_word_embeddings` settled.
        packing: From `source_quantization`.
        wanted: Quantization by part; a part that is absent stays as it is.
        overrides: Patterns over paths and what their modules get, see `ConvertOptions`.
        expected: The modules; None is those of a Hugging Face checkpoint.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or type, a group
            size does not fit, or a pattern matches nothing.
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
    """The source module at `path`, its tensors checked against `shape`."""
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
    """The canonical name `key` in the style that its neighbors have in the source."""
    top, rest = key.split(".", 1)
    for other, (name, _) in found.items():
        other_top, other_rest = other.split(".", 1) if "." in other else (other, "")
        if other_top == top and name.endswith(other_rest):
            return name.removesuffix(other_rest) + rest
    prefixed = any(name.startswith("model.") for name, _ in found.values())
    return f"model.{key}" if prefixed and top != "lm_head" else key


def _set_target(step: Step, wanted: Mapping[str, Quantization | None]) -> Step:
    """`step` with what is wanted for its path, else its part, else as its members are."""
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
        return step  # a member is float: so are all
    return dataclasses.replace(step, target=max(packed, key=lambda q: (q.bits, -q.group_size)))


def _pad_vision_mlp(config: Config, steps: list[Step]) -> tuple[Config, list[Step]]:
    """The final configuration and steps: the vision MLP padded to whole groups.

    A hidden unit whose weights and bias are 0 gives gelu(0) = 0, so it changes nothing.
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
    """The float type that most bytes of the source have."""
    sizes: Counter[str] = Counter()
    for info in _list_infos(steps):
        if info.dtype in FLOATS:
            sizes[FLOATS[info.dtype]] += info.nbytes
    return sizes.most_common(1)[0][0]


def _list_infos(steps: list[Step]) -> Iterator[TensorInfo]:
    """Every source tensor of `steps`."""
    for step in steps:
        for member in step.members:
            for _, info in member.tensors.values():
                yield info
