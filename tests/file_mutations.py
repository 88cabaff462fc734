"""Mutations of JSON and TOML files: other values in every place, other bytes, other lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

# As they stand in a file, since some are no values of Python's.
JSON_VALUES = (
    *("0", "-1", "1", "0.5", "2147483648", "9223372036854775808", "1" + "0" * 400, "9" * 5000),
    *("1e308", "1e999", "NaN", "-Infinity", "true", "null", '""', '"x"', '"\\u0000"', '"\\ud800"'),
    *('"~no-such-user/x"', '"' + "x" * 5000 + '"', "[]", "[64]", '["x"]', "{}", '{"a": 1}'),
    *("[" * 900 + "]" * 900, "[" * 10**5 + "]" * 10**5, '{"a":' * 900 + "1" + "}" * 900),
)
TOML_VALUES = (
    *("0", "-1", "1", "0.5", "9223372036854775808", "1" + "0" * 400, "9" * 1900, "1e308", "inf"),
    *("nan", "-inf", "true", '""', '"x"', '"\\u0000"', '"~no-such-user/x"', "1979-05-27", "[]"),
    *('"' + "x" * 1900 + '"', "[64]", '["x"]', "{}", "{ a = 1 }", "[" * 900 + "]" * 900),
    *("[\n" * 5000 + "]" * 1900, "{ a = " * 200 + "1" + " }" * 200, "0x" + "f" * 1900),
)


def mutate_json(text: str, rng: random.Random) -> bytes:
    """The JSON `text` with some values replaced or keys changed, or with other bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(text.encode(), rng)
    values, raw = json.loads(text), {}
    for number in range(rng.randint(1, 2)):
        places = list(_places(values))
        if not places:
            break
        place, key = rng.choice(places)
        raw[f"@{number}@"] = rng.choice(JSON_VALUES)
        if isinstance(place, dict) and rng.random() < 0.2:
            value = place.pop(key)
            if rng.random() < 0.5:
                place[rng.choice(["", "x" * 5000, "\\0", key.upper()])] = value
        else:
            place[key] = f"@{number}@"
    text = json.dumps(values)
    for name, value in raw.items():
        text = text.replace(f'"{name}"', value)
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list in `value`, with each of its keys or numbers."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, child in items:
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)


def mutate_toml(text: str, rng: random.Random) -> bytes:
    """The TOML `text`, a key a line, with some values replaced, lines moved, or other bytes."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        key, found, _ = lines[at].partition(" = ")
        how = rng.random()
        if how < 0.6 and found:
            lines[at] = f"{key} = {rng.choice(TOML_VALUES)}"
        elif how < 0.7:
            lines.append(lines[at])
        elif how < 0.8:
            lines.insert(at, rng.choice(["x" * 1900 + " = 1", "a." * 900 + "a = 1", "[[a]]", "="]))
        elif len(lines) > 1:
            del lines[at]
    data = ("\n".join(lines) + "\n").encode()
    return mutate_bytes(data, rng) if rng.random() < 0.2 else data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bits or bytes changed, or cut."""
    result = bytearray(data)
    if rng.random() < 0.3:
        return bytes(result[: rng.randrange(len(result))])
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(result))
        result[at] = (
            result[at] ^ 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(256)
        )
    return bytes(result)
