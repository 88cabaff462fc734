"""Precision: options, packing, padding, and sources that are packed already."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.config import Quantization, QuantizationConfig
from mlx_smolvlm.convert.hub import ResolveOptions, resolve
from mlx_smolvlm.convert.options import ConvertOptions, choose_quantization
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.generate.memory_plan import Machine
from tests.helpers import hf_folder as hf

FOUR, EIGHT = Quantization(4, 64, "affine"), Quantization(8, 64, "affine")


@pytest.fixture(autouse=True)
def _no_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


def stored(folder: Path) -> dict[str, mx.array]:
    result = {}
    for file in folder.glob("*.safetensors"):
        result |= mx.load(str(file))
    return result


def unpacked(arrays: dict[str, mx.array], path: str, q: Quantization | None) -> mx.array:
    """The float weight of the module at `path`."""
    if q is None:
        return arrays[f"{path}.weight"]
    return mx.dequantize(
        arrays[f"{path}.weight"],
        arrays[f"{path}.scales"],
        arrays.get(f"{path}.biases"),
        q.group_size,
        q.bits,
        mode=q.mode,
    )


# Options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (ConvertOptions(), {}),
        (ConvertOptions(bits=16), dict.fromkeys(("text", "vision", "connector", "embeddings"))),
        (
            ConvertOptions(bits=4),
            {"text": FOUR, "vision": EIGHT, "connector": EIGHT, "embeddings": EIGHT},
        ),
        (ConvertOptions(vision_bits=8), {"vision": EIGHT}),
        (
            ConvertOptions(embeddings_bits=4, connector_bits=16),
            {"embeddings": FOUR, "connector": None},
        ),
        (
            ConvertOptions(bits=8, vision_bits=16, group_size=32),
            {
                "text": Quantization(8, 32, "affine"),
                "vision": None,
                "connector": Quantization(8, 32, "affine"),
                "embeddings": Quantization(8, 32, "affine"),
            },
        ),
        (
            ConvertOptions(mode="mxfp4"),
            {
                "text": Quantization(4, 32, "mxfp4"),
                "vision": EIGHT,
                "connector": EIGHT,
                "embeddings": EIGHT,
            },
        ),
        (
            ConvertOptions(mode="nvfp4", bits=4, embeddings_bits=4, vision_bits=16),
            {
                "text": Quantization(4, 16, "nvfp4"),
                "vision": None,
                "connector": EIGHT,
                "embeddings": Quantization(4, 16, "nvfp4"),
            },
        ),
    ],
)
def test_options_become_parts(options, parts):
    assert choose_quantization(options) == parts


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 7}, "7 bits are not available: 2, 3, 4, 5, 6, 8, or 16"),
        ({"bits": 0}, "0 bits"),
        ({"bits": 4, "vision_bits": 1}, "1 bits"),
        ({"bits": 4, "group_size": 48}, "group size 48"),
        ({"mode": "q4_k"}, "mode 'q4_k' is none of affine, mxfp4, mxfp8, nvfp4"),
        ({"mode": "mxfp8", "bits": 4}, "mode mxfp8 has 8 bits, not 4"),
        ({"dtype": "int8"}, "dtype 'int8' is none of"),
        ({"bits": 4.0}, "4.0 bits are not available"),
        ({"vision_bits": "8"}, "'8' bits are not available"),
        ({"bits": 4, "group_size": 64.0}, "group size 64.0"),
    ],
)
def test_options_that_do_not_exist_are_refused_before_anything_is_opened(tmp_path, options, match):
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(tmp_path / "absent", tmp_path / "out", ConvertOptions(**options))


# Packing


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_affine_packing_is_mlx_own(tmp_path, bits, group_size):
    tensors = hf.weights(hf.settings())
    options = ConvertOptions(
        bits=bits,
        vision_bits=bits,
        connector_bits=bits,
        embeddings_bits=bits,
        group_size=group_size,
    )
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    arrays, q = stored(out), Quantization(bits, group_size, "affine")
    assert read_config(out).quantization == QuantizationConfig(q, q, q, q)
    layer = "text_model.layers.1.self_attn"
    for i, letter in enumerate("qkv"):
        rows = slice(0, 64) if i == 0 else slice(32 + 32 * i, 64 + 32 * i)
        packed = mx.quantize(tensors[f"model.{layer}.{letter}_proj.weight"], group_size, bits)
        for suffix, array in zip(("weight", "scales", "biases"), packed, strict=True):
            assert mx.array_equal(arrays[f"{layer}.qkv_proj.{suffix}"][rows], array), suffix
    for path in ("patch_embedding", "position_embedding"):
        assert arrays[f"vision_model.embeddings.{path}.weight"].dtype == mx.float32
    assert "vision_model.embeddings.position_embedding.scales" not in arrays
    load_model(out)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_load_and_come_close(tmp_path, mode):
    source = hf.make(tmp_path / "s")
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(mode=mode))
    config, arrays = read_config(out), stored(out)
    assert config.quantization.text.mode == mode
    path = "text_model.layers.0.mlp.down_proj"
    assert f"{path}.biases" not in arrays
    close = unpacked(arrays, path, config.quantization.text)
    exact = hf.weights(hf.settings())[f"model.{path}.weight"]
    assert mx.abs(close - exact).max().item() < 0.05
    load_model(out)


def test_floats_are_cast_before_they_are_packed(tmp_path):
    source = hf.make(tmp_path / "s")
    options = ConvertOptions(bits=8, dtype="bfloat16")
    arrays = stored(convert_checkpoint(source, tmp_path / "out", options))
    path = "connector.modality_projection.proj"
    weight = hf.weights(hf.settings())[f"model.{path}.weight"].astype(mx.bfloat16)
    for suffix, array in zip(
        ("weight", "scales", "biases"), mx.quantize(weight, 64, 8), strict=True
    ):
        assert mx.array_equal(arrays[f"{path}.{suffix}"], array)
    assert {a.dtype for a in arrays.values()} == {mx.bfloat16, mx.uint32}


def test_a_group_size_that_does_not_fit_names_the_width(tmp_path):
    values = hf.settings(text__hidden_size=96, text__num_attention_heads=6)
    source = hf.make(tmp_path / "s", values)
    with pytest.raises(
        CheckpointError,
        match=r"group size 64 does not divide the width 96 of text_model\.embed_tokens; usable: 32",
    ):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4, group_size=32))


def test_a_width_that_no_group_fits_is_left_to_float(tmp_path):
    values = hf.settings(text__intermediate_size=144)
    source = hf.make(tmp_path / "s", values)
    with pytest.raises(CheckpointError, match=r"width 144 of .*down_proj; leave this part float"):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4))


# Padding


def test_the_vision_mlp_is_padded_with_zeros(tmp_path):
    tensors = hf.weights(hf.settings())
    options = ConvertOptions(vision_bits=8)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    config, arrays = read_config(out), stored(out)
    assert config.vision.intermediate_size == 128
    layer = "vision_model.encoder.layers.1.mlp"
    fc1 = unpacked(arrays, f"{layer}.fc1", EIGHT)
    fc2 = unpacked(arrays, f"{layer}.fc2", EIGHT)
    assert (fc1.shape, fc2.shape) == ((128, 64), (64, 128))
    assert not mx.any(fc1[96:]).item()
    assert not mx.any(arrays[f"{layer}.fc1.bias"][96:]).item()
    assert mx.abs(fc2[:, 96:]).max().item() < 1e-6
    assert mx.array_equal(arrays[f"{layer}.fc1.bias"][:96], tensors[f"model.{layer}.fc1.bias"])
    assert mx.abs(fc1[:96] - tensors[f"model.{layer}.fc1.weight"]).max().item() < 2e-3
    assert mx.abs(fc2[:, :96] - tensors[f"model.{layer}.fc2.weight"]).max().item() < 2e-3


def test_padding_changes_nothing_that_the_encoder_gives(tmp_path):
    source = hf.make(tmp_path / "s")
    exact = load_model(convert_checkpoint(source, tmp_path / "exact"))
    fine = load_model(convert_checkpoint(source, tmp_path / "fine", ConvertOptions(vision_bits=8)))
    pixels = mx.array(np.random.default_rng(0).standard_normal((2, 24, 24, 3), dtype=np.float32))
    a, b = exact.encode(pixels), fine.encode(pixels)
    assert mx.abs(a - b).max().item() < 0.02 * mx.abs(a).max().item()


@pytest.mark.parametrize(
    "options", [ConvertOptions(bits=4, vision_bits=16), ConvertOptions(bits=4, group_size=32)]
)
def test_nothing_is_padded_without_need(tmp_path, options):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    assert read_config(out).vision.intermediate_size == 96


# Sources that mlx-vlm packed


def packed_source(
    folder: Path,
    parts: dict[str, Quantization],
    usual: Quantization = FOUR,
    overrides: dict | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> Path:
    """A folder of mlx-vlm's whose modules that contain a key of `parts` are packed as it says."""
    values = hf.settings()
    tensors = hf.mlx_vlm_weights(hf.weights(values, dtype))
    result, exceptions = {}, dict(overrides or {})
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        q = next((q for part, q in parts.items() if part in name), None)
        if q is None or array.ndim != 2 or array.shape[-1] % q.group_size:
            result[name] = array
            continue
        packed = mx.quantize(array, q.group_size, q.bits, mode=q.mode)
        result |= dict(
            zip((f"{path}.{s}" for s in ("weight", "scales", "biases")), packed, strict=False)
        )
        if q != usual:
            exceptions[path] = dict(vars(q))
    values["quantization"] = {"group_size": usual.group_size, "bits": usual.bits} | exceptions
    values["quantization_config"] = values["quantization"]
    return hf.make(folder, values, result)


