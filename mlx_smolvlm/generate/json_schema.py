"""A JSON Schema or a regular expression as the grammar of an answer, and the answer as a value.

Grammars are llguidance's, which comes with the extra `json`. How schemas are read, and
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

# No white space, so none can go on forever; nothing of a schema is skipped or approximated.
_OPTIONS = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
DEEPEST = 127  # levels of a schema; llguidance reads no more
MOST_VALUES = 10**6  # in a schema; one that is shared counts wherever it stands
_UNSATISFIED = "NoExtensionBias"  # llguidance's word for a state that nothing leads out of


def import_llguidance() -> Any:
    """The package llguidance.

    Raises:
        ConstraintError: It is not installed.
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
    """llguidance's grammar of `lead` and an answer that fits `schema` or `regex`.

    Raises:
        ConstraintError: llguidance is not installed.
        ValueError: The schema is none.
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
    """Refuse what no answer can be constrained to.

    Raises:
        ConstraintError: llguidance is not installed.
        ValueError: The message begins with "schema" or "regex", and says why.
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
        shown = f"regex {regex!r:.200}" if schema is None else name
        raise ValueError(f"{shown} cannot be used: {reason}; change or simplify it")


def read_matcher_error(matcher: llguidance.LLMatcher) -> str:
    """What went wrong in `matcher`, in one line."""
    message = matcher.get_error()
    if message.startswith(_UNSATISFIED):
        return "no answer can fit it"
    found = re.search(r"^error: (.*)", message, re.MULTILINE)  # of a regular expression
    line = found[1] if found else message.splitlines()[0]
    return format_error(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", line))


def read_schema(schema: Schema) -> dict[str, Any]:
    """The JSON Schema that `schema` is, holds or describes.

    Raises:
        ValueError: It is none of these.
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
    """How many values there are with those of `value`; too deep or too many are refused.

    The depth is checked first, since a schema in Python may hold itself.

    Raises:
        ValueError: It says which.
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
    """The value that `text` holds, an instance if `schema` is a pydantic model.

    None without a schema; and, with a warning, if the model refuses what fits its schema
    (its own validators may), or Python does.
    """
    if schema is None:
        return None
    try:
        if hasattr(schema, "model_validate_json"):
            return schema.model_validate_json(text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        warnings.warn(
            f"the answer fits the schema and is not parsed: {format_error(error)}",
            SmolVLMWarning,
            stacklevel=2,
        )
        return None


def to_jsonable(value: Any) -> Any:
    """A value of `parse_answer`, ready for JSON."""
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


@lru_cache(maxsize=1)
def _make_byte_tokenizer() -> llguidance.LLTokenizer:
    """A tokenizer whose tokens are the 256 bytes, to try grammars with."""

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
        tokens = (*(bytes([value]) for value in range(256)), b"<eos>")

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    module = import_llguidance()
    tokenizer: llguidance.LLTokenizer = module.LLTokenizer(module.TokenizerWrapper(Bytes()))
    return tokenizer


# Keywords whose value is a schema, a list of schemas, and schemas by name.
_ONE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_LIST = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# What joins an object's properties with those of another schema.
_JOINS = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas")
_OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of `schema` whose objects have no properties but those that it lists.

    JSON Schema allows an object any others, and a small model, asked for two, would make
    up more without an end. Whatever fits the result fits `schema`. Its objects stay open
    if properties come from several places, which closing one of them would shut out.
    """
    nodes: list[dict[str, Any]] = []
    copy: dict[str, Any] = _copy_schema(schema, nodes)
    if any(_joins_properties(node) for node in nodes):
        return copy
    for node in nodes:
        listed = node.get("properties")
        if not isinstance(listed, dict) or any(name in node for name in _OPENING):
            continue
        wanted, least = node.get("required", []), node.get("minProperties", 0)
        names = {*map(str, wanted)} if isinstance(wanted, list) else set()
        if names <= listed.keys() and isinstance(least, int) and least <= len(listed):
            node["additionalProperties"] = False
    return copy


def _joins_properties(node: dict[str, Any]) -> bool:
    """Whether `node` joins several schemas that may each list properties."""
    whole = node.get("allOf")
    joined = sum(name in node for name in _JOINS if name != "allOf")
    joined += len(whole) if isinstance(whole, list | tuple) else 0
    return joined > 1 or (joined == 1 and "properties" in node)


def _copy_schema(schema: Any, nodes: list[dict[str, Any]]) -> Any:
    """A copy of `schema`, with references spelled as URIs; every schema in it joins `nodes`."""
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
