"""Read text and JSON strictly, within limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import read_file

LARGEST_JSON = 2**24  # bytes
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of the file at `path`.

    Raises:
        CheckpointError: It is missing, not a regular file, larger than `max_bytes` or not text.
    """
    try:
        return read_file(path, max_bytes).decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; convert or fetch the checkpoint again") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path, max_bytes: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Integers of 20 digits or more become floats, as in other readers of JSON, so that no
    number is too large for one; tokenizer_config.json holds 1e30 written out.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON or not an object.
    """
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, the content of the file at `path`; see `read_json`."""
    try:
        values = json.loads(text, parse_int=_integer)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path} holds half a surrogate pair, which is no character"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def _integer(text: str) -> int | float:
    """A JSON integer."""
    return int(text) if len(text) < 20 else float(text)


def read_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different, for `json.loads(object_pairs_hook=...)`.

    Readers differ in which of two equal keys they take, so a file could mean one thing to the
    check and another to the native reader.

    Raises:
        ValueError: A key stands twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return values
