"""Weights read, joined and packed, one module at a time."""

from __future__ import annotations

import mlx.core as mx

from mlx_smolvlm.convert.plan import Member, Step
from mlx_smolvlm.convert.quantize import pack, unpack
from mlx_smolvlm.safetensors import WeightFiles


def build(step: Step, weights: WeightFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The arrays of the module that `step` describes, by suffix, floats as `dtype`."""
    bias = []
    if step.entry.bias:
        bias = [weights.read(member.tensors["bias"][0]).astype(dtype) for member in step.members]
        bias += [mx.zeros((step.extra_rows,), dtype)] if step.extra_rows else []
    target, packed = step.target, {member.packed for member in step.members}
    if target is not None and packed == {target} and not step.extra_columns:
        return _packed_rows(step, weights, dtype) | _bias(bias)
    matrices = [_float_weight(member, weights, dtype) for member in step.members]
    weight = matrices[0] if len(matrices) == 1 else mx.concatenate(matrices)
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


def _packed_rows(step: Step, weights: WeightFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The packed arrays of the step's members, one below the other, without unpacking them."""
    assert step.target is not None
    rows = [
        {s: weights.read(name) for s, (name, _) in member.tensors.items() if s != "bias"}
        for member in step.members
    ]
    if step.extra_rows:
        rows.append(pack(mx.zeros((step.extra_rows, step.entry.width), dtype), step.target))
    joined = {suffix: mx.concatenate([one[suffix] for one in rows]) for suffix in rows[0]}
    return {
        suffix: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for suffix, array in joined.items()
    }


def _float_weight(member: Member, weights: WeightFiles, dtype: mx.Dtype) -> mx.array:
    """The member's weight as floats of type `dtype`."""
    arrays = {s: weights.read(name) for s, (name, _) in member.tensors.items() if s != "bias"}
    if member.packed is None:
        return arrays["weight"].astype(dtype)
    return unpack(arrays, member.packed, dtype)
