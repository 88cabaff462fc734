"""The tokenizer that a GGUF file's metadata describe, as a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint import TOKENIZER_FILE
from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.quoting import one_line

SPLITTERS = ("smollm",)  # llama.cpp's names of how text is split; others differ
CONTROL = 3  # llama.cpp's type of a token that stands for no text


def tokenizer_json(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The contents of tokenizer.json for the GGUF file `path`.

    Raises:
        CheckpointError: It is of another kind than SmolLM's, not whole, or has other than
            `vocab_size` tokens.
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
            f"{path}: the metadata's tokenizer is damaged ({one_line(error):.200}); put the "
            f"model's {TOKENIZER_FILE} beside it"
        ) from None
    tokenizer = Tokenizer(model)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    return values


def added_tokens(path: Path, tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json that belongs to the GGUF file `path`.

    Raises:
        CheckpointError: They are not as tokenizers writes them.
    """
    tokens = tokenizer.get("added_tokens")
    kinds = {"id": int, "content": str, "special": bool}
    if not isinstance(tokens, list) or not all(
        isinstance(one, dict) and all(type(one.get(key)) is kinds[key] for key in kinds)
        for one in tokens
    ):
        raise CheckpointError(f"the {TOKENIZER_FILE} of {path} has damaged added_tokens")
    return tokens


def placeholder_id(added: Sequence[Mapping[str, Any]], template: str, vocab_size: int) -> int:
    """A token that no prompt contains, to be that of pictures.

    A special token in what a user types stays text, so one that the template does not
    write will do; without any, it is the last of the vocabulary.
    """
    free = [token["id"] for token in added if token["special"] and token["content"] not in template]
    return int(max(free)) if free else vocab_size - 1
