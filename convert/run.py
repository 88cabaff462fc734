"""Convert a source to a checkpoint folder of this package's format."""

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
    """Build the arrays of the module of `step`, by suffix, with floats of type `dtype`."""
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
    """Concatenate the biases of the members; an empty dict if there are none."""
    return {"bias": mx.concatenate(parts)} if parts else {}


def _join_packed(step: Step, weights: WeightFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Concatenate the rows of the step's packed members without unpacking them."""
    assert step.target is not None
    rows = [
        {s: weights.read(name) for s, (name, _) in member.tensors.items() if s != "bias"}
        for member in step.members
    ]
    if step.extra_rows:
        rows.append(pack(mx.zeros((step.extra_rows, step.entry.width), dtype), step.target))
    arrays = {suffix: mx.concatenate([one[suffix] for one in rows]) for suffix in rows[0]}
    return {
        suffix: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for suffix, array in arrays.items()
    }


def _read_float_weight(member: Member, weights: WeightFiles, dtype: mx.Dtype) -> mx.array:
    """Read the member's weight as floats of type `dtype`."""
    arrays = {s: weights.read(name) for s, (name, _) in member.tensors.items() if s != "bias"}
    if member.quantization is None:
        return arrays["weight"].astype(dtype)
    return unpack(arrays, member.quantization, dtype)


Progress = Callable[[int, int, str], None]  # bytes done, total bytes, current module


def convert_checkpoint(
    source: str | Path | Source,
    dest: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    force: bool = False,
) -> Path:
    """Convert `source` to this package's format and return the folder `dest`.

    Args:
        source: A Hugging Face or mlx-vlm folder, a GGUF file of SmolLM2, a hub id, or the result of
            `open_source`.
        dest: A folder that does not exist or is empty.
        options: Precision; None keeps the source's.
        progress: Called after each module with the source bytes done, the total bytes and the
            module's path.
        offline: Look up hub ids in the local cache only.
        force: Replace a checkpoint of this format at `dest`.

    Raises:
        CheckpointError: The source cannot be converted, or `dest` is in use or cannot be written;
            nothing is left behind.
    """
    dest = expand_path(dest, CheckpointError)
    options = options or ConvertOptions()
    check_destination(dest, force)
    plan = plan_checkpoint(open_source(source, offline), options)
    return write_checkpoint(plan, dest, progress, force)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `write_checkpoint` will write.

    Attributes:
        source: The checkpoint to convert.
        config: Contents of the new config.json.
        template: The chat template.
        steps: The modules to write, in order.
        origin: Contents of the new origin.json.
        replacements: Arrays to write instead of computed ones, by module path and suffix.
    """

    source: Source
    config: Config
    template: str
    steps: list[Step]
    origin: Origin
    replacements: Mapping[str, Mapping[str, mx.array]] = dataclasses.field(default_factory=dict)

    def replace_arrays(self, arrays: Mapping[str, Mapping[str, mx.array]]) -> Plan:
        """Return a copy with `arrays`, by module path and suffix, added to `replacements`."""
        old = self.replacements
        merged = {path: {**old.get(path, {}), **new} for path, new in arrays.items()}
        return dataclasses.replace(self, replacements={**old, **merged})

    def build(self, step: Step) -> dict[str, mx.array]:
        """Build the arrays of the module of `step`, by suffix, using `replacements`."""
        dtype: mx.Dtype = getattr(mx, self.config.dtype)
        replacements = self.replacements.get(step.entry.path, {})
        arrays = build_arrays(step, self.source.weights, dtype)
        return arrays | {
            suffix: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            for suffix, array in replacements.items()
        }


def plan_checkpoint(source: Source, options: ConvertOptions) -> Plan:
    """Plan the conversion of `source` with `options`, from headers.

    Weights are read only to compare an output head with the embeddings it should be tied to.

    Raises:
        CheckpointError: The source cannot be converted, or not with these options.
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
    """Write the checkpoint of `plan` and return `dest`.

    Args:
        plan: From `plan_checkpoint`.
        dest: The folder to write.
        progress: Called with the bytes done, the total bytes and the path of the current module.
        force: Replace a checkpoint of this format at `dest`.

    Raises:
        CheckpointError: `dest` is in use or cannot be written, or the source changed after it was
            opened. Nothing is left behind.
    """
    item_bytes = 4 if plan.config.dtype == "float32" else 2
    with stage_folder(dest, force) as folder:
        _check_space(folder, sum(step.nbytes(item_bytes) for step in plan.steps))
        writer = FolderWriter(folder)
        try:
            _write_weights(plan, writer, progress)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{plan.source.folder} cannot be converted: {error}") from None
        writer.write_text(TOKENIZER_FILE, plan.source.read_text(TOKENIZER_FILE, LARGEST_FILE))
        writer.write_text(TEMPLATE_FILE, plan.template)
        writer.write_text(ORIGIN_FILE, _format_json(plan.origin.to_dict()))
        writer.write_text(CONFIG_FILE, _format_json(plan.config.to_dict()))
        plan.source.check_unchanged()
        writer.finish()
    return dest


def _format_json(values: Mapping[str, Any]) -> str:
    """Format `values` as the text of a JSON file."""
    return json.dumps(values, indent=2) + "\n"


def _settle_tie(config: Config, found: SourceTensors, source: Source) -> Config:
    """Set `tie_word_embeddings` as the weights require; modifies `found` in place.

    A head that is declared tied but also stored is dropped from `found` if it equals the
    embeddings. If it differs, it is used, as in transformers.
    """
    if not config.text.tie_word_embeddings:
        return config
    heads = {key.removeprefix("lm_head."): key for key in found if key.startswith("lm_head.")}
    if "text_model.embed_tokens.weight" not in found:  # only the head was saved
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
    """Raise CheckpointError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the checkpoint takes "
            f"{needed / 1e9:.1f} GB"
        )


def _write_weights(plan: Plan, writer: FolderWriter, progress: Progress | None) -> None:
    """Write every tensor of `plan` with `writer`."""
    shards = ShardWriter(writer)
    done, total = 0, sum(step.source_nbytes for step in plan.steps)
    for step in plan.steps:
        arrays = plan.build(step)
        mx.eval(arrays)
        shards.add({f"{step.entry.path}.{suffix}": a for suffix, a in arrays.items()})
        del arrays
        mx.clear_cache()  # Metal keeps freed buffers otherwise
        done += step.source_nbytes
        if progress is not None:
            progress(done, total, step.entry.path)
    shards.finish()
