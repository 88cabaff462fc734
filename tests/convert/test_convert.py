"""Hugging Face and mlx-vlm folders become ours: names, fusion, shards, refusals."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint import writer
from mlx_smolvlm.checkpoint.headers import TensorInfo, read_headers
from mlx_smolvlm.checkpoint.load import build_model, load_model, read_config
from mlx_smolvlm.convert.hf_config import read_hf_config
from mlx_smolvlm.convert.names import list_entries
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.plan import make_steps, match_tensors
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf


def stored(folder: Path) -> dict[str, mx.array]:
    result = {}
    for file in folder.glob("*.safetensors"):
        result |= mx.load(str(file))
    return result


def expected(source: dict[str, mx.array]) -> dict[str, mx.array]:
    """What conversion must write for `source` when nothing is quantized, written out by hand."""
    old = {name.removeprefix("model."): array for name, array in source.items()}
    result = {}
    for name, array in old.items():
        head, _, suffix = name.rpartition(".")
        if head.endswith(("k_proj", "v_proj", "up_proj")):
            continue
        if head.endswith("q_proj"):
            base = head.removesuffix("q_proj")
            parts = [old[f"{base}{letter}_proj.{suffix}"] for letter in "qkv"]
            name, array = f"{base}qkv_proj.{suffix}", mx.concatenate(parts)
        elif head.endswith("gate_proj"):
            base = head.removesuffix("gate_proj")
            parts = [array, old[f"{base}up_proj.{suffix}"]]
            name, array = f"{base}gate_up_proj.{suffix}", mx.concatenate(parts)
        elif head.endswith("patch_embedding") and suffix == "weight":
            flat = np.array(array).transpose(0, 2, 3, 1)
            array = mx.array(flat.reshape(flat.shape[0], -1))
        result[name] = array
    return result


def assert_same(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array).item(), name


def plain(tensors):
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def nested(tensors):
    return {
        name if name.startswith("lm_head") else f"model.{name}": array
        for name, array in tensors.items()
    }


def mlx_vlm_nested(tensors):
    renamed = hf.mlx_vlm_weights(tensors)
    return {
        name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("language_model.") and "lm_head" not in name
        else name: array
        for name, array in renamed.items()
    }


STYLES = [lambda t: t, plain, nested, hf.mlx_vlm_weights, mlx_vlm_nested]


@pytest.mark.parametrize("style", STYLES, ids=["hf", "plain", "nested", "mlx-vlm", "mlx-vlm2"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_key_style_gives_the_same_fused_arrays(tmp_path, style, shards):
    tensors = hf.weights(hf.settings())
    source = hf.make(tmp_path / "source", tensors=style(tensors), shards=shards)
    out = convert_checkpoint(source, tmp_path / "out")
    assert_same(stored(out), expected(tensors))
    config = read_config(out)
    assert (config.source, config.dtype, config.eos_token_ids) == ("source", "float32", (61,))
    assert (out / "chat_template.jinja").read_text() == hf.TEMPLATE
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_the_source_dtype_is_kept_and_exact(tmp_path, dtype):
    tensors = hf.weights(hf.settings(), dtype)
    out = convert_checkpoint(hf.make(tmp_path / "s", tensors=tensors), tmp_path / "out")
    assert_same(
        stored(out),
        {
            name: array.astype(dtype)
            for name, array in expected(
                {k: v.astype(mx.float32) for k, v in tensors.items()}
            ).items()
        },
    )


def test_mixed_dtypes_become_the_one_that_most_bytes_have(tmp_path):
    tensors = hf.weights(hf.settings(), mx.bfloat16)
    by_size = sorted(tensors, key=lambda name: tensors[name].size)
    for name in by_size[: len(by_size) * 3 // 5]:  # norms, biases and more: most of the tensors
        tensors[name] = tensors[name].astype(mx.float32)
    source = hf.make(tmp_path / "s", tensors=tensors)
    out = convert_checkpoint(source, tmp_path / "out")
    assert read_config(out).dtype == "bfloat16"
    assert {array.dtype for array in stored(out).values()} == {mx.bfloat16}
    wide = convert_checkpoint(source, tmp_path / "wide", ConvertOptions(dtype="float32"))
    assert {array.dtype for array in stored(wide).values()} == {mx.float32}


def test_the_converted_model_loads_and_equals_the_source(tmp_path):
    tensors = hf.weights(hf.settings())
    model = load_model(convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out"))
    assert_same(dict(tree_flatten(model.parameters())), expected(tensors))


def test_output_shards_have_an_index_that_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_headers(out))
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in read_headers(out).values())
    assert max((out / name).stat().st_size for name in names) < 110_000
    assert_same(stored(out), expected(hf.weights(hf.settings())))
    load_model(out)


def test_progress_counts_every_byte_of_the_source(tmp_path):
    seen = []
    source = hf.make(tmp_path / "s")
    convert_checkpoint(source, tmp_path / "out", progress=lambda *call: seen.append(call))
    total = sum(info.nbytes for info in read_headers(source).values())
    assert {call[1] for call in seen} == {total}
    assert seen[-1][0] == total
    assert [call[0] for call in seen] == sorted(call[0] for call in seen)
    assert "text_model.layers.1.mlp.gate_up_proj" in {call[2] for call in seen}


# Tied and untied heads


@pytest.mark.parametrize("place", ["tie_word_embeddings", "text__tie_word_embeddings"])
def test_a_tied_checkpoint_has_no_head(tmp_path, place):
    values = hf.settings(**{place: True})
    out = convert_checkpoint(hf.make(tmp_path / "s", values), tmp_path / "out")
    assert "lm_head.weight" not in stored(out)
    assert read_config(out).text.tie_word_embeddings is True
    load_model(out)


@pytest.mark.parametrize(("copy", "tied"), [(True, True), (False, False)])
def test_a_stored_head_that_is_declared_tied_is_compared(tmp_path, copy, tied):
    values = hf.settings(tie_word_embeddings=True)
    tensors = hf.weights(values)
    embeddings = tensors["model.text_model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embeddings if copy else embeddings + 1
    out = convert_checkpoint(hf.make(tmp_path / "s", values, tensors), tmp_path / "out")
    assert read_config(out).text.tie_word_embeddings is tied
    assert ("lm_head.weight" in stored(out)) is not tied


def test_a_tied_checkpoint_may_have_saved_the_head_alone(tmp_path):
    values = hf.settings(tie_word_embeddings=True)
    tensors = hf.weights(values)
    kept = tensors["lm_head.weight"] = tensors.pop("model.text_model.embed_tokens.weight")
    out = convert_checkpoint(hf.make(tmp_path / "s", values, tensors), tmp_path / "out")
    assert mx.array_equal(stored(out)["text_model.embed_tokens.weight"], kept)


def test_an_untied_checkpoint_without_a_head_is_refused(tmp_path):
    tensors = hf.weights(hf.settings())
    del tensors["lm_head.weight"]
    source = hf.make(tmp_path / "s", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        convert_checkpoint(source, tmp_path / "out")


# Strictness


def refused(tmp_path: Path, tensors: dict[str, mx.array], match: str) -> None:
    source = hf.make(tmp_path / "s", tensors=tensors)
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_each_missing_tensor_is_named_as_the_source_would(tmp_path):
    tensors = hf.weights(hf.settings())
    headers = {n: TensorInfo(Path("x"), "F32", tuple(a.shape)) for n, a in tensors.items()}
    config = read_hf_config(Source(hf.make(tmp_path / "s"), "s"))
    for style in (lambda t: t, hf.mlx_vlm_weights, mlx_vlm_nested):
        names = list(style(dict.fromkeys(tensors, mx.zeros(()))))
        renamed = dict(zip(names, headers.values(), strict=True))
        for name in renamed:
            rest = {other: info for other, info in renamed.items() if other != name}
            with pytest.raises(CheckpointError) as error:
                make_steps(config, match_tensors(rest), {}, {})
            known = "lm_head.weight" if "lm_head" in name else name  # it has no neighbor
            assert str(error.value) == f"tensor '{known}' is missing"


def test_each_misshapen_tensor_is_named(tmp_path):
    tensors = hf.weights(hf.settings())
    headers = {n: TensorInfo(Path("x"), "F32", tuple(a.shape)) for n, a in tensors.items()}
    config = read_hf_config(Source(hf.make(tmp_path / "s"), "s"))
    make_steps(config, match_tensors(headers), {}, {})
    for name, info in headers.items():
        wrong = headers | {name: replace(info, shape=(info.shape[0] + 1, *info.shape[1:]))}
        with pytest.raises(CheckpointError, match=f"'{name}' has shape"):
            make_steps(config, match_tensors(wrong), {}, {})


def test_an_extra_tensor_is_refused(tmp_path):
    tensors = hf.weights(hf.settings()) | {"model.vision_model.head.weight": mx.zeros((2,))}
    refused(tmp_path, tensors, r"'model\.vision_model\.head\.weight' is not part of")


def test_known_buffers_are_skipped(tmp_path):
    tensors = hf.weights(hf.settings())
    extra = {
        "model.text_model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((8,)),
        "model.text_model.rotary_emb.inv_freq": mx.zeros((8,)),
        "model.vision_model.embeddings.position_ids": mx.zeros((1, 16), mx.int64),
    }
    out = convert_checkpoint(hf.make(tmp_path / "s", tensors=tensors | extra), tmp_path / "out")
    assert_same(stored(out), expected(tensors))


def test_one_tensor_in_two_styles_is_refused(tmp_path):
    tensors = hf.weights(hf.settings())
    tensors["text_model.norm.weight"] = tensors["model.text_model.norm.weight"]
    refused(tmp_path, tensors, "the same one twice")


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8])
def test_weights_of_another_type_are_refused(tmp_path, dtype):
    tensors = hf.weights(hf.settings())
    tensors["model.text_model.norm.weight"] = mx.zeros((64,), dtype)
    refused(tmp_path, tensors, r"'model\.text_model\.norm\.weight' is stored as")


def test_weights_that_are_not_finite_pass(tmp_path):
    tensors = hf.weights(hf.settings())
    tensors["model.text_model.norm.weight"] = mx.array([float("nan"), float("inf")] * 32)
    source = hf.make(tmp_path / "s", tensors=tensors)
    convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4))
    found = stored(tmp_path / "out")["text_model.norm.weight"]
    assert mx.isnan(found[0]).item()
    assert mx.isinf(found[1]).item()


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -5000])
def test_a_truncated_file_is_refused(tmp_path, cut):
    source = hf.make(tmp_path / "s")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    source = hf.make(tmp_path / "s")
    write_header(source / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert_checkpoint(source, tmp_path / "out")


def edit_index(source: Path, **changes: str) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../s2/model.safetensors", "/etc/passwd", "sub/x.safetensors", "config.json", ".."]
)
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    source = hf.make(tmp_path / "s", shards=2)
    edit_index(source, **{"model.text_model.norm.weight": name})
    with pytest.raises(CheckpointError, match="not a file in this folder"):
        convert_checkpoint(source, tmp_path / "out")


def test_an_absent_shard_is_named(tmp_path):
    source = hf.make(tmp_path / "s", shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        convert_checkpoint(source, tmp_path / "out")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source = hf.make(tmp_path / "s", shards=2)
    first, second = (source / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    part = mx.load(str(second)) | dict(list(mx.load(str(first)).items())[:1])
    mx.eval(part)
    mx.save_safetensors(str(second), part)
    with pytest.raises(CheckpointError, match="is in both"):
        convert_checkpoint(source, tmp_path / "out")


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    source = hf.make(tmp_path / "s", shards=2)
    edit_index(source, **{"model.extra.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"'model\.extra\.weight' is missing from"):
        convert_checkpoint(source, tmp_path / "out")


def test_an_index_that_puts_a_tensor_elsewhere_is_refused(tmp_path):
    source = hf.make(tmp_path / "s", shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    name = next(key for key, file in index.items() if file == first)
    edit_index(source, **{name: second})
    with pytest.raises(CheckpointError, match=f"'{name}' is in {first}, and .* in {second}"):
        convert_checkpoint(source, tmp_path / "out")


def test_pickled_weights_are_refused(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*refused.*safetensors"):
        convert_checkpoint(source, tmp_path / "out")


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder"):
        convert_checkpoint(tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 72])  # 72 is padded to whole groups
def test_floats_of_this_format_convert_as_their_source_does(tmp_path, tied, width):
    values = hf.settings()
    values["text_config"]["tie_word_embeddings"] = values["tie_word_embeddings"] = tied
    values["vision_config"]["intermediate_size"] = width
    source = hf.make(tmp_path / "s", values)
    floats = convert_checkpoint(source, tmp_path / "floats")
    for name, options in (
        ("16", ConvertOptions(dtype="bfloat16")),
        ("4", ConvertOptions(bits=4, group_size=32, vision_bits=8)),
    ):
        direct = convert_checkpoint(source, tmp_path / f"direct-{name}", options)
        again = convert_checkpoint(floats, tmp_path / f"again-{name}", options)
        assert_same(stored(again), stored(direct))
        ours, expected = (json.loads((one / "config.json").read_text()) for one in (again, direct))
        assert ours == expected
        for file in ("tokenizer.json", "chat_template.jinja"):
            assert (again / file).read_bytes() == (direct / file).read_bytes()


def test_floats_of_this_format_keep_what_is_known_of_their_origin(tmp_path):
    floats = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "floats")
    values = json.loads((floats / "origin.json").read_text()) | {"license": "mit"}
    (floats / "origin.json").write_text(json.dumps(values))
    out = convert_checkpoint(floats, tmp_path / "out", ConvertOptions(bits=8, group_size=32))
    found = json.loads((out / "origin.json").read_text())
    assert (found["license"], found["source"]) == ("mit", "floats")


def test_a_quantized_folder_is_no_source(tmp_path):
    options = ConvertOptions(vision_bits=4, group_size=32)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    with pytest.raises(CheckpointError, match="already a quantized mlx-smolvlm checkpoint"):
        convert_checkpoint(out, tmp_path / "again")


def test_links_as_in_the_hub_cache_are_followed(tmp_path):
    blobs = hf.make(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    out = convert_checkpoint(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.iterdir())
    load_model(out)


# Published checkpoints, by name and shape alone

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "checkpoint_keys.json").read_text())


def published(name: str) -> tuple[dict, dict[str, TensorInfo]]:
    """config.json and headers of a published checkpoint, from the golden file."""
    values = GOLDEN[name]["config"]
    tensors = {}
    for pattern, shape in GOLDEN[name]["tensors"].items():
        part = "vision_config" if "vision_model" in pattern else "text_config"
        for layer in range(values[part]["num_hidden_layers"] if "*" in pattern else 1):
            key = pattern.replace("*", str(layer))
            tensors[key] = TensorInfo(Path("x"), "BF16", tuple(shape))
    assert len(tensors) == GOLDEN[name]["count"]
    return values, tensors


def folder_of(tmp_path: Path, values: dict) -> Path:
    """A folder with all but the weights and the tokens, which the golden file has not."""
    source = hf.make(tmp_path / "s", values, tensors={"x": mx.zeros((1,))})
    hf.write_json(source / "tokenizer.json", {})
    hf.write_json(source / "generation_config.json", {})
    return source


@pytest.mark.parametrize("name", GOLDEN)
def test_the_name_table_covers_published_checkpoints(tmp_path, name):
    values, tensors = published(name)
    config = read_hf_config(Source(folder_of(tmp_path, values), name))
    found, entries = match_tensors(tensors), list_entries(config)
    final, steps = make_steps(config, found, {}, {})
    assert final == config
    assert sum(step.source_nbytes for step in steps) == sum(i.nbytes for i in tensors.values())
    assert sum(step.nbytes(2) for step in steps) == sum(i.nbytes for i in tensors.values())
    assert {source_name for source_name, _ in found.values()} == set(tensors)
    for missing in found:
        with pytest.raises(CheckpointError, match="is missing"):
            make_steps(
                config, {k: v for k, v in found.items() if k != missing}, {}, {}, expected=entries
            )


@pytest.mark.parametrize("name", GOLDEN)
def test_the_name_table_is_the_models_parameters(tmp_path, name):
    values, _ = published(name)
    config = read_hf_config(Source(folder_of(tmp_path, values), name))
    shapes = {}
    for entry in list_entries(config):
        rows = sum(shape[0] for shape in entry.shapes)
        rest = (int(np.prod(entry.shapes[0][1:])),) if len(entry.shapes[0]) > 1 else ()
        shapes[f"{entry.path}.weight"] = (rows, *rest)
        if entry.bias:
            shapes[f"{entry.path}.bias"] = (rows,)
    parameters = dict(tree_flatten(build_model(config).parameters()))
    assert shapes == {key: array.shape for key, array in parameters.items()}
