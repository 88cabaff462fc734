"""Hugging Face folders with random weights, made without transformers or torch.

Names and shapes are written down here once more, after the published key lists, so
that they check the converter's table instead of repeating it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

TEMPLATE = "<|im_start|>{% for message in messages %}{{ message['role'] }}{% endfor %}"
ASKABLE_TEMPLATE = (
    "{% for message in messages %}{{message['role']}}: {% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
)
TOKENIZER = str(Path(__file__).with_name("tiny_tokenizer.json"))
SPECIAL = ("<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>")


def settings(**changes: Any) -> dict[str, Any]:
    """A small config.json; `changes` replace values, with vision__ and text__ for the parts."""
    values: dict[str, Any] = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": 60,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 6,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000,
            "vocab_size": 72,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    }
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        target = values[f"{part}_config"] if part else values
        if value is None:
            target.pop(name, None)
        else:
            target[name] = value
    return values


def shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint that config.json `values` describe, in transformers' style."""
    vision, text = values["vision_config"], values["text_config"]
    v, vm, p = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    d, tm, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    result: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, width: int, bias: bool) -> None:
        result[f"{name}.weight"] = (rows, width)
        if bias:
            result[f"{name}.bias"] = (rows,)

    tower = "model.vision_model"
    result[f"{tower}.embeddings.patch_embedding.weight"] = (v, 3, p, p)
    result[f"{tower}.embeddings.patch_embedding.bias"] = (v,)
    patches = (vision["image_size"] // p) ** 2
    result[f"{tower}.embeddings.position_embedding.weight"] = (patches, v)
    norms = [f"{tower}.post_layernorm"]
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{name}", v, v, True)
        linear(f"{layer}.mlp.fc1", vm, v, True)
        linear(f"{layer}.mlp.fc2", v, vm, True)
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    for name in norms:
        result[f"{name}.weight"] = result[f"{name}.bias"] = (v,)
    linear("model.connector.modality_projection.proj", d, v * values["scale_factor"] ** 2, False)
    linear("model.text_model.embed_tokens", text["vocab_size"], d, False)
    for i in range(text["num_hidden_layers"]):
        layer = f"model.text_model.layers.{i}"
        linear(f"{layer}.self_attn.q_proj", q, d, False)
        linear(f"{layer}.self_attn.k_proj", kv, d, False)
        linear(f"{layer}.self_attn.v_proj", kv, d, False)
        linear(f"{layer}.self_attn.o_proj", d, q, False)
        linear(f"{layer}.mlp.gate_proj", tm, d, False)
        linear(f"{layer}.mlp.up_proj", tm, d, False)
        linear(f"{layer}.mlp.down_proj", d, tm, False)
        result[f"{layer}.input_layernorm.weight"] = (d,)
        result[f"{layer}.post_attention_layernorm.weight"] = (d,)
    result["model.text_model.norm.weight"] = (d,)
    if not (values.get("tie_word_embeddings") or text.get("tie_word_embeddings")):
        linear("lm_head", text["vocab_size"], d, False)
    return result


def weights(values: dict[str, Any], dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random tensors, the same on every call, small enough for sensible activations."""
    random = np.random.default_rng(0)
    return {
        name: mx.array(random.standard_normal(shape, dtype=np.float32) * 0.05).astype(dtype)
        for name, shape in shapes(values).items()
    }


def mlx_vlm_weights(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """`tensors` as mlx-vlm names and lays them out."""
    result = {}
    for name, array in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith("text_model."):
            name = name.replace("text_model.", "language_model.", 1)
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        result[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return result


def write_json(path: Path, values: Any) -> None:
    """Write `values` to `path`."""
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, mx.array], shards: int = 1) -> None:
    """Save `tensors` in `folder`, in `shards` files as transformers names them."""
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        return
    names, index = sorted(tensors), {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in names[i::shards]}
        mx.save_safetensors(str(folder / name), part, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json with the special tokens that the family needs."""
    vocabulary = {chr(33 + i): i for i in range(58)}
    added = [*SPECIAL, "<end_of_utterance>"]
    ids = {"<image>": 60, "<end_of_utterance>": 61, "<fake_token_around_image>": 62}
    tokens = []
    for token in added:
        number = ids.get(token, 63 + len(tokens))
        tokens.append(
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    write_json(
        folder / "tokenizer.json", {"version": "1.0", "added_tokens": tokens, "model": model}
    )


def make(
    folder: Path,
    values: dict[str, Any] | None = None,
    tensors: dict[str, mx.array] | None = None,
    shards: int = 1,
) -> Path:
    """`folder` as a whole small SmolVLM2 checkpoint, as published ones are."""
    values = values or settings()
    folder.mkdir(parents=True, exist_ok=True)
    tile = values["vision_config"].get("image_size", 224)
    tile = tile[0] if isinstance(tile, list) else tile
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {"eos_token_id": 61})
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_image_splitting": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 1,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": 4 * tile},
            "max_image_size": {"longest_edge": tile},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": tile}},
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    write_tokenizer(folder)
    write_weights(folder, weights(values) if tensors is None else tensors, shards)
    return folder


def askable_settings(**changes: Any) -> dict[str, Any]:
    """`settings` for the vocabulary of tiny_tokenizer.json."""
    tokenizer = Tokenizer.from_file(TOKENIZER)
    return settings(
        image_token_id=tokenizer.token_to_id("<image>"),
        text__vocab_size=tokenizer.get_vocab_size(),
        **changes,
    )


def make_askable(
    folder: Path,
    values: dict[str, Any] | None = None,
    tensors: dict[str, mx.array] | None = None,
) -> Path:
    """`folder` as a checkpoint whose tokenizer and template take any question.

    `values` are `askable_settings`; without `tensors` the weights are random, in bfloat16.
    """
    values = values or askable_settings()
    make(folder, values, weights(values, mx.bfloat16) if tensors is None else tensors)
    tokenizer = Tokenizer.from_file(TOKENIZER)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"eos_token_id": tokenizer.token_to_id("<end_of_utterance>")}
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "chat_template.json", {"chat_template": ASKABLE_TEMPLATE})
    return folder
