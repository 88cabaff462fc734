"""Reads a checkpoint's tokenizer.json, after checking it for the native reader of `tokenizers`.

That reader allocates memory up to the largest id, panics on some values, and can run for hours
on some patterns. So only the features that tokenizers of this model family use are accepted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_smolvlm.config import MAX_SIZE
from mlx_smolvlm.errors import CheckpointError, SmolVLMError, format_error
from mlx_smolvlm.records import read_text, read_unique_keys

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST_FILE = 2**25  # bytes; SmolVLM2's file has 3.5 million
MOST_ADDED = 2**13  # added tokens; Granite-Docling has about 600
LONGEST_PATTERN = 1000  # characters

FRAMING_TOKEN = re.compile(
    r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<end_of_utterance>"
    r"|<\|[^|]+\|>"
)
"""Matches the tokens that frame turns and pictures."""

# The types that are accepted, by their key in tokenizer.json.
_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Sequence"))
_SPLITTERS = frozenset(("ByteLevel", "Digits", "Split", "Sequence"))
_KINDS = {
    "normalizer": _NORMALIZERS,
    "pre_tokenizer": _SPLITTERS,
    "decoder": frozenset(("ByteLevel", "Sequence")),
}
# The key under which a Sequence lists its members.
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}
# Slow parts of a pattern: a repeated group, which may match in exponentially many ways; a
# reference to a group; a call of a group.
_SLOW = re.compile(r"\)[*+{]|\\[1-9kg]")


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read the tokenizer in the file `path`.

    It neither truncates nor pads, and encodes special tokens in a text as text. Tokens that
    match `FRAMING_TOKEN` become special whatever the file says, since only special tokens can be
    encoded as text.

    Raises:
        CheckpointError: The file is missing, malformed, or does not fit a model with `vocab_size`
            tokens.
    """
    return parse_tokenizer(read_text(path, LARGEST_FILE), path, vocab_size)


def parse_tokenizer(text: str, path: Path, vocab_size: int) -> Tokenizer:
    """Parse `text`, the content of the file `path`; see `read_tokenizer`."""
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
    """Convert errors of `tokenizers`, Rust panics included, into `kind` with `message`."""
    try:
        yield
    except BaseException as error:
        # A panic is not an Exception, and its class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{message}: {format_error(error)}") from None
        raise


def _check(values: Any, vocab_size: int) -> None:
    """Check the values of a tokenizer.json: types, token ids and patterns.

    Raises:
        ValueError: A value is not accepted.
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
            raise ValueError("added_tokens has a token without content")
        contents.append(token["content"])
        added_ids.append(token.get("id"))
    if "" in contents or len({*contents}) != len(contents):
        raise ValueError("added_tokens has an empty token, or the same token twice")
    _check_ids(list(vocabulary.values()), vocab_size, "vocabulary")
    # The reader renumbers added tokens with wrong ids; PromptBuilder checks the result.
    _check_ids(added_ids, MAX_SIZE, "list of added tokens")
    for key, kinds in _KINDS.items():
        _check_part(values.get(key), kinds, key)


def _check_ids(ids: list[Any], limit: int, name: str) -> None:
    """Raise ValueError unless `ids` are distinct integers from 0 to `limit` - 1."""
    for one in ids:
        if type(one) is not int or not 0 <= one < limit:
            raise ValueError(
                f"the {name} has token id {one!r:.40} and text.vocab_size is {limit} in config"
            )
    if len({*ids}) != len(ids):
        raise ValueError(f"the {name} has the same token id twice")


def _check_part(part: Any, kinds: frozenset[str], key: str) -> None:
    """Raise ValueError if a normalizer, pre-tokenizer or decoder is not one of `kinds`."""
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"its {key} is of type {kind!r:.40}; this package reads {', '.join(sorted(kinds))}"
        )
    if not isinstance(part, dict):
        if kind in ("Sequence", "Split"):
            raise ValueError(f"its {key} of type {kind} has no settings")
        return
    if kind == "Sequence":
        # The reader ignores every other key, so only these members are used.
        members = part.get(_MEMBERS[key])
        for member in members if isinstance(members, list) else [members]:
            _check_part(member, kinds, key)
    elif kind == "Split":
        pattern = part.get("pattern")
        text = next(iter(pattern.values()), None) if isinstance(pattern, dict) else None
        if pattern is None or not isinstance(text, str) or not 0 < len(text) <= LONGEST_PATTERN:
            raise ValueError(f"its {key} splits at no pattern, or at one that is too long")
        if "Regex" in pattern and _SLOW.search(text):
            raise ValueError(f"its {key} has a pattern that can take forever: {text!r:.80}")
