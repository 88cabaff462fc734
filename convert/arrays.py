"""Weights read, joined and packed, one module at a time."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_smolvlm.convert.plan import Member, Step
from mlx_smolvlm.convert.quantize import pack, unpack
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.safetensors import TensorInfo, load_tensors


class Reader:
    """Tensors of safetensors files; what has been taken is not kept."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, mx.array]] = {}

    def take(self, name: str, info: TensorInfo) -> mx.array:
        """The tensor `name`, not yet read.

        Raises:
            CheckpointError: The file cannot be read, or is not what its header was.
        """
        if info.file not in self._files:
            try:
                self._files[info.file] = load_tensors(info.file)
            except CheckpointError as error:  # its header was whole when the plan was made
                raise CheckpointError(f"{info.file} changed while it was read: {error}") from None
        array = self._files[info.file].pop(name, None)
        if array is None or array.shape != info.shape:
            raise CheckpointError(f"{info.file} changed while it was read; convert it again")
        return array


def build(step: Step, reader: Reader, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The arrays of the module that `step` describes, by suffix, floats as `dtype`."""
    bias = []
    if step.entry.bias:
        bias = [reader.take(*member.tensors["bias"]).astype(dtype) for member in step.members]
        bias += [mx.zeros((step.extra_rows,), dtype)] if step.extra_rows else []
    target, packed = step.target, {member.packed for member in step.members}
    if target is not None and packed == {target} and not step.extra_columns:
        return _packed_rows(step, reader, dtype) | _bias(bias)
    weights = [_float_weight(member, reader, dtype) for member in step.members]
    weight = weights[0] if len(weights) == 1 else mx.concatenate(weights)
    if weight.ndim == 4:  # the patch embedding
        if weight.shape[1:] == step.entry.shapes[0][1:]:  # (V, 3, p, p), transformers' layout
            weight = weight.transpose(0, 2, 3, 1)
        weight = weight.reshape(weight.shape[0], -1)  # (V, p*p*3)
    if step.extra_rows or step.extra_columns:
        weight = mx.pad(weight, [(0, step.extra_rows), (0, step.extra_columns)])
    arrays = {"weight": mx.contiguous(weight)} if target is None else pack(weight, target)
    return arrays | _bias(bias)


def _bias(parts: list[mx.array]) -> dict[str, mx.array]:
    """`parts` joined, under the name that a module gives it; nothing if there are none."""
    return {"bias": mx.concatenate(parts)} if parts else {}


def _packed_rows(step: Step, reader: Reader, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The packed arrays of the step's members, one below the other, without unpacking them."""
    assert step.target is not None
    rows = [
        {s: reader.take(*place) for s, place in member.tensors.items() if s != "bias"}
        for member in step.members
    ]
    if step.extra_rows:
        rows.append(pack(mx.zeros((step.extra_rows, step.entry.width), dtype), step.target))
    joined = {suffix: mx.concatenate([one[suffix] for one in rows]) for suffix in rows[0]}
    return {
        suffix: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for suffix, array in joined.items()
    }


def _float_weight(member: Member, reader: Reader, dtype: mx.Dtype) -> mx.array:
    """The member's weight as floats of type `dtype`."""
    arrays = {s: reader.take(*place) for s, place in member.tensors.items() if s != "bias"}
    if member.packed is None:
        return arrays["weight"].astype(dtype)
    return unpack(arrays, member.packed, dtype)
