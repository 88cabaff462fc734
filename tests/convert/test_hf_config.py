"""What config.json and its neighbours say becomes one Config, or is refused by name."""

import json
from pathlib import Path

import pytest

from mlx_smolvlm.config import Config, VideoConfig
from mlx_smolvlm.convert.hf_config import read_hf_config
from mlx_smolvlm.convert.hf_processor import read_template
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf


def read(tmp_path: Path, **changes) -> Config:
    return read_hf_config(Source(hf.make(tmp_path / "s", hf.settings(**changes), {}), "s"))


def edit(folder: Path, name: str, **changes) -> Path:
    """Change keys of the JSON file `name` in `folder`; None removes."""
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changes
    hf.write_json(path, {k: v for k, v in values.items() if v is not None})
    return folder


def test_every_value_is_read(tmp_path):
    config = read(tmp_path)
    text = hf.settings()["text_config"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config.text, key) == text[key]
        assert getattr(config.vision, key) == hf.settings()["vision_config"][key]
    assert (config.text.num_key_value_heads, config.text.head_dim) == (2, 16)
    assert (config.text.rope_theta, config.text.rms_norm_eps) == (100000.0, 1e-5)
    assert (config.text.vocab_size, config.text.max_position_embeddings) == (72, 512)
    assert (config.vision.image_size, config.vision.patch_size) == (24, 6)
    assert (config.scale_factor, config.image_token_id) == (2, 60)
    assert config.image.longest_edge == 96
    assert config.video == VideoConfig(1.0, 64, 24, 1.0)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_omitted_keys_are_the_class_defaults(tmp_path):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    changes = {f"vision__{key}": None for key in (*names, "image_size", "patch_size")}
    changes |= {f"vision__{key}": None for key in ("layer_norm_eps", "hidden_act", "num_channels")}
    changes |= {f"text__{key}": None for key in names}
    changes |= {f"text__{key}": None for key in ("num_key_value_heads", "head_dim")}
    changes |= {f"text__{key}": None for key in ("rms_norm_eps", "vocab_size", "hidden_act")}
    changes |= {"text__max_position_embeddings": None, "scale_factor": 1}
    config = read(tmp_path, **changes)
    vision, text = config.vision, config.text
    assert (vision.hidden_size, vision.intermediate_size) == (1152, 3072)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (12, 16)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (224, 32, 1e-6)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 32, 128)
    assert (text.rms_norm_eps, text.vocab_size, text.max_position_embeddings) == (1e-6, 32000, 2048)
    assert text.tie_word_embeddings is False


def test_the_scale_factor_defaults_to_two(tmp_path):
    assert read(tmp_path, scale_factor=None).scale_factor == 2


def test_head_dim_need_not_follow_from_the_width(tmp_path):
    assert read(tmp_path, text__head_dim=32).text.head_dim == 32
    assert read(tmp_path, text__head_dim=None).text.head_dim == 16


def test_sizes_may_be_pairs(tmp_path):
    assert read(tmp_path, vision__image_size=[24, 24]).vision.image_size == 24
    with pytest.raises(CheckpointError, match="image_size is"):
        read(tmp_path, vision__image_size=[24, 30])


