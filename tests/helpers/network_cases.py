"""Three small networks whose stages are compared with recorded ones, made without torch.

The recorded stages are transformers', by tests/reference/make_model_goldens.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.loop import generate_tokens
from mlx_smolvlm.model.model import Model
from tests.helpers import hf_folder

SAMPLES = 48  # values kept of each stage
NEW_TOKENS = 32


CASES: dict[str, dict[str, Any]] = {
    "256M-like": hf_folder.settings(
        model_type="idefics3", scale_factor=4, vision__model_type="idefics3_vision",
        vision__image_size=512, vision__patch_size=16, vision__num_attention_heads=2,
        text__num_attention_heads=3, text__num_key_value_heads=1, text__head_dim=32,
        text__hidden_size=96,
    ),
    "SO400M-like": hf_folder.settings(
        scale_factor=3, vision__image_size=384, vision__patch_size=14, vision__hidden_size=144,
        vision__intermediate_size=208, vision__num_attention_heads=2, text__rope_theta=130000,
    ),
    "tied": hf_folder.settings(
        vision__image_size=64, vision__patch_size=8, tie_word_embeddings=True,
        text__tie_word_embeddings=True, text__vocab_size=130, text__num_hidden_layers=3,
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> Path:
    """The Hugging Face folder of a case, with weights of which every layer shows."""
    values = CASES[name]
    random = np.random.default_rng(sum(name.encode()))
    tensors = {}
    for key, shape in hf_folder.shapes(values).items():
        noise = random.standard_normal(shape, dtype=np.float32)
        if "norm" in key and key.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = noise / np.float32(np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 10)
        tensors[key] = mx.array(noise)
    made: Path = hf_folder.make(folder, values, tensors)
    return made


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """`pixel_values` (2, H, W, 3) and `input_ids` (L,) with the placeholders of two tiles."""
    values = CASES[name]
    vision, side = values["vision_config"], values["vision_config"]["image_size"]
    random = np.random.default_rng(7)
    pixel_values = random.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    per_tile = (side // vision["patch_size"]) ** 2 // values["scale_factor"] ** 2
    image = [values["image_token_id"]] * per_tile
    return pixel_values, np.array([3, 9, 62, *image, 62, 17, *image, 62, 5, 40, 41])


def stages(model: Model, pixel_values: np.ndarray, input_ids: np.ndarray) -> dict[str, mx.array]:
    """What each stage of the network gives, by name, in order."""
    seen: dict[str, mx.array] = {}
    x = seen["patch embedding"] = model.vision_model.embeddings(mx.array(pixel_values))
    for number, layer in enumerate(model.vision_model.encoder.layers):
        x = seen[f"encoder layer {number}"] = layer(x)
    x = seen["post_layernorm"] = model.vision_model.post_layernorm(x)
    x = seen["connector"] = model.connector(x)
    x = seen["merged embeddings"] = model.embed(input_ids, x)
    positions = mx.array([0] * (model.text_model.rotary_rows + model.text_model.value_rows))
    for number, layer in enumerate(model.text_model.layers):
        x = seen[f"decoder layer {number}"] = layer(x, positions, None)
    x = seen["norm"] = model.text_model.norm(x)
    seen["logits"] = model.head(x)
    return seen


def greedy(model: Model, merged: mx.array) -> list[int]:
    """The ids that follow `merged` embeddings (1, L, D)."""
    sampler = lambda logits: mx.argmax(logits, keepdims=True)  # noqa: E731
    return list(generate_tokens(model, merged, model.make_cache(), sampler, NEW_TOKENS))


def sample(array: Any) -> list[float]:
    """`SAMPLES` values of an array, spread over it."""
    flat = np.asarray(array, np.float32).reshape(-1)
    return [float(value) for value in flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]]