def test_packed_weights_are_kept_bit_for_bit(tmp_path):
    source = packed_source(tmp_path / "s", {"language_model": FOUR})
    out = convert_checkpoint(source, tmp_path / "out")
    config, arrays, old = read_config(out), stored(out), stored(source)
    assert config.quantization == QuantizationConfig(FOUR, None, None, FOUR)
    assert config.dtype == "bfloat16"
    for suffix in ("weight", "scales", "biases"):
        parts = [old[f"language_model.layers.1.self_attn.{x}_proj.{suffix}"] for x in "qkv"]
        fused = arrays[f"text_model.layers.1.self_attn.qkv_proj.{suffix}"]
        assert mx.array_equal(fused, mx.concatenate(parts))
        assert mx.array_equal(arrays[f"lm_head.{suffix}"], old[f"language_model.lm_head.{suffix}"])
    load_model(out)


def test_packed_weights_keep_their_bits_however_little_memory_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    source = packed_source(tmp_path / "s", {"language_model": FOUR})
    folder = resolve(source, ResolveOptions(machine=Machine("mlx-gpu", 2, 1)))
    assert read_config(folder).quantization == QuantizationConfig(FOUR, None, None, FOUR)


def test_exceptions_become_overrides(tmp_path):
    parts = {"layers.0.mlp.down_proj": EIGHT, "language_model": FOUR}
    source = packed_source(tmp_path / "s", parts)
    quantization = read_config(convert_checkpoint(source, tmp_path / "out")).quantization
    assert quantization.text == FOUR
    assert quantization.overrides == (("text_model.layers.0.mlp.down_proj", EIGHT),)
    load_model(tmp_path / "out")


