"""Damage to files for tests: changed bytes, JSON, TOML, chat templates and safetensors files."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
DEPTHS = (50, 900, 100_000)  # of nested brackets
# As they stand in a file, since some are no values of Python's.
JSON_VALUES = (
    *("0", "-1", "1", "2", "0.5", "2147483648", "-2147483648", "9223372036854775808"),
    *("1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "1e308", "1e999", "NaN", "Infinity"),
    *("-Infinity", "true", "false", "null", '""', '" "', '"a"', '"0"', '"x"', '"\\u0000"'),
    *('"\\ud800"', '"\\u001b]52;c;aGk=\\u0007"', '"\\u202egpj"', '"../../../etc/passwd"'),
    *('"/dev/zero"', '"~no-such-user/x"', '"' + "x" * 5000 + '"', '"' + "x" * 10**5 + '"'),
    *("[]", "[[]]", "[null]", "[1, 2, 3]", "[64]", '["x"]', "[1000000000, 1000000000]"),
    *("[" + "0, " * 9999 + "0]", "{}", '{"a": 1}', '{"": {"": {}}}'),
    *("[" * depth + "]" * depth for depth in DEPTHS),
    '{"a":' * 900 + "1" + "}" * 900,
)
TOML_VALUES = (
    *("0", "-1", "1", "0.5", "9223372036854775808", "1" + "0" * 400, "9" * 1900, "1e308", "inf"),
    *("nan", "-inf", "true", '""', '"x"', '"\\u0000"', '"~no-such-user/x"', "1979-05-27", "[]"),
    *('"' + "x" * 1900 + '"', "[64]", '["x"]', "{}", "{ a = 1 }", "[" * 900 + "]" * 900),
    *("[\n" * 5000 + "]" * 1900, "{ a = " * 200 + "1" + " }" * 200, "0x" + "f" * 1900),
)
SNIPPETS = (
    "{{ 'a' * 10**10 }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 10**10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ messages }}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}"
    "{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ messages | join('x' * 10**8) }}",
    "{{ ('a' * 9999) | replace('a', 'b' * 9999) | replace('b', 'c' * 9999) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0]['content'][99]['text'] }}",
    "{{ lipsum(n=10**6) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ [1] * 10**9 }}",
    "{{ (1, 2) | batch(10**9) | list }}",
    "{{ dict(a=messages) | tojson(indent=10**8) }}",
    "{{ '\ud800' }}",
    "{{ undefined.attribute }}",
    "{{ 1 / 0 }}",
    "{% generation %}",
    "{{ eos_token }}",
)


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """`data` with one to three changes, more often near its beginning than elsewhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not changed:
            return b""
        size = len(changed)
        place = rng.randrange(min(size, 400) if rng.random() < 0.5 else size)
        kind = rng.randrange(8)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.randrange(256)
        elif kind == 2:
            form = rng.choice(("<B", "<H", "<I", "<Q", ">H", ">I", ">Q"))
            width = struct.calcsize(form)
            packed = struct.pack(form, rng.choice(EXTREMES) % 256**width)
            changed[place : place + width] = packed
        elif kind == 3 and rng.random() < 0.5:
            del changed[place:]
        elif kind in (3, 4):
            del changed[place : place + rng.randrange(1, 64)]
        elif kind == 5:
            other = rng.randrange(size)
            changed[place:place] = changed[other : other + rng.randrange(1, 256)]
        elif kind == 6:
            length = rng.randrange(1, 64)
            changed[place : place + length] = rng.randbytes(length)
        else:
            changed[place:place] = bytes(rng.randrange(1, 512))
    return bytes(changed)


def damage_json(text: str, rng: Random) -> bytes:
    """`text`, JSON, with one or two values or keys changed, or some bytes."""
    if rng.random() < 0.2:
        return damage_bytes(text.encode(), rng)
    values = json.loads(text)
    raw: dict[str, str] = {}
    for _ in range(rng.randint(1, 2)):
        values = _change(values, rng, raw)
    changed = json.dumps(values)
    for name, value in raw.items():
        changed = changed.replace(f'"{name}"', value)
    return changed.encode()


def _change(values: Any, rng: Random, raw: dict[str, str]) -> Any:
    """`values` with one of its parts replaced, removed, renamed or repeated.

    `raw` gets the text of each new value by the name that stands for it.
    """
    if not isinstance(values, dict | list) or not values or rng.random() < 0.02:
        return _stand_in(rng, raw)
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = rng.choice(keys)
    if isinstance(values[key], dict | list) and values[key] and rng.random() < 0.8:
        values[key] = _change(values[key], rng, raw)
        return values
    kind = rng.randrange(8)
    if kind == 0:
        del values[key]
    elif kind == 1 and isinstance(values, dict):
        name = rng.choice((f"{key}x", "", "x" * 5000, "\\0", key.upper()))
        values[name] = values.pop(key)
    elif kind == 2 and isinstance(values, list):
        values.insert(key, values[key])
    elif kind == 3 and isinstance(values[key], int | float):
        values[key] *= rng.choice((-1, 0, 2, 3, 1000, 1e-9))
    elif kind == 4:
        values[key] = values[rng.choice(keys)]
    else:
        values[key] = _stand_in(rng, raw)
    return values


def _stand_in(rng: Random, raw: dict[str, str]) -> str:
    """A name that stands for one of JSON_VALUES, entered in `raw`."""
    name = f"@{len(raw)}@"
    raw[name] = rng.choice(JSON_VALUES)
    return name


def damage_toml(text: str, rng: Random) -> bytes:
    """`text`, TOML with a key a line, with some values replaced, lines moved, or other bytes."""
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
    return damage_bytes(data, rng) if rng.random() < 0.2 else data


def damage_template(text: str, rng: Random) -> bytes:
    """`text`, a chat template, with snippets put in or pieces taken out, or some bytes changed."""
    if rng.random() < 0.3:
        return damage_bytes(text.encode(), rng)
    for _ in range(rng.randint(1, 2)):
        place = rng.randint(0, len(text))
        if rng.random() < 0.7:
            ends = [0, len(text), *(i + 2 for i in range(len(text)) if text[i : i + 2] == "%}")]
            place = rng.choice(ends)
        if rng.random() < 0.2:
            text = text[:place] + text[place + rng.randrange(1, 40) :]
        else:
            text = text[:place] + rng.choice(SNIPPETS) + text[place:]
    return text.encode("utf-8", "surrogatepass")


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file with its bytes changed, or its header changed and measured anew."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = (header.get("__metadata__") or {}).get("mlx-smolvlm")
    if metadata and rng.random() < 0.7:
        damaged = damage_json(metadata, rng).decode("utf-8", "surrogateescape")
        header["__metadata__"]["mlx-smolvlm"] = damaged
        packed = json.dumps(header).encode()
    else:
        packed = damage_json(json.dumps(header), rng)
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]
