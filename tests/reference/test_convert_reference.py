"""Models that transformers itself saved convert, and their arrays are the originals."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.convert.source import Source

torch.set_num_threads(1)

TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 54321.0},
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
KINDS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}


def save(folder: Path, kind: str, dtype: torch.dtype, tied: bool, shard: str) -> dict:
    """Save a random model of `kind` as transformers does; its parameters, by name."""
    config_class, model_class = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(
        text_config=TEXT | {"tie_word_embeddings": tied},
        vision_config=dict(VISION),
        image_token_id=99,
        scale_factor=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = model_class(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    Idefics3ImageProcessor(
        size={"longest_edge": 224}, max_image_size={"longest_edge": 56}
    ).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return dict(model.named_parameters())


def bits(array: mx.array | torch.Tensor) -> np.ndarray:
    """The array as unsigned integers, so that equal means equal bit for bit."""
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous()
        kind = torch.int16 if array.element_size() == 2 else torch.int32
        return array.view(kind).numpy()
    return np.array(array.view(mx.int16 if array.itemsize == 2 else mx.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_what_transformers_saved_is_kept_bit_for_bit(tmp_path, kind, dtype, tied, shard):
    source = tmp_path / "s"
    tensors = save(source, kind, dtype, tied, shard)
    assert (len(list(source.glob("*.safetensors"))) > 1) is (shard == "100KB")
    out = convert_checkpoint(source, tmp_path / "out")
    config = read_config(out)
    assert config.dtype == str(dtype).removeprefix("torch.")
    assert config.text.tie_word_embeddings is tied
    assert (config.text.rope_theta, config.text.rms_norm_eps) == (54321.0, 1e-5)
    assert (config.text.head_dim, config.vision.patch_size) == (16, 14)
    assert config.eos_token_ids == (2,)
    stored = mx.load(str(out / "model.safetensors"))
    used = set()

    def original(path: str, suffix: str) -> torch.Tensor:
        name = f"{path}.{suffix}" if path == "lm_head" else f"model.{path}.{suffix}"
        used.add(name)
        return tensors[name]

    for name, array in stored.items():
        path, suffix = name.rsplit(".", 1)
        if path.endswith("patch_embedding") and suffix == "weight":
            wanted = original(path, suffix).permute(0, 2, 3, 1).flatten(1)
        elif path.endswith("qkv_proj"):
            members = [path.replace("qkv", letter) for letter in "qkv"]
            wanted = torch.cat([original(member, suffix) for member in members])
        elif path.endswith("gate_up_proj"):
            members = [path.replace("gate_up", one) for one in ("gate", "up")]
            wanted = torch.cat([original(member, suffix) for member in members])
        else:
            wanted = original(path, suffix)
        assert np.array_equal(bits(array), bits(wanted)), name
    assert used == set(tensors)
    load_model(out)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_that_transformers_fills_in_are_ours(tmp_path, kind):
    """A config.json that omits every default reads as transformers reads it."""
    config_class, _ = KINDS[kind]
    values = {
        "model_type": kind,
        "image_token_id": 99,
        "text_config": {"model_type": "llama", "rope_theta": 10.0},
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    Idefics3ImageProcessor(max_image_size={"longest_edge": 224}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    from mlx_smolvlm.convert.hf_config import read_hf_config

    theirs = config_class.from_pretrained(tmp_path)
    values["scale_factor"] = 1  # the default of 2 does not divide the default grid of 7
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours = read_hf_config(Source(tmp_path, "s"))
    vision_fields = (*VISION, "layer_norm_eps")
    for name in vision_fields:
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
    ):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name), name
    assert ours.text.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    images = Idefics3ImageProcessor.from_pretrained(tmp_path)
    assert ours.image.longest_edge == images.size["longest_edge"]
    assert list(ours.image.mean) == list(images.image_mean)
    assert list(ours.image.std) == list(images.image_std)


def test_the_default_scale_and_image_token_are_ours():
    from mlx_smolvlm.convert.hf_config import IMAGE_TOKEN_ID, SCALE_FACTOR

    for config_class, _ in KINDS.values():
        config = config_class()
        assert (config.scale_factor, config.image_token_id) == (SCALE_FACTOR, IMAGE_TOKEN_ID)
