"""From a source to a folder of this package's format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_smolvlm.checkpoint.headers import WeightFiles
from mlx_smolvlm.checkpoint.load import (
    CONFIG_FILE,
    LARGEST_TEMPLATE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
)
from mlx_smolvlm.checkpoint.provenance import ORIGIN_FILE, Origin
from mlx_smolvlm.checkpoint.writer import FolderWriter, ShardWriter, check_destination, stage_folder
from mlx_smolvlm.config import Config, Quantization
from mlx_smolvlm.convert.card import trace_origin
from mlx_smolvlm.convert.hf_config import read_hf_config
from mlx_smolvlm.convert.hf_processor import read_template
from mlx_smolvlm.convert.names import list_entries, list_own_entries
from mlx_smolvlm.convert.options import ConvertOptions, choose_quantization, pack, unpack
from mlx_smolvlm.convert.plan import (
    Member,
    SourceTensors,
    Step,
    find_usual_dtype,
    make_steps,
    match_tensors,
    read_quantization,
)
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.prompt.tokenizer import LARGEST_FILE


def build_arrays(step: Step, weights: WeightFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The arrays of the module that `step` describes, by suffix, floats as `dtype`."""
    bias = []
    if step.entry.bias:
        bias = [weights.read(member.tensors["bias"][0]).astype(dtype) for member in step.members]
        bias += [mx.zeros((step.extra_rows,), dtype)] if step.extra_rows else []
    target, packed = step.target, {member.quantization for member in step.members}
    if target is not None and packed == {target} and not step.extra_columns:
        return _join_packed(step, weights, dtype) | _join_biases(bias)
    matrices = [_read_float_weight(member, weights, dtype) for member in step.members]
    weight = matrices[0] if len(matrices) == 1 else mx.concatenate(matrices)
    if weight.ndim == 4:  # the patch embedding
        if weight.shape[1:] == step.entry.shapes[0][1:]:  # (V, 3, p, p), transformers' layout
            weight = weight.transpose(0, 2, 3, 1)
        weight = weight.reshape(weight.shape[0], -1)  # (V, p*p*3)
    if step.extra_rows or step.extra_columns:
        weight = mx.pad(weight, [(0, step.extra_rows), (0, step.extra_columns)])
    arrays = {"weight": mx.contiguous(weight)} if target is None else pack(weight, target)
    return arrays | _join_biases(bias)


def _join_biases(parts: list[mx.array]) -> dict[str, mx.array]:
    """`parts` joined, under the name that a module gives it; nothing if there are none."""
    return {"bias": mx.concatenate(parts)} if parts else {}


