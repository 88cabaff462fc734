"""Turns JSON Schemas and regular expressions into grammars, and answers into values.

The grammars are those of llguidance, which the extra `json` installs. How schemas are read, and
why: docs/decisions/constrained.md.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from mlx_smolvlm.errors import ConstraintError, SmolVLMWarning, format_error

if TYPE_CHECKING:
    import llguidance

Schema = Mapping[str, Any] | type[Any] | str
"""A JSON Schema, as an object or a text, or a pydantic model."""

# Without flexible white space, an answer cannot be endless white space. The other options make
# llguidance refuse schemas that it does not fully support.
_OPTIONS = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
DEEPEST = 127  # levels of a schema; llguidance's limit
MOST_VALUES = 10**6  # values in a schema; a shared one counts each time it occurs
_UNSATISFIED = "NoExtensionBias"  # llguidance's error for a state in which no token is allowed


def import_llguidance() -> Any:
    """Import and return the package llguidance.

    Raises:
        ConstraintError: llguidance is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise ConstraintError(
            "schema and regex need llguidance, which is not installed; "
            "install it with: pip install 'mlx-smolvlm[json]'"
        ) from None
    return llguidance


def make_grammar(schema: Schema | None, regex: str | None, lead: str = "") -> str:
    """Return llguidance's grammar for `lead` and an answer that fits `schema` or `regex`.

    Raises:
        ConstraintError: llguidance is not installed.
        ValueError: `schema` is not a JSON Schema.
    """
    module = import_llguidance()
    if schema is not None:
        values = {**close_objects(read_schema(schema)), "x-guidance": _OPTIONS}
        try:
            body = f"body: %json {json.dumps(values)}"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema is not JSON: {error}") from None
    else:
        body = f"BODY: /{module.regex_to_lark(regex, '')}/"
    name = body.partition(":")[0]
    return f"start: {json.dumps(lead) if lead else ''} {name}\n{body}"


def check_constraint(schema: Schema | None, regex: str | None) -> None:
    """Check that answers can be constrained to `schema` or `regex`.

    Raises:
        ConstraintError: llguidance is not installed.
        ValueError: They cannot; the message begins with "schema" or "regex".
    """
    name = "regex" if schema is None else "schema"
    if regex is not None:
        if not isinstance(regex, str):
            raise ValueError(f"regex is {regex!r:.100}; it must be a text")
        if not _is_unicode(regex):
            raise ValueError("regex has a character that is not valid Unicode; give UTF-8 text")
    module, text = import_llguidance(), make_grammar(schema, regex)
    tokenizer = _make_byte_tokenizer()
    matcher = module.LLMatcher(tokenizer, text, log_level=0)
    if not matcher.is_error():
        matcher.consume_tokens(matcher.compute_ff_tokens())
        bits = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    if matcher.is_error():
        reason = read_matcher_error(matcher)
        subject = f"regex {regex!r:.200}" if schema is None else name
        raise ValueError(f"{subject} cannot be used: {reason}; change or simplify it")