def test_a_packed_vision_tower_keeps_its_float_exceptions(tmp_path):
    source = packed_source(tmp_path / "s", {"": FOUR})
    assert "vision_model.embeddings.position_embedding.scales" in read_headers(source)
    out = convert_checkpoint(source, tmp_path / "out")
    config, arrays = read_config(out), stored(out)
    assert config.vision.intermediate_size == 96
    assert config.quantization.vision == FOUR
    exceptions = [f"vision_model.encoder.layers.{i}.mlp.fc2" for i in range(2)]
    assert config.quantization.overrides == tuple((path, None) for path in exceptions)
    position = arrays["vision_model.embeddings.position_embedding.weight"]
    assert (position.shape, position.dtype) == ((16, 64), mx.bfloat16)
    load_model(out)


def test_packed_rows_are_padded_without_unpacking(tmp_path):
    source = packed_source(tmp_path / "s", {"": EIGHT}, usual=EIGHT)
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=8))
    config, arrays, old = read_config(out), stored(out), stored(source)
    assert config.vision.intermediate_size == 128
    path = "vision_model.encoder.layers.0.mlp.fc1"
    assert mx.array_equal(arrays[f"{path}.weight"][:96], old[f"{path}.weight"])
    assert not mx.any(unpacked(arrays, path, EIGHT)[96:]).item()
    load_model(out)


