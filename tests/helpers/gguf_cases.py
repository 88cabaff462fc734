"""Small GGUF files, as llama.cpp writes those of SmolLM2."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

# Number in the file, numbers in a block, bytes of a block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
         "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q4_K": (12, 256, 144),
         "Q6_K": (14, 256, 210), "BF16": (30, 1, 2)}  # fmt: skip
LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, HEADS, FEED = 256, 4, 256

Entry = tuple[str, int, Any]  # key, type, value; of an array the pair of inner type and values
Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, type, shape with rows first, data


def string(text: str | bytes) -> bytes:
    """A text as it stands in the file."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A value of the metadata, without its type."""
    if kind == STRING:
        return string(content)
    if kind != ARRAY:
        return struct.pack(f"<{LETTERS[kind]}", content)
    inner, many = content
    return struct.pack("<IQ", inner, len(many)) + b"".join(value(inner, one) for one in many)


def gguf(entries: list[Entry], tensors: list[Tensor], alignment: int = 32) -> bytes:
    """A file with `entries` and `tensors`."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    for key, kind, content in entries:
        parts += [string(key), struct.pack("<I", kind), value(kind, content)]
    body = b""
    for name, kind, shape, data in tensors:
        sides = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        parts += [string(name), struct.pack("<I", len(shape)), sides]
        parts.append(struct.pack("<IQ", TYPES[kind][0], len(body)))
        body += data + b"\0" * (-len(data) % alignment)
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % alignment) + body


def tensor(name: str, kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """A tensor of any bytes; floats are small numbers."""
    count, (_, block, size) = int(np.prod(shape)), TYPES[kind]
    if kind in ("F32", "F16"):
        data = (0.1 * rng.normal(size=count)).astype("<f4" if kind == "F32" else "<f2").tobytes()
    else:
        data = rng.integers(0, 256, count // block * size, np.uint8).tobytes()
    return name, kind, shape, data


def model_entries() -> list[Entry]:
    """The metadata of a decoder of one layer with a byte-level tokenizer."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    numbers = {"block_count": 1, "context_length": 512, "embedding_length": WIDTH,
               "feed_forward_length": FEED, "attention.head_count": HEADS,
               "attention.head_count_kv": 2, "rope.dimension_count": WIDTH // HEADS}  # fmt: skip
    return [
        ("general.architecture", STRING, "llama"),
        ("general.quantized_by_hand", BOOL, True),
        *((f"llama.{key}", UINT32, number) for key, number in numbers.items()),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.freq_base", FLOAT32, 1e5),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "smollm"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (INT32, kinds)),
        ("tokenizer.ggml.merges", ARRAY, (STRING, ["t h", "th e"])),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.chat_template", STRING, TEMPLATE),
    ]


def model_tensors(kind: str = "Q4_0", table: str = "Q8_0") -> list[Tensor]:
    """The tensors of that decoder, matrices of type `kind`, token embeddings of type `table`."""
    rng, half = np.random.default_rng(0), WIDTH // 2
    vocab_size = len(model_entries()[-5][2][1])
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH), "attn_v": (half, WIDTH),
              "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH),
              "ffn_down": (WIDTH, FEED)}  # fmt: skip
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    return [
        tensor("token_embd.weight", table, (vocab_size, WIDTH), rng),
        *(tensor(f"blk.0.{name}.weight", kind, shape, rng) for name, shape in shapes.items()),
        *(tensor(name, "F32", (WIDTH,), rng) for name in norms),
    ]


def write_model(path: Path, kind: str = "Q4_0", table: str = "Q8_0") -> Path:
    """A whole small model at `path`."""
    path.write_bytes(gguf(model_entries(), model_tensors(kind, table)))
    return path
