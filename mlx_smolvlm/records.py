"""Strict reading of JSON files, and of dataclasses from JSON and TOML values."""

from __future__ import annotations

import dataclasses
import json
import numbers
import operator
import re
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.files import read_file


def read_integer(name: str, value: Any, accepts: Callable[[int], bool], limits: str) -> int:
    """Check that `value` is an integer in range, and return it as an int.

    NumPy integers are accepted; booleans and floats are not, whatever their value.

    Args:
        name: Name of the value, for the message.
        value: The value to check.
        accepts: Whether a number is in range.
        limits: The range in words, for the message.

    Raises:
        ValueError: The value is not accepted. The message begins with `name`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not accepts(number):
        raise ValueError(f"{name} is {value!r:.100}; it must be {limits}")
    return number


def read_number(name: str, value: Any, accepts: Callable[[float], bool], limits: str) -> float:
    """Check that `value` is a number in range, and return it as a float.

    NumPy numbers are accepted; booleans and strings are not. Arguments are as in
    `read_integer`.

    Raises:
        ValueError: The value is not accepted. The message begins with `name`.
    """
    number = float("nan")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
    if not accepts(number):
        raise ValueError(f"{name} is {value!r:.100}; it must be {limits}")
    return number


MAX_JSON = 2**24  # bytes
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of the file at `path`.

    Raises:
        CheckpointError: The file is missing, not a regular file, larger than `max_bytes` or
            not UTF-8.
    """
    try:
        return read_file(path, max_bytes).decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; convert or fetch the checkpoint again") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Integers of 20 digits or more become floats, as in other JSON readers;
    tokenizer_config.json contains 1e30 written out.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON or not an object.
    """
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, the content of the file at `path`; see `read_json`."""
    try:
        values = json.loads(text, parse_int=_parse_integer)
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


def _parse_integer(text: str) -> int | float:
    """The number that a JSON integer stands for; see `read_json`."""
    return int(text) if len(text) < 20 else float(text)


def read_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate keys, for `json.loads(object_pairs_hook=...)`.

    Readers differ in which duplicate they use, so our check and the native reader could see
    different values.

    Raises:
        ValueError: A key occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


T = TypeVar("T")

_TYPE_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_record(cls: type[T], values: Any, where: str = "", skip: Collection[str] = ()) -> T:
    """Build an instance of the dataclass `cls` from the dict `values`.

    Supported annotations: str, int, float, bool, None, Any, Literal, unions, tuples of any
    length, dicts with string keys, and dataclasses. Lists become tuples; integers become floats
    where the annotation says float.

    Args:
        cls: A dataclass.
        values: Its fields, as read from JSON or TOML.
        where: Prefix of the keys in messages, such as "lora.".
        skip: Fields that `values` must not contain.

    Raises:
        ValueError: A key is missing or unknown, or a value has a wrong type. The message names
            the key.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'it'} must be a table, not {shorten(values)}")
    fields = {one.name: one for one in dataclasses.fields(cls) if one.name not in skip}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(
                f"the key {shorten(where + key)} is not known; known: {', '.join(fields)}"
            )
    for name, one in fields.items():
        has_none = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if has_none and name not in values:
            raise ValueError(f"the key '{where}{name}' is missing")
    kinds = typing.get_type_hints(cls)
    return cls(**{name: read_value(kinds[name], values[name], where + name) for name in values})


def read_value(kind: Any, value: Any, where: str) -> Any:
    """Convert `value` to the type `kind`, see `read_record`; `where` names it in messages."""
    for one in _list_types(kind):
        if isinstance(one, type) and dataclasses.is_dataclass(one) and isinstance(value, dict):
            return read_record(one, value, f"{where}.")
        if one is Any:
            return value
        if typing.get_origin(one) is dict and isinstance(value, dict):
            inner = typing.get_args(one)[1]
            return {key: read_value(inner, item, f"{where}.{key}") for key, item in value.items()}
        if typing.get_origin(one) is tuple and isinstance(value, list):
            inner = typing.get_args(one)[0]
            return tuple(read_value(inner, item, where) for item in value)
        if typing.get_origin(one) is Literal and value in typing.get_args(one):
            return value
        if type(value) is one and (one is not int or abs(value) < 2**63):
            return value
        if one is float and type(value) is int and abs(value) < 2**63:
            return float(value)
    raise ValueError(f"{where} must be {_describe_type(kind)}, not {shorten(value)}")


def _list_types(kind: Any) -> tuple[Any, ...]:
    """The members of a union; for any other type, the type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _describe_type(kind: Any) -> str:
    """The name of the type `kind` in messages; None in a union is left out."""
    names = []
    for one in _list_types(kind):
        if typing.get_origin(one) is tuple:
            inner = _describe_type(typing.get_args(one)[0])
            names.append(
                f"a list, each item {inner}"
                if " or " in inner
                else f"a list of {_pluralize(inner)}"
            )
        elif typing.get_origin(one) is Literal:
            names.append(f"one of {', '.join(typing.get_args(one))}")
        elif one is not type(None):
            names.append(_TYPE_NAMES.get(one, "a table"))
    return " or ".join(names) or "null"


def _pluralize(name: str) -> str:
    """The plural of one of `_TYPE_NAMES`: "a text" becomes "texts"."""
    return f"{name.removeprefix('a ')}s"
