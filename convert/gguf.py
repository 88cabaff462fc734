"""Unpack llama.cpp's GGUF files of SmolLM2 into a folder that the converter reads.

A GGUF file of SmolLM2 holds only the decoder. It becomes a text-only checkpoint: the chat template
takes no pictures, and a minimal vision encoder is filled with zeros. Packed matrices stay packed:
GGUF's Q4_0, Q4_1 and Q8_0 are MLX's affine mode in groups of 32.

Source: llama.cpp, gguf-py/gguf/constants.py (names and metadata) and conversion of Llama models
(the row order of queries and keys).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_smolvlm.checkpoint.headers import WEIGHTS_FILE, write_arrays
from mlx_smolvlm.checkpoint.load import TEMPLATE_FILE, TOKENIZER_FILE, read_chat_template
from mlx_smolvlm.config import MAX_SIZE
from mlx_smolvlm.convert.gguf_file import GROUP, PACKED_BITS, GgufFile, decode_tensor, open_gguf
from mlx_smolvlm.errors import CheckpointError, format_error, shorten
from mlx_smolvlm.records import read_json

SPLITTERS = ("smollm",)  # llama.cpp's names of the supported pre-tokenizers
CONTROL = 3  # llama.cpp's type of control tokens


def build_tokenizer(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Build the contents of tokenizer.json from the metadata of the GGUF file `path`.

    Raises:
        CheckpointError: The tokenizer is not SmolLM's, is incomplete, or does not have `vocab_size`
            tokens.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in SPLITTERS:
        raise CheckpointError(
            f"{path} has a tokenizer of kind {shorten(kind[0])}, {shorten(kind[1])}, which cannot "
            f"be made from the metadata; put the model's {TOKENIZER_FILE} beside it"
        )
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        texts = metadata["tokenizer.ggml.tokens"]
        kinds = metadata["tokenizer.ggml.token_type"].tolist()
        pairs = [pair.split(" ") for pair in metadata["tokenizer.ggml.merges"]]
        vocabulary = {text: number for number, text in enumerate(texts)}
        control = [text for text, one in zip(texts, kinds, strict=True) if one == CONTROL]
        if len(vocabulary) != len(texts) or len(texts) != vocab_size:
            raise ValueError(
                f"{len(vocabulary)} different texts of {len(texts)}, for {vocab_size} tokens"
            )
        merges = [(left, right) for left, right in pairs]
        model = models.BPE(vocab=vocabulary, merges=merges)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            f"{path}: the metadata's tokenizer is damaged ({format_error(error):.200}); put the "
            f"model's {TOKENIZER_FILE} beside it"
        ) from None
    tokenizer = Tokenizer(model)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    return values


def check_added_tokens(path: Path, tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of the `tokenizer` for the GGUF file `path`.

    Raises:
        CheckpointError: They are damaged.
    """
    tokens = tokenizer.get("added_tokens")
    kinds = {"id": int, "content": str, "special": bool}
    if not isinstance(tokens, list) or not all(
        isinstance(one, dict) and all(type(one.get(key)) is kinds[key] for key in kinds)
        for one in tokens
    ):
        raise CheckpointError(f"the {TOKENIZER_FILE} of {path} has damaged added_tokens")
    return tokens


