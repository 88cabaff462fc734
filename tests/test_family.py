"""Every published geometry, cut down in width and depth: converted, loaded strictly, asked."""

import json
from copy import deepcopy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import family
from mlx_smolvlm import Sampling, load
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import hf_folder as hf

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "checkpoint_keys.json").read_text())


IDEFICS3 = deepcopy(GOLDEN["SmolVLM-Instruct"]["config"])
IDEFICS3["scale_factor"] = 2
IDEFICS3["vision_config"] |= {"image_size": 364}
IDEFICS3["text_config"] |= {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
CONFIGS = {name: GOLDEN[name]["config"] for name in GOLDEN} | {"Idefics3-8B": IDEFICS3}
LAYERS = 2


def cut(config):
    """`config` with few heads and layers; head widths, ratios and remainders stay."""
    values = deepcopy(config)
    vision, text = values["vision_config"], values["text_config"]
    head = vision["hidden_size"] // vision["num_attention_heads"]
    vision["num_attention_heads"] = 8 if head % 64 else 2
    vision["hidden_size"] = head * vision["num_attention_heads"]
    vision["intermediate_size"] = 256 + vision["intermediate_size"] % 64
    vision["image_size"] = vision["patch_size"] * values["scale_factor"] * 3
    ratio = text["num_attention_heads"] // text["num_key_value_heads"]
    text["num_attention_heads"], text["num_key_value_heads"] = ratio * 2, 2
    text["hidden_size"] = ratio * 2 * text["head_dim"]
    text["intermediate_size"] = 320
    vision["num_hidden_layers"] = text["num_hidden_layers"] = LAYERS
    text["vocab_size"], values["image_token_id"], text["eos_token_id"] = 320, 300, 3
    return values


def make(folder, config):
    folder.mkdir()
    values = cut(config)
    family.write_small_files(folder, values, None)
    hf.write_weights(folder, hf.weights(values), shards=2)
    return folder


def logits(vlm):
    """Of a prompt with one tile of noise."""
    size = vlm.config.tile_size
    pixels = mx.array(np.random.default_rng(1).uniform(-1, 1, (1, size, size, 3)).astype("f4"))
    count = vlm.config.image_seq_len
    ids = np.array([10, *[300] * count, 40, 41, 42], dtype=np.int32)
    return vlm.model(vlm.model.embed(ids, vlm.model.encode(pixels)))[0, -4:]


def error(found, expected):
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_cut_checkpoint_has_the_published_names(name):
    published = GOLDEN[name]["tensors"]
    wanted = family.list_tensor_shapes({"config": cut(CONFIGS[name]), "tensors": published})
    assert set(hf.shapes(cut(CONFIGS[name]))) == set(wanted)
    assert len(family.list_tensor_shapes(GOLDEN[name])) == GOLDEN[name]["count"]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_geometry_converts_loads_and_answers(tmp_path, name):
    source = make(tmp_path / "s", CONFIGS[name])
    whole = load(convert_checkpoint(source, tmp_path / "float"))
    packed = load(convert_checkpoint(source, tmp_path / "packed", ConvertOptions(bits=4)))
    expected = logits(whole)
    assert 0 < error(logits(packed), expected) < 0.2
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    for vlm in (whole, packed):
        reply = vlm.ask("?", images=[picture], sampling=Sampling(max_tokens=2), detail="low")
        assert reply.encoded_tiles == 1
        assert 1 <= len(reply.token_ids) <= 2
        assert mx.isfinite(logits(vlm)).all().item()


# The greatest relative error of logits with one part packed, by its bits.
BOUNDS = {2: 1.5, 3: 0.6, 4: 0.3, 5: 0.15, 6: 0.08, 8: 0.02}
MODES = [("affine", bits) for bits in BOUNDS] + [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    source = make(folder / "s", CONFIGS["SmolVLM2-2.2B-Instruct"])
    return source, logits(load(convert_checkpoint(source, folder / "float")))


@pytest.mark.parametrize("part", ["bits", "vision_bits", "connector_bits", "embeddings_bits"])
@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_each_mode_of_each_part(tmp_path, small, part, mode, bits):
    source, expected = small
    floats = dict.fromkeys(("vision_bits", "connector_bits", "embeddings_bits"), 16)
    if mode == "affine":
        options = ConvertOptions(**({"bits": 16} | floats | {part: bits}))
    else:  # such a mode always packs the decoder
        options = ConvertOptions(**(floats | ({} if part == "bits" else {part: bits})), mode=mode)
    vlm = load(convert_checkpoint(source, tmp_path / "out", options))
    bound = BOUNDS[bits] * (1 if mode == "affine" else 4)
    assert 0 < error(logits(vlm), expected) < bound
