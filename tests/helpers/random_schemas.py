"""Random JSON Schemas whose answers are short enough to finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Json = dict[str, Any]
WORDS = ("colour", "count", "shape", "naïve key", "a", 'say "x"', "<image>", "größe", "x_1", "é")
VALUES = ("red", "green", "", "a b", 'q"q', "back\\slash", "日本", "<end_of_utterance>", "\n", "{")
PATTERNS = ("^[a-c]{1,4}$", "^(x|yy|zzz)$", "^[0-9]{3}-[0-9]{2}$", "^v[0-9]\\.[0-9]$", "^[é-ü]{2}$")


class Schemas:
    """Draws schemas from a seed; every kind of them is bounded."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._definitions: Json = {}

    def draw(self) -> Json:
        """A schema that uses definitions, if it does, from its own `$defs`."""
        self._definitions = {}
        if self._flip(0.4):
            for name in ("point", "näme/~", "Item"):
                self._definitions[name] = self._value(1)
        schema = self._object(3) if self._flip(0.8) else self._value(3)
        return {**schema, "$defs": dict(self._definitions)} if self._definitions else schema

    def _value(self, depth: int) -> Json:
        kinds: list[Callable[[int], Json]] = [
            self._boolean,
            self._null,
            self._integer,
            self._string,
            self._pattern,
            self._format,
            self._enum,
            self._const,
        ]
        if depth > 0:
            kinds += [self._object, self._object, self._array, self._array, self._any_of]
            kinds += [self._tuple]
        if self._definitions and depth > 0:
            kinds += [self._reference, self._reference]
        return kinds[int(self._rng.integers(len(kinds)))](depth)

    def _object(self, depth: int) -> Json:
        names = [str(name) for name in self._rng.permutation(WORDS)[: self._rng.integers(1, 5)]]
        schema: Json = {
            "type": "object",
            "properties": {name: self._value(depth - 1) for name in names},
            "required": [name for name in names if self._flip(0.6)],
        }
        if self._flip(0.5):
            schema["additionalProperties"] = False
        return schema

    def _array(self, depth: int) -> Json:
        least = int(self._rng.integers(3))
        most = least + int(self._rng.integers(3))
        return {
            "type": "array",
            "items": self._value(depth - 1),
            "minItems": least,
            "maxItems": most,
        }

    def _tuple(self, depth: int) -> Json:
        items = [self._value(depth - 1) for _ in range(self._rng.integers(1, 4))]
        return {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": len(items),
        }

    def _any_of(self, depth: int) -> Json:
        return {"anyOf": [self._value(depth - 1) for _ in range(self._rng.integers(2, 4))]}

    def _reference(self, _: int) -> Json:
        name = str(self._rng.choice(list(self._definitions)))
        return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1")}

    def _boolean(self, _: int) -> Json:
        return {"type": "boolean"}

    def _null(self, _: int) -> Json:
        return {"type": "null"}

    def _integer(self, _: int) -> Json:
        low = int(self._rng.integers(-2000, 2000))
        if self._flip(0.3):
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 40}
        return {"type": "integer", "minimum": low, "maximum": low + int(self._rng.integers(5000))}

    def _string(self, _: int) -> Json:
        least = int(self._rng.integers(4))
        return {"type": "string", "minLength": least, "maxLength": least + 6}

    def _pattern(self, _: int) -> Json:
        return {"type": "string", "pattern": str(self._rng.choice(PATTERNS))}

    def _format(self, _: int) -> Json:
        return {"type": "string", "format": str(self._rng.choice(["date", "uuid", "ipv4"]))}

    def _enum(self, _: int) -> Json:
        values: list[Any] = [str(one) for one in self._rng.permutation(VALUES)[:3]]
        return {"enum": [*values, 7, None, {"a": [1]}][: self._rng.integers(1, 7)]}

    def _const(self, _: int) -> Json:
        values: list[Any] = [5, "fixed", True, None, [1, "two"], {"k": {"l": -3}}]
        return {"const": values[int(self._rng.integers(len(values)))]}

    def _flip(self, share: float) -> bool:
        return bool(self._rng.random() < share)