def choose_image_token(added: Sequence[Mapping[str, Any]], template: str, vocab_size: int) -> int:
    """Choose an image token id that no prompt contains.

    Special tokens in a user's text are not parsed, so any special token that the template does not
    write will do. Without one, it is the last of the vocabulary.
    """
    free = [token["id"] for token in added if token["special"] and token["content"] not in template]
    return int(max(free)) if free else vocab_size - 1


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd": "model.text_model.embed_tokens",
    "output_norm": "model.text_model.norm",
    "output": "lm_head",
}
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
FLOAT_KEYS = ("rms_norm_eps", "rope_theta")
# The encoder of zeros, which never runs; wide enough for groups of 128.
VISION = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
SCALE_FACTOR = 2


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write the checkpoint in the GGUF file `path` into `folder`, in the Hugging Face layout.

    A tokenizer.json or chat_template.jinja beside `path` is used instead of the one in the
    metadata.

    Raises:
        CheckpointError: The file is damaged, has another architecture or an unsupported tensor
            type, or is the language part of a vision-language model.
        OSError: `folder` cannot be written to.
    """
    with open_gguf(path) as file:
        text = _read_text_config(path, file)
        tensors, packing = _read_tensors(path, file, text)
        metadata = file.metadata
    tokenizer, template = (
        _read_tokenizer(path, metadata, text["vocab_size"]),
        _read_template(path, metadata),
    )
    added = check_added_tokens(path, tokenizer)
    if any(token["content"] == "<image>" for token in added):
        raise CheckpointError(
            f"{path} is the language part of a vision-language model, without its encoder; "
            "convert the safetensors that it was made from"
        )
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if type(eos) is not int or not 0 <= eos < text["vocab_size"]:
        raise CheckpointError(
            f"{path}: the end token is {shorten(eos)}, which is not one of the "
            f"{text['vocab_size']:,} tokens; fetch it again"
        )
    config = {
        "model_type": "idefics3",
        "image_token_id": choose_image_token(added, template, text["vocab_size"]),
        "scale_factor": SCALE_FACTOR,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "eos_token_id": eos,
        "text_config": text,
        "vision_config": VISION,
    } | ({"quantization": packing} if packing else {})
    dtype = tensors["model.text_model.norm.weight"].dtype
    tensors |= _make_empty_vision(text["hidden_size"], dtype)
    _write_json(folder / "config.json", config)
    size = VISION["image_size"]
    edges = {"size": {"longest_edge": size}, "max_image_size": {"longest_edge": size}}
    _write_json(folder / "preprocessor_config.json", edges)
    _write_json(folder / TOKENIZER_FILE, tokenizer)
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    with (folder / WEIGHTS_FILE).open("xb") as weights:
        write_arrays(weights, tensors, {"format": "mlx"})


def _write_json(path: Path, values: Any) -> None:
    """Write `values` to the JSON file `path`."""
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _read_text_config(path: Path, file: GgufFile) -> dict[str, Any]:
    """Read the `text_config` of a config.json from the metadata and the embeddings' shape.

    Raises:
        CheckpointError: A value is missing, or our decoder does not support the model.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path} is a {shorten(architecture)} model; of GGUF files those of 'llama' can be "
            "converted, such as SmolLM2's"
        )
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{path}: rope scaling {shorten(scaling)} is not supported")
    text: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu"}
    for name, key in SIZES.items():
        kind = float if name in FLOAT_KEYS else int
        text[name] = _read_number(path, metadata, f"llama.{key}", kind)
    embedding = file.tensors.get("token_embd.weight")
    shape = () if embedding is None else embedding.shape
    if len(shape) != 2 or shape[1] != text["hidden_size"]:
        raise CheckpointError(
            f"{path}: 'token_embd.weight' has the shape {shape}, and the metadata state a width "
            f"of {text['hidden_size']}; fetch it again"
        )
    text["rms_norm_eps"] = round(text["rms_norm_eps"], 12)  # float32 says 9.99999974e-06
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if "llama.attention.key_length" in metadata:
        text["head_dim"] = _read_number(path, metadata, "llama.attention.key_length", int)
    rope_dim = metadata.get("llama.rope.dimension_count", text["head_dim"])
    if rope_dim != text["head_dim"]:
        raise CheckpointError(
            f"{path}: rope rotates {shorten(rope_dim)} of {text['head_dim']} dimensions of a head, "
            "which is not supported"
        )
    if text["num_hidden_layers"] > len(file.tensors):
        raise CheckpointError(f"{path}: the metadata state more layers than there are tensors")
    text["vocab_size"] = shape[0]
    text["tie_word_embeddings"] = "output.weight" not in file.tensors
    return text


