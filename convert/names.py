"""The name table: which source tensors make which modules of ours.

Source names are first normalized to the style of transformers without its leading `model.`;
`normalize_name` does so for every style in use:

    model.text_model.layers...       transformers
    text_model.layers..., model.model.text_model...   older and nested saves
    language_model.model.layers..., language_model.layers...   mlx-vlm
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlx_smolvlm.config import Config

# A prefix on the left is replaced by the one on the right; the first match counts.
PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "text_model."),
    ("language_model.", "text_model."),
)

# Buffers that some versions save; the configuration determines them.
IGNORED = (".rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Entry:
    """A module of ours and the source modules it is made of.

    Attributes:
        path: Path of our module.
        members: Paths of the source modules, whose rows are concatenated.
        shapes: Shapes of the members' weights in transformers' layout.
        bias: Whether they have biases.
        quantizable: Whether the module may be quantized.
    """

    path: str
    members: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bias: bool = False
    quantizable: bool = False

    @property
    def width(self) -> int:
        """Length of a row of the weight."""
        return self.shapes[0][-1]


def normalize_name(name: str) -> str | None:
    """Return the normalized name of the source tensor `name`; None for an unneeded buffer."""
    if name.endswith(IGNORED):
        return None
    while name.startswith("model."):
        name = name.removeprefix("model.")
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def list_entries(config: Config) -> list[Entry]:
    """List every module with weights of `config`, in the order in which they are written.

    `config` has the source's sizes, before the vision MLP is padded.
    """
    vision, text = config.vision, config.text
    result = [
        Entry(
            "vision_model.embeddings.patch_embedding",
            ("vision_model.embeddings.patch_embedding",),
            ((vision.hidden_size, 3, vision.patch_size, vision.patch_size),),
            bias=True,
        ),
        _make_entry(
            "vision_model.embeddings.position_embedding", (vision.num_patches, vision.hidden_size)
        ),
    ]
    for layer in range(vision.num_hidden_layers):
        result += _list_vision_layer(config, f"vision_model.encoder.layers.{layer}")
    result.append(_make_entry("vision_model.post_layernorm", (vision.hidden_size,), bias=True))
    width = vision.hidden_size * config.scale_factor**2
    result.append(_make_linear("connector.modality_projection.proj", (text.hidden_size, width)))
    result.append(_make_linear("text_model.embed_tokens", (text.vocab_size, text.hidden_size)))
    for layer in range(text.num_hidden_layers):
        result += _list_text_layer(config, f"text_model.layers.{layer}")
    result.append(_make_entry("text_model.norm", (text.hidden_size,)))
    if not text.tie_word_embeddings:
        result.append(_make_linear("lm_head", (text.vocab_size, text.hidden_size)))
    return result


def list_own_entries(config: Config) -> list[Entry]:
    """List the same modules for a source of this package's format: each has itself as member."""
    result = []
    for entry in list_entries(config):
        rows, width = sum(shape[0] for shape in entry.shapes), entry.shapes[0][1:]
        if len(width) > 1:  # in our format, the patch embedding is a matrix
            width = (math.prod(width),)
        result.append(replace(entry, members=(entry.path,), shapes=((rows, *width),)))
    return result


def _list_vision_layer(config: Config, path: str) -> Iterator[Entry]:
    """List the modules of the encoder layer at `path`."""
    hidden, mlp = config.vision.hidden_size, config.vision.intermediate_size
    attention = f"{path}.self_attn"
    yield _make_entry(f"{path}.layer_norm1", (hidden,), bias=True)
    yield _make_fused(
        attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"), (hidden,) * 3, hidden, True
    )
    yield _make_linear(f"{attention}.out_proj", (hidden, hidden), bias=True)
    yield _make_entry(f"{path}.layer_norm2", (hidden,), bias=True)
    yield _make_linear(f"{path}.mlp.fc1", (mlp, hidden), bias=True)
    yield _make_linear(f"{path}.mlp.fc2", (hidden, mlp), bias=True)


def _list_text_layer(config: Config, path: str) -> Iterator[Entry]:
    """List the modules of the decoder layer at `path`."""
    text = config.text
    hidden, mlp = text.hidden_size, text.intermediate_size
    queries, keys = (
        text.num_attention_heads * text.head_dim,
        text.num_key_value_heads * text.head_dim,
    )
    attention, feed = f"{path}.self_attn", f"{path}.mlp"
    yield _make_entry(f"{path}.input_layernorm", (hidden,))
    yield _make_fused(
        attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"), (queries, keys, keys), hidden
    )
    yield _make_linear(f"{attention}.o_proj", (hidden, queries))
    yield _make_entry(f"{path}.post_attention_layernorm", (hidden,))
    yield _make_fused(feed, "gate_up_proj", ("gate_proj", "up_proj"), (mlp, mlp), hidden)
    yield _make_linear(f"{feed}.down_proj", (hidden, mlp))


def _make_entry(path: str, shape: tuple[int, ...], bias: bool = False) -> Entry:
    """Make the entry of a module that is copied and never quantized."""
    return Entry(path, (path,), (shape,), bias)


def _make_linear(path: str, shape: tuple[int, int], bias: bool = False) -> Entry:
    """Make the entry of a module with one matrix."""
    return Entry(path, (path,), (shape,), bias, quantizable=True)


def _make_fused(
    parent: str,
    name: str,
    members: tuple[str, ...],
    rows: tuple[int, ...],
    width: int,
    bias: bool = False,
) -> Entry:
    """Make the entry of a module that concatenates the rows of `members`."""
    return Entry(
        f"{parent}.{name}",
        tuple(f"{parent}.{member}" for member in members),
        tuple((count, width) for count in rows),
        bias,
        quantizable=True,
    )
