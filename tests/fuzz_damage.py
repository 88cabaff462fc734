"""Damage for `tests/fuzz.py`: changed bytes, changed JSON, changed templates."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

Random = np.random.Generator

EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
DEEP = "@deep@"  # replaced by brackets once the JSON is text
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, 2**31, -(2**31), 2**63, 10**30, 10**400, 1e308,
    float("nan"), float("inf"), "", " ", "a", "0", "\x00", "\x1b]52;c;aGk=\x07", "\ud800",
    "\u202egpj", "../../../etc/passwd", "/dev/zero", "~nobody-here/x", "x" * 100_000, DEEP,
    [], {}, [[]], [None], [1, 2, 3], [10**9, 10**9], {"a": 1}, [0] * 10_000, {"": {"": {}}},
)  # fmt: skip
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


def damage_bytes(data: bytes, random: Random) -> bytes:
    """`data` with one to three changes, more often near its beginning than elsewhere."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 4)):
        if not changed:
            return b""
        size = len(changed)
        place = int(random.integers(0, min(size, 400) if random.random() < 0.5 else size))
        kind = random.integers(0, 8)
        if kind == 0:
            changed[place] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            changed[place] = int(random.integers(0, 256))
        elif kind == 2:
            number = EXTREMES[random.integers(0, len(EXTREMES))]
            form = ("<B", "<H", "<I", "<Q", ">H", ">I", ">Q")[random.integers(0, 7)]
            width = struct.calcsize(form)
            changed[place : place + width] = struct.pack(form, number % 256**width)
        elif kind == 3 and random.random() < 0.5:
            del changed[place:]
        elif kind in (3, 4):
            del changed[place : place + int(random.integers(1, 64))]
        elif kind == 5:
            other = int(random.integers(0, size))
            changed[place:place] = changed[other : other + int(random.integers(1, 256))]
        elif kind == 6:
            length = int(random.integers(1, 64))
            changed[place : place + length] = random.bytes(length)
        else:
            changed[place:place] = bytes(int(random.integers(1, 512)))
    return bytes(changed)


def damage_json(text: str, random: Random) -> str:
    """`text`, JSON, with one or two values or keys changed, or some characters."""
    if random.random() < 0.15:
        return damage_bytes(text.encode(), random).decode("utf-8", "surrogateescape")
    values = json.loads(text)
    for _ in range(random.integers(1, 3)):
        values = _change(values, random)
    changed = json.dumps(values)
    depth = int(random.choice((50, 900, 100_000)))
    return changed.replace(json.dumps(DEEP), "[" * depth + "]" * depth)


def _change(values: Any, random: Random) -> Any:
    """`values` with one of its parts replaced, removed, renamed or repeated."""
    if not isinstance(values, dict | list) or not values or random.random() < 0.02:
        return VALUES[random.integers(0, len(VALUES))]
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = keys[random.integers(0, len(keys))]
    if isinstance(values[key], dict | list) and values[key] and random.random() < 0.8:
        values[key] = _change(values[key], random)
        return values
    kind = random.integers(0, 8)
    if kind == 0:
        del values[key]
    elif kind == 1 and isinstance(values, dict):
        values[f"{key}x"] = values.pop(key)
    elif kind == 2 and isinstance(values, list):
        values.insert(key, values[key])
    elif kind == 3 and isinstance(values[key], int | float):
        values[key] *= random.choice((-1, 0, 2, 3, 1000, 1e-9))
        values[key] = values[key].item() if hasattr(values[key], "item") else values[key]
    elif kind == 4:
        values[key] = values[keys[random.integers(0, len(keys))]]
    else:
        values[key] = VALUES[random.integers(0, len(VALUES))]
    return values


def damage_template(text: str, random: Random) -> str:
    """`text`, a chat template, with snippets put in or pieces taken out."""
    if random.random() < 0.3:
        return damage_bytes(text.encode(), random).decode("utf-8", "surrogateescape")
    for _ in range(random.integers(1, 3)):
        place = int(random.integers(0, len(text) + 1))
        if random.random() < 0.7:
            ends = [0, len(text), *(i + 2 for i in range(len(text)) if text[i : i + 2] == "%}")]
            place = ends[random.integers(0, len(ends))]
        if random.random() < 0.2:
            text = text[:place] + text[place + int(random.integers(1, 40)) :]
        else:
            text = text[:place] + SNIPPETS[random.integers(0, len(SNIPPETS))] + text[place:]
    return text


def damage_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file with its bytes changed, or its header changed and measured anew."""
    if random.random() < 0.4:
        return damage_bytes(data, random)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = (header.get("__metadata__") or {}).get("mlx-smolvlm")
    if metadata and random.random() < 0.7:
        header["__metadata__"]["mlx-smolvlm"] = damage_json(metadata, random)
        changed = json.dumps(header)
    else:
        changed = damage_json(json.dumps(header), random)
    packed = changed.encode("utf-8", "surrogatepass")
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]