def _join_packed(step: Step, weights: WeightFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
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


def _read_float_weight(member: Member, weights: WeightFiles, dtype: mx.Dtype) -> mx.array:
    """The member's weight as floats of type `dtype`."""
    arrays = {s: weights.read(name) for s, (name, _) in member.tensors.items() if s != "bias"}
    if member.quantization is None:
        return arrays["weight"].astype(dtype)
    return unpack(arrays, member.quantization, dtype)


Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, module at hand


def convert_checkpoint(
    source: str | Path | Source,
    dest: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    force: bool = False,
) -> Path:
    """The folder `dest`, which holds the checkpoint `source` in this package's format.

    Args:
        source: A Hugging Face or mlx-vlm folder, a GGUF file of SmolLM2, a hub id, or what
            `open_source` made of one.
        dest: A folder that is absent or empty.
        options: Precision; None keeps the source's.
        progress: Called after each module with the bytes of the source done, the bytes
            in all, and the module's name.
        offline: Take a hub id from the local cache alone.
        force: Replace a checkpoint of this format at `dest`.

    Raises:
        CheckpointError: The source is not usable or `dest` is taken; nothing is written.
    """
    dest = expand_path(dest, CheckpointError)
    options = options or ConvertOptions()
    check_destination(dest, force)
    opened = open_source(source, offline)
    return write_checkpoint(plan_checkpoint(opened, options), dest, progress, force)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that `write_checkpoint` needs, checked.

    `replacements` holds arrays to write instead of the computed ones, by module path.
    """

    source: Source
    config: Config
    template: str
    steps: list[Step]
    origin: Origin
    replacements: Mapping[str, Mapping[str, mx.array]] = dataclasses.field(default_factory=dict)

    def replace_arrays(self, arrays: Mapping[str, Mapping[str, mx.array]]) -> Plan:
        """Return a plan that also writes `arrays`, by module path and suffix."""
        old = self.replacements
        merged = {path: {**old.get(path, {}), **new} for path, new in arrays.items()}
        return dataclasses.replace(self, replacements={**old, **merged})

    def build(self, step: Step) -> dict[str, mx.array]:
        """The arrays of the module that `step` describes, by suffix."""
        dtype: mx.Dtype = getattr(mx, self.config.dtype)
        replacements = self.replacements.get(step.entry.path, {})
        arrays = build_arrays(step, self.source.weights, dtype)
        return arrays | {
            suffix: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            for suffix, array in replacements.items()
        }


def plan_checkpoint(source: Source, options: ConvertOptions) -> Plan:
    """What converting `source` under `options` will write; only headers are read.

    Raises:
        CheckpointError: The source is not usable, or the options do not fit it.
    """
    wanted = choose_quantization(options)
    packing: dict[str, Quantization] = {}
    if source.is_own:
        settings = Config.from_dict(source.read_json(CONFIG_FILE))
        if settings.quantization.is_quantized:
            raise CheckpointError(
                f"{source.folder} is already a quantized mlx-smolvlm checkpoint; convert its "
                "source again for another precision"
            )
        template = source.read_text(TEMPLATE_FILE, LARGEST_TEMPLATE)
        found = match_tensors(source.weights.tensors)
        expected = list_own_entries(settings)
    else:
        settings, template = read_hf_config(source), read_template(source)
        found = match_tensors(source.weights.tensors)
        settings = _settle_tie(settings, found, source)
        packing = read_quantization(source.read_json(CONFIG_FILE))
        expected = list_entries(settings)
    config, steps = make_steps(settings, found, packing, wanted, options.overrides, expected)
    config = dataclasses.replace(config, dtype=options.dtype or find_usual_dtype(steps))
    config.check()
    return Plan(source, config, template, steps, trace_origin(source))


def write_checkpoint(plan: Plan, dest: Path, progress: Progress | None, force: bool) -> Path:
    """The folder `dest`, written as `plan` says.

    Raises:
        CheckpointError: The disk refuses, `dest` is taken, or the source has changed
            since it was planned; nothing is left behind.
    """
    item_bytes = 4 if plan.config.dtype == "float32" else 2
    with stage_folder(dest, force) as folder:
        _check_space(folder, sum(step.nbytes(item_bytes) for step in plan.steps))
        outbox = FolderWriter(folder)
        try:
            _write_weights(plan, outbox, progress)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{plan.source.folder} cannot be converted: {error}") from None
        outbox.write_text(TOKENIZER_FILE, plan.source.read_text(TOKENIZER_FILE, LARGEST_FILE))
        outbox.write_text(TEMPLATE_FILE, plan.template)
        outbox.write_text(ORIGIN_FILE, _format_json(plan.origin.to_dict()))
        outbox.write_text(CONFIG_FILE, _format_json(plan.config.to_dict()))
        plan.source.check_unchanged()
        outbox.finish()
    return dest


def _format_json(values: Mapping[str, Any]) -> str:
    """`values` as the text of a file."""
    return json.dumps(values, indent=2) + "\n"


def _settle_tie(config: Config, found: SourceTensors, source: Source) -> Config:
    """`config` with `tie_word_embeddings` as the weights bear out, and `found` without a copy.

    A head that is declared tied and stored as well is dropped if it equals the
    embeddings; if it differs, it is used, as transformers does.
    """
    if not config.text.tie_word_embeddings:
        return config
    heads = {key.removeprefix("lm_head."): key for key in found if key.startswith("lm_head.")}
    if "text_model.embed_tokens.weight" not in found:  # the other of the two was saved
        found.update({f"text_model.embed_tokens.{s}": found.pop(k) for s, k in heads.items()})
        return config
    if not heads:
        return config
    pairs = [(found[key], found.get(f"text_model.embed_tokens.{s}")) for s, key in heads.items()]
    read = source.weights.read
    if all(
        other is not None
        and other[1].shape == head[1].shape
        and mx.array_equal(read(head[0]), read(other[0])).item()
        for head, other in pairs
    ):
        for key in heads.values():
            del found[key]
        return config
    text = dataclasses.replace(config.text, tie_word_embeddings=False)
    return dataclasses.replace(config, text=text)


def _check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the checkpoint takes "
            f"{needed / 1e9:.1f} GB"
        )


def _write_weights(plan: Plan, outbox: FolderWriter, progress: Progress | None) -> None:
    """Write every tensor of `plan` into `outbox`."""
    writer = ShardWriter(outbox)
    done, total = 0, sum(step.source_nbytes for step in plan.steps)
    for step in plan.steps:
        arrays = plan.build(step)
        mx.eval(arrays)
        writer.add({f"{step.entry.path}.{suffix}": a for suffix, a in arrays.items()})
        del arrays
        mx.clear_cache()  # Metal keeps freed buffers otherwise
        done += step.source_nbytes
        if progress is not None:
            progress(done, total, step.entry.path)
    writer.finish()
