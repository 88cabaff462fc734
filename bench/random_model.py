"""Make a checkpoint of a published model's sizes with random weights, without the network.

Speed and memory do not depend on the values of the weights. Tokenizer and chat template are the
demo's, so the ids of the prompt are far below the vocabulary's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.checkpoint.headers import write_arrays
from mlx_smolvlm.checkpoint.load import TEMPLATE_FILE, TOKENIZER_FILE, read_config
from mlx_smolvlm.config import Config, ImageConfig, QuantizationConfig
from mlx_smolvlm.convert.catalog import SIZES
from mlx_smolvlm.convert.hub import DEMO, resolve
from mlx_smolvlm.convert.names import Entry, list_entries
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import sync

SHARD_BYTES = 10**9
COMPLETE_FILE = "config.json"  # is written last
MARK = ".mlx-smolvlm-bench"  # is written first: only a folder with this file is replaced


def make_config(size: str, dtype: str) -> Config:
    """Return the configuration of SmolVLM2 of `size`, with the special tokens of the demo."""
    demo = read_config(resolve(DEMO))
    vision, text, scale_factor = SIZES[size]
    video = demo.video and replace(demo.video, longest_edge=vision.image_size)
    return Config(
        vision=vision,
        text=text,
        scale_factor=scale_factor,
        image_token_id=demo.image_token_id,
        eos_token_ids=demo.eos_token_ids,
        image=ImageConfig(4 * vision.image_size, demo.image.mean, demo.image.std, True),
        video=video,
        quantization=QuantizationConfig(None, None, None, None),
        dtype=dtype,
        source=f"random-{size}",
    )


def make_random_source(folder: Path, config: Config) -> Path:
    """Write a checkpoint in Hugging Face's format with random weights, unless it exists.

    Args:
        folder: Where to write it. If it holds a complete checkpoint of the same configuration,
            nothing is written. If it holds another that this function wrote, or began to write,
            that is replaced.
        config: Sizes and type of the weights.

    Returns:
        `folder`.

    Raises:
        CheckpointError: `folder` holds something else.
        OSError: The disk is full, or `folder` cannot be written.
    """
    settings = json.dumps(make_hf_config(config), indent=2) + "\n"
    complete = folder / COMPLETE_FILE
    if complete.is_file() and complete.read_text(encoding="utf-8") == settings:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise CheckpointError(
            f"{folder} is not a model that bench made, so it is not replaced; give another --work"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    demo = resolve(DEMO)
    for name in (TOKENIZER_FILE, TEMPLATE_FILE):
        shutil.copyfile(demo / name, folder / name)
    tile = config.tile_size
    image = {
        "image_mean": config.image.mean,
        "image_std": config.image.std,
        "size": {"longest_edge": config.image.longest_edge},
        "max_image_size": {"longest_edge": tile},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": tile}},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
    _write_shards(folder, config)
    complete.write_text(settings, encoding="utf-8")
    sync(complete)
    return folder


def make_hf_config(config: Config) -> dict[str, Any]:
    """Return the contents of Hugging Face's config.json for `config`."""
    vision, text = dict(vars(config.vision)), dict(vars(config.text))
    eos = config.eos_token_ids[0]
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": config.image_token_id,
        "eos_token_id": eos,
        "pad_token_id": 0,
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "num_channels": 3,
            **vision,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "eos_token_id": eos,
            "pad_token_id": 0,
            **text,
        },
    }


def _write_shards(folder: Path, config: Config) -> None:
    """Write random tensors for all modules of `config`, in files of about `SHARD_BYTES`."""
    shards: list[list[str]] = []
    arrays: dict[str, mx.array] = {}

    def flush() -> None:
        shards.append(list(arrays))
        with (folder / f"part-{len(shards)}").open("wb") as file:
            write_arrays(file, arrays, {"format": "pt"})
        arrays.clear()

    for name, array in _make_tensors(config):
        if sum(one.nbytes for one in arrays.values()) + array.nbytes > SHARD_BYTES and arrays:
            flush()
        arrays[name] = array
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file_name = "model.safetensors"
        (folder / f"part-{number}").rename(folder / file_name)
        index |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _make_tensors(config: Config) -> Iterator[tuple[str, mx.array]]:
    """Yield the name and random values of each tensor, the same on every call.

    Matrices are small enough that activations stay moderate; the scales of normalizations are
    about 1.
    """
    random = np.random.default_rng(0)
    dtype: mx.Dtype = getattr(mx, config.dtype)

    def make(shape: tuple[int, ...], center: float) -> mx.array:
        values = random.random(shape, dtype=np.float32)
        values -= 0.5
        values *= 0.1
        values += center
        array = mx.array(values).astype(dtype)
        mx.eval(array)
        return array

    def list_members(entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
        for member, shape in zip(entry.members, entry.shapes, strict=True):
            yield member if member == "lm_head" else f"model.{member}", shape

    for entry in list_entries(config):
        for member, shape in list_members(entry):
            is_norm = len(shape) == 1
            yield f"{member}.weight", make(shape, 1.0 if is_norm else 0.0)
            if entry.bias:
                yield f"{member}.bias", make(shape[:1], 0.0)