@pytest.mark.parametrize(
    "changes",
    [
        {"text__rope_theta": 5e4},
        {"text__rope_theta": None, "text__rope_parameters": {"rope_theta": 5e4}},
        {
            "text__rope_theta": None,
            "text__rope_parameters": {"rope_theta": 5e4, "rope_type": "default"},
        },
        {"text__rope_theta": 50000, "text__rope_parameters": {"rope_type": "default"}},
        {"text__rope_theta": 50000, "text__rope_scaling": {"type": "default"}},
    ],
)
def test_rope_theta_is_read_from_either_place(tmp_path, changes):
    assert read(tmp_path, **changes).text.rope_theta == 5e4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text__rope_theta": None}, "neither rope_theta nor rope_parameters"),
        ({"text__rope_parameters": {"rope_theta": 7.0}}, "disagree"),
        ({"text__rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"text__rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"text__rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"text__rope_theta": "big"}, "rope_theta is 'big'"),
        ({"text__rope_theta": -1}, "rope_theta is -1"),
        ({"text__rope_theta": float("nan")}, "rope_theta is nan"),
        ({"model_type": "qwen2_vl"}, "s is a qwen2_vl checkpoint; .*idefics3 and smolvlm"),
        ({"model_type": None}, "s is a None checkpoint"),
        ({"text__model_type": "mistral"}, "model_type is 'mistral'"),
        ({"text__hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vision__hidden_act": "gelu"}, "vision_config: hidden_act is 'gelu'"),
        ({"vision__num_channels": 1}, "num_channels is 1"),
        ({"text__attention_bias": True}, "attention_bias is True"),
        ({"text__mlp_bias": True}, "mlp_bias is True"),
        ({"text__qk_layer_norms": True}, "qk_layer_norms is True"),
        ({"text__hidden_size": -64}, "hidden_size is -64"),
        ({"text__hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"text__hidden_size": True}, "hidden_size is True"),
        ({"text__vocab_size": 10**30}, r"vocab_size is 1e\+30"),
        ({"text__num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"text__num_hidden_layers": 2**20}, "num_hidden_layers is 1048576"),
        ({"vision__num_hidden_layers": 2**20}, "num_hidden_layers is 1048576"),
        ({"text__num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"text__num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"text__tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"vision__num_attention_heads": 5}, "num_attention_heads 5"),
        ({"scale_factor": 3}, "scale_factor 3"),
        ({"image_token_id": 59}, "image_token_id is 59; .* gives <image> 60"),
        ({"image_token_id": -1}, "image_token_id is -1"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(tmp_path, changes, match):
    with pytest.raises(CheckpointError, match=match):
        read(tmp_path, **changes)


@pytest.mark.parametrize("key", ["vision_config", "text_config"])
def test_a_missing_part_is_named(tmp_path, key):
    values = hf.settings()
    folder = hf.make(tmp_path / "s", values, {})
    for value in (None, "none", []):
        hf.write_json(folder / "config.json", values | {key: value})
        with pytest.raises(CheckpointError, match=key):
            read_hf_config(Source(folder, "s"))


@pytest.mark.parametrize("text", ["", "{", "[]", "nope", "[" * 10**5])
def test_a_damaged_config_is_named(tmp_path, text):
    folder = hf.make(tmp_path / "s", tensors={})
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_hf_config(Source(folder, "s"))


# Pictures and videos


def test_nested_processor_settings_win(tmp_path):
    folder = hf.make(tmp_path / "s", tensors={})
    images = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
    hf.write_json(folder / "processor_config.json", {"image_processor": images})
    config = read_hf_config(Source(folder, "s"))
    assert (config.image.longest_edge, config.video) == (48, None)
    assert config.image.mean == (0.5, 0.5, 0.5)
    assert config.image.do_image_splitting is True
    videos = {"fps": 2, "num_frames": 8, "size": {"longest_edge": 24}}
    both = {"image_processor": images, "video_processor": videos}
    hf.write_json(folder / "processor_config.json", both)
    assert read_hf_config(Source(folder, "s")).video == VideoConfig(2.0, 8, 24, 1.0)
    (folder / "preprocessor_config.json").unlink()
    assert read_hf_config(Source(folder, "s")).image.longest_edge == 48


def test_a_separate_video_file_is_read(tmp_path):
    folder = edit(hf.make(tmp_path / "s", tensors={}), "preprocessor_config.json")
    edit(folder, "preprocessor_config.json", video_sampling=None)
    assert read_hf_config(Source(folder, "s")).video is None
    videos = {"video_sampling": {"fps": 3, "max_frames": 5, "video_size": {"longest_edge": 24}}}
    hf.write_json(folder / "video_preprocessor_config.json", videos)
    assert read_hf_config(Source(folder, "s")).video == VideoConfig(3.0, 5, 24, 1.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_image_size": {"longest_edge": 512}}, "max_image_size is .*image_size is 24"),
        ({"max_image_size": None}, "max_image_size is None"),
        ({"size": {"height": 5}}, "longest_edge is None"),
        ({"size": 5}, "size is 5; it must be an object"),
        ({"resample": 2}, "resample is 2"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, r"rescale_factor is 1\.0"),
        ({"image_mean": [0.5]}, r"image_mean is \[0\.5\]"),
        ({"image_std": [0, 0, 0]}, "image.std"),
        ({"do_image_splitting": 1}, "do_image_splitting is 1"),
        ({"video_sampling": {"fps": 0, "max_frames": 1}}, "fps is 0"),
        ({"video_sampling": {"fps": 1}}, "max_frames is None"),
    ],
)
def test_processor_settings_that_do_not_fit_are_named(tmp_path, changes, match):
    folder = edit(hf.make(tmp_path / "s", tensors={}), "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=match):
        read_hf_config(Source(folder, "s"))


def test_a_missing_processor_file_is_named(tmp_path):
    folder = hf.make(tmp_path / "s", tensors={})
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no preprocessor_config\.json, .* unknown; copy it from"
    ):
        read_hf_config(Source(folder, "s"))


# What ends an answer, and the chat template


def test_eos_ids_come_from_generation_config_and_the_tokenizer(tmp_path):
    folder = hf.make(tmp_path / "s", tensors={})
    for value, ids in ((5, (5, 61)), ([3, 5, 3], (3, 5, 61)), (61, (61,)), (None, (2, 61))):
        edit(folder, "generation_config.json", eos_token_id=value)
        assert read_hf_config(Source(folder, "s")).eos_token_ids == ids
    (folder / "generation_config.json").unlink()
    assert read_hf_config(Source(folder, "s")).eos_token_ids == (2, 61)


def test_ids_outside_the_vocabulary_end_nothing(tmp_path):
    folder = edit(hf.make(tmp_path / "s", tensors={}), "tokenizer.json", added_tokens=[])
    edit(folder, "generation_config.json", eos_token_id=[72, 4])
    assert read_hf_config(Source(folder, "s")).eos_token_ids == (4,)
    edit(folder, "generation_config.json", eos_token_id=-1)
    with pytest.raises(CheckpointError, match="no eos_token_id within"):
        read_hf_config(Source(folder, "s"))
    edit(folder, "generation_config.json", eos_token_id="end")
    with pytest.raises(CheckpointError, match="eos_token_id is 'end'"):
        read_hf_config(Source(folder, "s"))


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    folder = edit(hf.make(tmp_path / "s", tensors={}), "tokenizer.json", added_tokens=[1])
    with pytest.raises(CheckpointError, match="added_tokens is damaged"):
        read_hf_config(Source(folder, "s"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_hf_config(Source(folder, "s"))


def test_templates_are_taken_in_transformers_order(tmp_path):
    folder = tmp_path
    hf.write_json(folder / "config.json", {})
    with pytest.raises(CheckpointError, match="no chat template"):
        read_template(Source(folder, "s"))
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "list"}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    assert read_template(Source(folder, "s")) == "list"
    edit(folder, "tokenizer_config.json", chat_template="tokenizer")
    assert read_template(Source(folder, "s")) == "tokenizer"
    (folder / "chat_template.jinja").write_text("jinja\n")
    assert read_template(Source(folder, "s")) == "jinja\n"
    edit(folder, "chat_template.json", chat_template="legacy")
    assert read_template(Source(folder, "s")) == "legacy"
    edit(folder, "processor_config.json", chat_template={"default": "processor"})
    assert read_template(Source(folder, "s")) == "processor"
    edit(folder, "processor_config.json", chat_template=5)
    with pytest.raises(CheckpointError, match="chat_template is not a string"):
        read_template(Source(folder, "s"))


def test_a_template_that_is_no_text_is_named(tmp_path):
    hf.write_json(tmp_path / "config.json", {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_template(Source(tmp_path, "s"))
