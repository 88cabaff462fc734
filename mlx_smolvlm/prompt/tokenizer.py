"""A checkpoint's tokenizer.json, checked before the native reader of `tokenizers` sees it.

That reader takes memory for the largest id, and some values make it panic instead of fail;
patterns can make it run for hours. So only what tokenizers of this family are made of is read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_smolvlm.config import LARGEST
from mlx_smolvlm.errors import CheckpointError, SmolVLMError, format_error
from mlx_smolvlm.records import read_text, read_unique_keys

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST_FILE = 2**25  # bytes; that of SmolVLM2 has 3.5 million
MOST_ADDED = 2**13  # added tokens; Granite-Docling has some 600
LONGEST_PATTERN = 1000  # characters

FRAMING_TOKEN = re.compile(
    r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<end_of_utterance>"
    r"|<\|[^|]+\|>"
)
"""Tokens that frame turns and pictures."""

# Kinds of parts, by the key of tokenizer.json that holds them.
_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Sequence"))
_SPLITTERS = frozenset(("ByteLevel", "Digits", "Split", "Sequence"))
_KINDS = {
    "normalizer": _NORMALIZERS,
    "pre_tokenizer": _SPLITTERS,
    "decoder": frozenset(("ByteLevel", "Sequence")),
}
# The key of a Sequence that lists its members.
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}
# In a pattern: a group that is repeated, whose repetitions can be split in exponentially many
# ways; a reference to a group; a call of one.
_SLOW = re.compile(r"\)[*+{]|\\[1-9kg]")


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `path`, without truncation and padding, special tokens read as text.

    The tokens of `FRAMING_TOKEN` are special whatever the file says, since only special tokens can
    be read as text.

    Raises:
        CheckpointError: There is none, or one that no model with `vocab_size` tokens can have.
    """
    return parse_tokenizer(read_text(path, LARGEST_FILE), path, vocab_size)


def parse_tokenizer(text: str, path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that `text`, read from `path`, describes; see `read_tokenizer`."""
    try:
        values = json.loads(text, object_pairs_hook=read_unique_keys)
        _check(values, vocab_size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {format_error(error)}") from None
    framing = [
        token for token in values["added_tokens"] if FRAMING_TOKEN.fullmatch(token["content"])
    ]
    if not all(token.get("special") is True for token in framing):
        for token in framing:
            token["special"] = True
        text = json.dumps(values)
    from tokenizers import Tokenizer

    with convert_native_errors(CheckpointError, f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
    return tokenizer


@contextlib.contextmanager
def convert_native_errors(kind: type[SmolVLMError], message: str) -> Iterator[None]:
    """Turns what `tokenizers` raises, panics of Rust included, into an error of ours."""
    try:
        yield
    except BaseException as error:
        # A panic is no Exception, and its class stands in no module.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{message}: {format_error(error)}") from None
        raise


def _check(values: Any, vocab_size: int) -> None:
    """Refuse a parsed tokenizer.json that is of another kind, or has impossible ids.

    Raises:
        ValueError: It says what is wrong.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError("it has no model")
    model, added = values["model"], values.setdefault("added_tokens", [])
    kind, vocabulary = model.get("type", "BPE"), model.get("vocab")
    if kind != "BPE" or not isinstance(vocabulary, dict):
        raise ValueError(f"its model is {kind!r:.40} and must be BPE with a vocabulary")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"the model's {option} is {model[option]!r:.40}; it must be null")
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise ValueError(f"added_tokens must be a list of at most {MOST_ADDED} tokens")
    contents, added_ids = [], []
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError("added_tokens has one without content")
        contents.append(token["content"])
        added_ids.append(token.get("id"))
    if "" in contents or len({*contents}) != len(contents):
        raise ValueError("added_tokens has an empty text, or one twice")
    _check_ids(list(vocabulary.values()), vocab_size, "vocabulary")
    # The reader numbers added tokens itself where the file is wrong: see PromptBuilder.
    _check_ids(added_ids, LARGEST, "list of added tokens")
    for key, kinds in _KINDS.items():
        _check_part(values.get(key), kinds, key)


def _check_ids(ids: list[Any], limit: int, name: str) -> None:
    """Refuse `ids` that are not different integers from 0 to below `limit`."""
    for one in ids:
        if type(one) is not int or not 0 <= one < limit:
            raise ValueError(
                f"the {name} has token id {one!r:.40} and text.vocab_size is {limit} in config"
            )
    if len({*ids}) != len(ids):
        raise ValueError(f"the {name} has a token id twice")


def _check_part(part: Any, kinds: frozenset[str], key: str) -> None:
    """Refuse a normalizer, pre-tokenizer or decoder of none of `kinds`."""
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"its {key} is of type {kind!r:.40}; this package reads {', '.join(sorted(kinds))}"
        )
    if not isinstance(part, dict):
        if kind in ("Sequence", "Split"):
            raise ValueError(f"its {key} of type {kind} states nothing else")
        return
    if kind == "Sequence":
        # Only this key: the reader ignores the others, so a part could hide behind them.
        members = part.get(_MEMBERS[key])
        for member in members if isinstance(members, list) else [members]:
            _check_part(member, kinds, key)
    elif kind == "Split":
        pattern = part.get("pattern")
        text = next(iter(pattern.values()), None) if isinstance(pattern, dict) else None
        if pattern is None or not isinstance(text, str) or not 0 < len(text) <= LONGEST_PATTERN:
            raise ValueError(f"its {key} splits at no pattern, or too long a one")
        if "Regex" in pattern and _SLOW.search(text):
            raise ValueError(f"its {key} has a pattern that can take forever: {text!r:.80}")