def test_another_precision_is_made_from_the_packed_weights(tmp_path):
    source = packed_source(tmp_path / "s", {"language_model": FOUR})
    out = convert_checkpoint(source, tmp_path / "float", ConvertOptions(bits=16))
    assert read_config(out).quantization == QuantizationConfig(None, None, None, None)
    path = "mlp.down_proj"
    old = unpacked(stored(source), f"language_model.layers.0.{path}", FOUR)
    assert mx.array_equal(stored(out)[f"text_model.layers.0.{path}.weight"], old)
    out = convert_checkpoint(source, tmp_path / "eight", ConvertOptions(bits=8))
    new = unpacked(stored(out), f"text_model.layers.0.{path}", EIGHT)
    assert mx.abs(new - old).max().item() < 2e-3
    load_model(out)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [({"v_proj": EIGHT, "language_model": FOUR}, EIGHT), ({"q_proj": FOUR, "k_proj": FOUR}, None)],
)
def test_fused_members_that_differ_meet_at_the_finest(tmp_path, parts, kind):
    source = packed_source(tmp_path / "s", parts)
    out = convert_checkpoint(source, tmp_path / "out")
    path = "text_model.layers.0.self_attn.qkv_proj"
    assert read_config(out).quantization.find(path) == kind
    found = unpacked(stored(out), path, kind).astype(mx.float32)
    old = stored(source)
    for rows, letter in ((slice(0, 64), "q"), (slice(64, 96), "k"), (slice(96, 128), "v")):
        name = f"language_model.layers.0.self_attn.{letter}_proj"
        q = next((q for part, q in parts.items() if part in name), None)
        assert mx.abs(found[rows] - unpacked(old, name, q).astype(mx.float32)).max().item() < 2e-3
    load_model(out)


def test_scales_follow_the_dtype(tmp_path):
    source = packed_source(tmp_path / "s", {"language_model": FOUR})
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(dtype="float32"))
    assert {array.dtype for array in stored(out).values()} == {mx.float32, mx.uint32}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, "config.json has no quantization"),
        ({"quantization": {"bits": 4}}, "quantization needs bits and group_size"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "needs bits"),
        ({"quantization": {"bits": 8, "group_size": 64}}, "has shape"),
        ({"quantization": {"bits": 4, "group_size": 32}}, "has shape"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "mxfp4"}}, "MLX cannot read"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "q4_k"}}, "MLX cannot read"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits in groups of 64"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "groups of 0"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "has shape"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by 'gptq'"),
        ({"quantization_config": "int8"}, "quantized by 'int8'"),
    ],
)
def test_a_packing_that_does_not_fit_is_refused(tmp_path, change, match):
    source = packed_source(tmp_path / "s", {"language_model": FOUR})
    values = json.loads((source / "config.json").read_text())
    del values["quantization"], values["quantization_config"]
    hf.write_json(source / "config.json", values | change)
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(source, tmp_path / "out")
