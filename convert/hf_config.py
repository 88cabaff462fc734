"""Read the JSON files of a Hugging Face checkpoint into one `Config`.

Published files omit keys that equal the defaults of transformers' configuration classes, so those
defaults are repeated here. Settings that this package does not support raise an error.

Source: transformers 5.23, Idefics3VisionConfig, SmolVLMVisionConfig, LlamaConfig,
Idefics3ImageProcessor, SmolVLMVideoProcessor.
"""

from __future__ import annotations

from mlx_smolvlm.checkpoint.load import CONFIG_FILE, TOKENIZER_FILE
from mlx_smolvlm.config import (
    Config,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from mlx_smolvlm.convert.hf_processor import (
    Section,
    read_added_tokens,
    read_eos_token_ids,
    read_image_config,
    read_processors,
    read_video_config,
)
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError, shorten

MODEL_TYPES = ("idefics3", "smolvlm")
MOST_LAYERS = 1024

VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
TEXT_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SCALE_FACTOR, IMAGE_TOKEN_ID = 2, 128257

# Settings with a single supported value, which is also the default.
FIXED_TEXT = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "qk_layer_norms": False,
    "use_resampler": False,
    "rope_interleaved": False,
}
FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}


def read_hf_config(source: Source) -> Config:
    """Read the configuration of the Hugging Face checkpoint `source`.

    The weights are not read, so `dtype` is float32, `quantization` is empty, and
    `tie_word_embeddings` is what the files declare.

    Raises:
        CheckpointError: The model has another type, or a value is missing, invalid or not
            supported.
    """
    top = Section(source.read_json(CONFIG_FILE), CONFIG_FILE)
    model_type = top.values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{source.name} is a {shorten(model_type).strip(chr(39))} checkpoint; mlx-smolvlm "
            f"converts {' and '.join(MODEL_TYPES)}"
        )
    vision, text = top.get_section("vision_config"), top.get_section("text_config")
    for key, section in (("vision_config", vision), ("text_config", text)):
        if section is None:
            raise CheckpointError(f"config.json has no {key}; fetch the checkpoint again")
    assert vision is not None
    assert text is not None
    text_config = _read_text(top, text)
    images, videos = read_processors(source)
    tokens = read_added_tokens(source)
    image_token_id = top.get_integer("image_token_id", IMAGE_TOKEN_ID)
    if tokens.get("<image>", image_token_id) != image_token_id:
        raise top.error("image_token_id", f"{TOKENIZER_FILE} gives <image> {tokens['<image>']}")
    vision_config = _read_vision(vision)
    config = Config(
        vision=vision_config,
        text=text_config,
        scale_factor=top.get_integer("scale_factor", SCALE_FACTOR),
        image_token_id=image_token_id,
        eos_token_ids=read_eos_token_ids(source, top, text, tokens, text_config.vocab_size),
        image=read_image_config(images, vision_config.image_size),
        video=read_video_config(images, videos),
        quantization=QuantizationConfig(None, None, None, None),
        dtype="float32",
        source=source.name,
    )
    config.check()
    return config


def _read_vision(section: Section) -> VisionConfig:
    """Read the vision encoder's configuration."""
    section.check_fixed(FIXED_VISION)
    sizes = {key: _read_side(section, key, default) for key, default in VISION_DEFAULTS.items()}
    if sizes["num_hidden_layers"] > MOST_LAYERS:
        raise section.error("num_hidden_layers", f"it must be at most {MOST_LAYERS}")
    return VisionConfig(**sizes, layer_norm_eps=section.get_number("layer_norm_eps", 1e-6))


def _read_side(section: Section, key: str, default: int) -> int:
    """Read the integer at `key`, which may be written as a pair of equal integers."""
    value = section.values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        section = Section({key: value[0]}, section.name)
    return section.get_integer(key, default)


def _read_text(top: Section, section: Section) -> TextConfig:
    """Read the decoder's configuration."""
    section.check_fixed(FIXED_TEXT)
    sizes = {key: section.get_integer(key, default) for key, default in TEXT_DEFAULTS.items()}
    if sizes["num_hidden_layers"] > MOST_LAYERS:
        raise section.error("num_hidden_layers", f"it must be at most {MOST_LAYERS}")
    heads = sizes["num_attention_heads"]
    tied = top.get_flag("tie_word_embeddings", False) or section.get_flag(
        "tie_word_embeddings", False
    )
    return TextConfig(
        **sizes,
        num_key_value_heads=section.get_integer("num_key_value_heads", heads),
        head_dim=section.get_integer("head_dim", sizes["hidden_size"] // heads),
        rope_theta=_read_rope_theta(section),
        rms_norm_eps=section.get_number("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
    )


def _read_rope_theta(section: Section) -> float:
    """Read the base of the rotary position embedding from `rope_theta` or `rope_parameters`.

    It must be present: no published SmolVLM has the default of transformers' class, so a model
    with that default would run but answer badly.
    """
    bases: list[float] = []
    if section.values.get("rope_theta") is not None:
        bases.append(section.get_number("rope_theta", None))
    for key in ("rope_parameters", "rope_scaling"):
        rope = section.get_section(key)
        if rope is None:
            continue
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{rope.name}: rope type {shorten(kind)} is not supported, only default"
            )
        rope.check_fixed({"partial_rotary_factor": 1.0})
        if rope.values.get("rope_theta") is not None:
            bases.append(rope.get_number("rope_theta", None))
    if not bases:
        raise CheckpointError(
            f"{section.name}: neither rope_theta nor rope_parameters states the base of the "
            "rotary positions; add the one the model was trained with"
        )
    if len(set(bases)) > 1:
        raise CheckpointError(
            f"{section.name}: rope_theta and rope_parameters disagree: {bases[0]} and {bases[1]}"
        )
    return bases[0]
