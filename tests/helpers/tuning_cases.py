"""Small datasets and settings to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("red", "green", "blue", "square", "circle", "what is there", "how many are there")


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture that no other seed has."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


def make_dataset(folder: Path, count: int = 6, name: str = "train") -> Path:
    """`folder` with conversations of one and two turns, with no, one and two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        images = [f"{name}{i}-{j}.png" for j in range(i % 3)]
        for j, image in enumerate(images):
            noise(40 + 30 * (i % 2), 40, 10 * i + j).save(folder / image)
        messages = [
            {"role": "user", "content": [*[{"type": "image"}] * len(images), text(i)]},
            {"role": "assistant", "content": f"A {WORDS[i % 5]}."},
        ]
        if i % 2:
            messages += [
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes, it is."},
            ]
        lines.append(json.dumps({"messages": messages, "images": images}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def text(seed: int) -> dict[str, str]:
    """A question."""
    return {"type": "text", "text": f"{WORDS[seed % len(WORDS)]}?".capitalize()}


def write_config(folder: Path, model: Path | str, **changes: Any) -> Path:
    """A file of settings in `folder` for a short training on `folder`/data.

    `changes` replace values, with lora__ and optimizer__ for the tables.
    """
    values: dict[str, Any] = {
        "model": str(model),
        "detail": "high",
        "batch_size": 2,
        "steps": 6,
        "seed": 1,
        "evaluate_every": 3,
        "save_every": 2,
        "lora__rank": 4,
        "optimizer__rate": 1e-2,
        **changes,
    }
    tables = {"": "", "lora": "\n[lora]\n", "optimizer": "\n[optimizer]\n"}
    for key, value in values.items():
        table, _, name = key.rpartition("__")
        tables[table] += f"{name} = {json.dumps(value)}\n"
    path = folder / "train.toml"
    path.write_text("".join(tables.values()) + '\n[[data]]\npath = "data"\n')
    return path