def read_matcher_error(matcher: llguidance.LLMatcher) -> str:
    """Return the error of `matcher` in one line."""
    message = matcher.get_error()
    if message.startswith(_UNSATISFIED):
        return "no answer can fit it"
    match = re.search(r"^error: (.*)", message, re.MULTILINE)  # in a regular expression
    line = match[1] if match else message.splitlines()[0]
    return format_error(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", line))


def read_schema(schema: Schema) -> dict[str, Any]:
    """Return `schema` as an object.

    Raises:
        ValueError: `schema` is not a JSON Schema in any of these forms, or too large.
    """
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    elif isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise ValueError(
            f"schema is {schema!r:.100}; it must be a JSON object, its text, or a pydantic model"
        )
    _check_size(schema)
    return dict(schema)


def _check_size(value: Any, level: int = 1, count: int = 0) -> int:
    """Return `count` plus the number of values in `value`, itself included.

    The depth is checked first, since a schema in Python may contain itself.

    Raises:
        ValueError: `value` is nested too deeply or has too many values.
    """
    if level > DEEPEST:
        raise ValueError(f"schema is nested more than {DEEPEST} levels deep; simplify it")
    if count >= MOST_VALUES:
        raise ValueError(f"schema has more than {MOST_VALUES:,} values; simplify it")
    count += 1
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return count
    for one in value:
        count = _check_size(one, level + 1, count)
    return count


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_answer(text: str, schema: Schema | None) -> Any:
    """Return the value of an answer, an instance if `schema` is a pydantic model.

    Returns None without a schema. Also returns None, with a warning, if the answer fits the schema
    but pydantic or Python cannot parse it: a model's own validators may refuse it.
    """
    if schema is None:
        return None
    try:
        if hasattr(schema, "model_validate_json"):
            return schema.model_validate_json(text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        warnings.warn(
            f"the answer fits the schema but cannot be parsed: {format_error(error)}",
            SmolVLMWarning,
            stacklevel=2,
        )
        return None


def to_jsonable(value: Any) -> Any:
    """Return a result of `parse_answer` as a value for JSON."""
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


@lru_cache(maxsize=1)
def _make_byte_tokenizer() -> llguidance.LLTokenizer:
    """Return a tokenizer whose tokens are the 256 bytes, for checking grammars."""

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
        tokens = (*(bytes([value]) for value in range(256)), b"<eos>")

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    module = import_llguidance()
    tokenizer: llguidance.LLTokenizer = module.LLTokenizer(module.TokenizerWrapper(Bytes()))
    return tokenizer


# Keywords whose value is a schema, a list of schemas, or an object of schemas.
_ONE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_LIST = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Keywords that combine an object's properties with those of another schema.
_JOINS = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas")
# Keywords that say which other properties an object may have.
_OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `schema` whose objects have only the properties that are listed.

    JSON Schema allows any other properties by default, and a small model would invent more and
    more of them. All values that fit the result fit `schema`. If the properties of an object come
    from several schemas, all objects stay open, since closing one of these schemas would exclude
    the properties of the others.
    """
    nodes: list[dict[str, Any]] = []
    copy: dict[str, Any] = _copy_schema(schema, nodes)
    if any(_joins_properties(node) for node in nodes):
        return copy
    for node in nodes:
        properties = node.get("properties")
        if not isinstance(properties, dict) or any(name in node for name in _OPENING):
            continue
        required, minimum = node.get("required", []), node.get("minProperties", 0)
        names = {*map(str, required)} if isinstance(required, list) else set()
        is_possible = isinstance(minimum, int) and minimum <= len(properties)
        if names <= properties.keys() and is_possible:
            node["additionalProperties"] = False
    return copy


def _joins_properties(node: dict[str, Any]) -> bool:
    """Whether `node` combines several schemas that may each list properties."""
    all_of = node.get("allOf")
    count = sum(name in node for name in _JOINS if name != "allOf")
    count += len(all_of) if isinstance(all_of, list | tuple) else 0
    return count > 1 or (count == 1 and "properties" in node)


def _copy_schema(schema: Any, nodes: list[dict[str, Any]]) -> Any:
    """Return a copy of `schema` with references as URIs; append every schema in it to `nodes`."""
    if not isinstance(schema, Mapping):
        return schema
    node = dict(schema)
    for name, value in schema.items():
        if name in _LIST and isinstance(value, list):
            node[name] = [_copy_schema(one, nodes) for one in value]
        elif name in _NAMED and isinstance(value, Mapping):
            node[name] = {key: _copy_schema(one, nodes) for key, one in value.items()}
        elif name in _ONE:
            node[name] = _copy_schema(value, nodes)
        elif name == "$ref" and isinstance(value, str) and _is_unicode(value):
            node[name] = quote(value, safe="#/:?&=%~!$'()*+,;@[]")
    nodes.append(node)
    return node
