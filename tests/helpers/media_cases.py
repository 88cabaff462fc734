"""Pictures, configurations and conversations that several tests compare on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)

GOLDEN = Path(__file__).parents[1] / "golden"

# (tile, longest edge) of the 256M and 500M checkpoints, and of the 2.2B ones
SCALES = ((512, 2048), (384, 1536))

SIZES = (
    (1, 1),
    (1, 700),
    (900, 1),
    (5000, 7),
    (480, 640),
    (640, 480),
    (512, 512),
    (1024, 512),
    (767, 1151),
    (1241, 1754),
    (333, 222),
    (2500, 1900),
    (2049, 1537),
    (3000, 1000),
)

# 8-bit modes that transformers reads as a user expects
MODES = ("RGB", "RGBA", "LA", "L", "1", "P", "P+A", "PA", "CMYK", "YCbCr", "RGB+A", "L+A")


def config(
    tile: int = 512,
    longest_edge: int = 2048,
    splitting: bool = True,
    patch: int = 16,
    scale: int = 4,
    image_token_id: int = 49190,
    vocab_size: int = 49280,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> Config:
    """A configuration whose preprocessing is as given; the network's sizes do not matter."""
    return Config(
        vision=VisionConfig(64, 128, 1, 1, tile, patch, 1e-6),
        text=TextConfig(64, 128, 1, 1, 1, 64, 1e5, 1e-5, vocab_size, 8192, False),
        scale_factor=scale,
        image_token_id=image_token_id,
        eos_token_ids=(49279,),
        image=ImageConfig(longest_edge, mean, std, splitting),
        video=None,
        quantization=QuantizationConfig(None, None, None, None),
        dtype="float32",
        source="test",
    )


def pattern(width: int, height: int, channels: int) -> np.ndarray:
    """Pixels uint8 (H, W, channels) with slopes, edges and fine detail, the same everywhere."""
    y, x, c = np.ogrid[:height, :width, :channels]
    slopes = (x * 255 // max(width - 1, 1) + y * 170 // max(height - 1, 1)) // 2 + c * 40
    return ((slopes ^ ((x // 9 + y // 7) % 5 * 37)) % 256).astype(np.uint8)


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A picture of `size` in a Pillow mode; "+A" adds a transparent color instead of a band."""
    base, _, transparent = mode.partition("+")
    rgb = Image.fromarray(pattern(*size, 3))
    if base == "RGBA":
        image = Image.fromarray(pattern(*size, 4))
    elif base in ("LA", "PA"):
        alpha = Image.fromarray(pattern(*size, 4)[:, :, 3])
        image = rgb.convert("L")
        image.putalpha(alpha)
        if base == "PA":
            image = rgb.quantize(16).convert("PA")
            image.putalpha(alpha)
    elif base == "P":
        image = rgb.quantize(16)
    else:
        image = rgb.convert(base)
    if transparent:
        image.info["transparency"] = {"RGB": (40, 40, 40)}.get(base, 3)
    return image


TEXT = {"type": "text", "text": "What is in this picture?"}
IMAGE = {"type": "image"}


def user(*items: Any) -> dict[str, Any]:
    """A user's message; strings become text items."""
    return _message("user", items)


def assistant(*items: Any) -> dict[str, Any]:
    """An assistant's message; strings become text items."""
    return _message("assistant", items)


def system(*items: Any) -> dict[str, Any]:
    """A system message; strings become text items."""
    return _message("system", items)


def _message(role: str, items: tuple[Any, ...]) -> dict[str, Any]:
    content = [{"type": "text", "text": i} if isinstance(i, str) else i for i in items]
    return {"role": role, "content": content}


# (messages, grids as (rows, cols), add_generation_prompt)
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[tuple[int, int]], bool]] = [
    ([user("Hello")], [], True),
    ([user("Hello")], [], False),
    ([user("")], [], True),
    ([user("", "")], [], True),
    ([user("   ")], [], True),
    ([user("\n")], [], True),
    ([user("\n\nTwo lines before, two after.\n\n")], [], True),
    ([user(" leading and trailing space ")], [], True),
    ([user("one", "two")], [], True),
    ([user("Numbers 1234567 and 3.14159; tabs\t\tand\r\nreturns")], [], True),
    ([user("Größe, naïve, 图片里有什么？ 🦥👩‍👩‍👧 עברית مرحبا")], [], True),  # noqa: RUF001
    ([user("private use \ue000\U000f0000 and null \x00 here")], [], True),
    ([user("Steps:\n\n1. one\n2. two\n  10 more,  20 in all\n\n\n3")], [], True),
    ([user("def f(x):\n    return x ** 2  # spaces\n")], [], True),
    ([system("You are terse."), user("Hello")], [], True),
    ([user("Hi"), assistant("Hello. What can I do?"), user("Count to 3.")], [], True),
    ([user("Hi"), assistant("Hello.")], [], False),
    ([user("Hi"), assistant(""), user("")], [], True),
    ([user(IMAGE, TEXT["text"])], [(0, 0)], True),
    ([user(IMAGE, TEXT["text"])], [(3, 4)], True),
    ([user(IMAGE, TEXT["text"])], [(4, 4)], False),
    ([user(IMAGE, TEXT["text"])], [(1, 4)], True),
    ([user(IMAGE, TEXT["text"])], [(4, 1)], True),
    ([user(TEXT["text"], IMAGE)], [(2, 3)], True),
    ([user(IMAGE)], [(0, 0)], True),
    ([user(IMAGE, IMAGE)], [(0, 0), (1, 2)], True),
    ([user("First:", IMAGE, " second:\n", IMAGE, "\nWhich is red?")], [(0, 0), (2, 2)], True),
    ([user(IMAGE, "\n", IMAGE, "\n\n", IMAGE, "compare")], [(1, 2), (2, 1), (0, 0)], True),
    ([user(IMAGE, "a", IMAGE, "b", IMAGE, "c", IMAGE)], [(0, 0)] * 4, True),
    ([user(IMAGE, "\nA cat?"), assistant("No."), user("And ", IMAGE)], [(2, 2), (0, 0)], True),
    ([system("Terse."), user(IMAGE, ""), assistant("A dog.")], [(0, 0)], False),
    ([system(IMAGE, "This is the style."), user("Draw.")], [(0, 0)], True),
    ([user("x", IMAGE), assistant(IMAGE, "here"), user("thanks")], [(0, 0), (1, 3)], True),
]


def load_golden(name: str) -> Any:
    """The contents of tests/golden/`name`.json.gz."""
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def sampled(pixel_values: np.ndarray) -> list[float]:
    """96 values of (N, H, W, 3) spread over all tiles, and the mean and deviation of each tile."""
    flat = pixel_values.reshape(-1)
    places = np.linspace(0, flat.size - 1, 96).astype(np.int64)
    tiles = pixel_values.reshape(len(pixel_values), -1).astype(np.float64)
    values = np.concatenate([flat[places], tiles.mean(1), tiles.std(1)])
    return [round(float(value), 6) for value in values]
