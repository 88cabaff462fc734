"""Our folders are read strictly: what differs from the configuration is named."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint import writer
from mlx_smolvlm.checkpoint.load import find_tokenizer, load_model, read_chat_template, read_config
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf


@pytest.fixture(autouse=True)
def _no_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")


def stored(folder: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    return tensors


def save(folder: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def edit(folder: Path, part: str, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(changes)
    hf.write_json(folder / "config.json", values)


def test_every_parameter_is_the_stored_tensor(folder):
    model, tensors = load_model(folder), stored(folder)
    parameters = dict(tree_flatten(model.parameters()))
    assert sorted(parameters) == sorted(tensors)
    for name, array in parameters.items():
        assert mx.array_equal(array, tensors[name]), name
    assert not model.training


def test_each_missing_tensor_is_named(folder):
    tensors = stored(folder)
    for name in tensors:
        save(folder, {key: array for key, array in tensors.items() if key != name})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
            load_model(folder)


def test_each_misshapen_tensor_is_named(folder):
    tensors = stored(folder)
    for name, array in tensors.items():
        save(folder, tensors | {name: mx.concatenate([array, array])})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' has shape"):
            load_model(folder)


def test_an_unknown_tensor_is_named(folder):
    save(folder, stored(folder) | {"text_model.extra.weight": mx.zeros((1,))})
    with pytest.raises(CheckpointError, match=r"'text_model\.extra\.weight' is not known"):
        load_model(folder)


def test_a_transposed_matrix_is_no_match(folder):
    name = "text_model.layers.0.mlp.down_proj.weight"
    save(folder, stored(folder) | {name: stored(folder)[name].T})
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8])
def test_floats_must_be_floats(folder, dtype):
    save(folder, stored(folder) | {"text_model.norm.weight": mx.zeros((64,), dtype)})
    with pytest.raises(CheckpointError, match=r"'text_model\.norm\.weight' is stored as"):
        load_model(folder)


def test_packed_weights_must_be_packed(tmp_path):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", ConvertOptions(bits=8))
    tensors = stored(out)
    name = "text_model.layers.0.mlp.down_proj.weight"
    save(out, tensors | {name: tensors[name].astype(mx.float32)})
    with pytest.raises(CheckpointError, match=f"'{name}' is stored as F32; expected"):
        load_model(out)


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_a_truncated_file_is_named(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
        load_model(folder)


def test_shards_load_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 150_000)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    load_model(out)
    last = max(out.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(CheckpointError, match=f"{last.name} is missing"):
        load_model(out)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_casts_floats_and_scales_but_not_codes(tmp_path, bits, dtype):
    source = hf.make(tmp_path / "s")
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=bits))
    model = load_model(out, dtype)
    wanted, tensors = getattr(mx, dtype), stored(out)
    assert model.dtype == wanted
    for name, array in tree_flatten(model.parameters()):
        packed = tensors[name].dtype == mx.uint32
        assert array.dtype == (mx.uint32 if packed else wanted), name
        assert mx.array_equal(array, tensors[name].astype(array.dtype)), name


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(CheckpointError, match="dtype 'int4' is none of"):
        load_model(folder, "int4")


def test_weights_are_in_memory_when_it_returns(folder):
    model = load_model(folder)
    wanted = stored(folder)["text_model.norm.weight"].tolist()
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert model.text_model.norm.weight.tolist() == wanted
    assert mx.any(model.text_model.layers[1].mlp.gate_up_proj.weight).item()


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantized_models_run(tmp_path, mode):
    bits = {"bits": 4} if mode == "affine" else {}
    source = hf.make(tmp_path / "s")
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(mode=mode, **bits))
    exact = load_model(convert_checkpoint(source, tmp_path / "exact"))
    model = load_model(out)
    ids = np.arange(20, dtype=np.int32)
    close, wanted = model(model.embed(ids)), exact(exact.embed(ids))
    assert close.shape == wanted.shape
    difference = mx.abs(close - wanted).mean() / mx.abs(wanted).mean()
    assert 0 < difference.item() < 0.5


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"bits": 4, "group_size": 48, "mode": "affine"}, "does not divide|cannot be applied"),
        ({"bits": 4, "group_size": 512, "mode": "affine"}, "group_size 512 does not divide"),
        ({"bits": 7, "group_size": 64, "mode": "affine"}, "quantization cannot be applied"),
        ({"bits": 4, "group_size": 64, "mode": "q4"}, "quantization cannot be applied"),
        ({"bits": 4, "group_size": 64, "mode": "affine"}, "has shape|is missing"),
        ({"bits": 4, "group_size": 0, "mode": "affine"}, "group_size"),
    ],
)
def test_a_quantization_that_cannot_be_is_named(folder, quantization, match):
    edit(folder, "quantization", text=quantization)
    with pytest.raises(CheckpointError, match=match):
        load_model(folder)


def test_more_layers_than_tensors_are_refused_at_once(folder):
    edit(folder, "text", num_hidden_layers=2**23)
    with pytest.raises(CheckpointError, match="more layers than there are tensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_config),
        ("tokenizer.json", find_tokenizer),
        ("chat_template.jinja", read_chat_template),
        ("model.safetensors", load_model),
    ],
)
def test_each_missing_file_is_named(folder, name, read):
    assert read(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read(folder)


def test_the_template_and_tokenizer_are_read(folder):
    assert read_chat_template(folder) == hf.TEMPLATE
    assert find_tokenizer(folder) == folder / "tokenizer.json"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_chat_template(folder)


def test_a_hugging_face_folder_is_told_to_convert(tmp_path):
    with pytest.raises(CheckpointError, match="mlx-smolvlm convert"):
        load_model(hf.make(tmp_path / "s"))