def _read_number(path: Path, metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    """Read the positive number of type `kind` at `key`."""
    value: Any = metadata.get(key)
    is_kind = type(value) is kind
    if not is_kind or not 0 < value < (MAX_SIZE if kind is int else math.inf):
        raise CheckpointError(
            f"{path}: the metadata have no usable {key} ({shorten(value)}); fetch it again"
        )
    return value


def _read_tensors(
    path: Path, file: GgufFile, text: Mapping[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read the tensors, by Hugging Face name, and make "quantization" of config.json."""
    heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
    modules = {name: _find_module(path, name) for name in sorted(file.tensors)}
    missing = [name for name in TOP_NAMES.values() if name not in modules.values()]
    if missing not in ([], ["lm_head"]):
        raise CheckpointError(f"{path}: '{missing[0]}.weight' is missing; fetch it again")
    tensors: dict[str, mx.array] = {}
    kinds: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        info = file.tensors[name]
        arrays = decode_tensor(info.type, info.shape, file.read(info))
        count = heads.get(name.split(".")[-2])
        if count is not None:
            arrays = {k: _reorder_rows(path, name, array, count) for k, array in arrays.items()}
        if info.type in PACKED_BITS:
            kinds[module] = {"group_size": GROUP, "bits": PACKED_BITS[info.type]}
        tensors |= {f"{module}.{suffix}": array for suffix, array in arrays.items()}
    if not kinds:
        return tensors, {}
    usual = next(iter(kinds.values()))
    return tensors, dict(usual) | {name: kind for name, kind in kinds.items() if kind != usual}


def _find_module(path: Path, name: str) -> str:
    """Return the Hugging Face name of the module whose weight is the tensor `name`."""
    match = re.fullmatch(r"blk\.([0-9]{1,5})\.(\w+)\.weight", name)
    module = LAYER_NAMES.get(match[2]) if match else TOP_NAMES.get(name.removesuffix(".weight"))
    if module is None or not name.endswith(".weight"):
        raise CheckpointError(f"{path}: tensor {shorten(name)} is not part of a SmolLM2 decoder")
    return f"model.text_model.layers.{match[1]}.{module}" if match else module


def _reorder_rows(path: Path, name: str, array: mx.array, heads: int) -> mx.array:
    """Reorder the rows of queries or keys for our rope, which pairs i with i + head_dim / 2.

    llama.cpp pairs 2i with 2i + 1. Packed rows can be moved too, since groups lie along rows.
    """
    rows, width = array.shape[0], array.size // array.shape[0]
    if array.ndim != 2 or rows % (2 * heads):
        raise CheckpointError(
            f"{path}: tensor '{name}' has {rows} rows, which {heads} heads do not share"
        )
    halves = array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2)
    return mx.contiguous(halves.reshape(rows, width))


def _make_empty_vision(width: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Make zero weights for the encoder and the connector of a decoder of size `width`."""
    hidden, patch = VISION["hidden_size"], VISION["patch_size"]
    tower, layer = "model.vision_model", "model.vision_model.encoder.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (hidden,),
        f"{tower}.embeddings.position_embedding.weight": (
            (VISION["image_size"] // patch) ** 2,
            hidden,
        ),
        "model.connector.modality_projection.proj.weight": (width, hidden * SCALE_FACTOR**2),
    }
    names = [f"{layer}.self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    for name in (*names, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"):
        shapes |= {f"{name}.weight": (hidden, hidden), f"{name}.bias": (hidden,)}
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{tower}.post_layernorm"):
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {name: mx.zeros(shape, dtype) for name, shape in shapes.items()}


def _read_tokenizer(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Read tokenizer.json beside `path`, or build it from `metadata`."""
    beside = path.with_name(TOKENIZER_FILE)
    return read_json(beside) if beside.is_file() else build_tokenizer(path, metadata, vocab_size)


def _read_template(path: Path, metadata: Mapping[str, Any]) -> str:
    """Read the chat template beside `path`, or the one in `metadata`."""
    if path.with_name(TEMPLATE_FILE).is_file():
        return read_chat_template(path.parent)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path} has no chat template; put a {TEMPLATE_FILE} beside it")
    return template
