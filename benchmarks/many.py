"""Compare eight questions about one picture in one call and in eight calls.

    python -m benchmarks.many [--geometry demo|256m] [--tokens N] [--longest-edge N] [--json]

Each of the eight calls starts with an empty cache, as in eight runs of a script. `256m` has the
widths, layers, tiles and placeholders of SmolVLM-256M with random weights and the demo's
vocabulary, so its answers are `--tokens` tokens of nonsense.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_smolvlm import Reply, Sampling, SmolVLM, load
from mlx_smolvlm.config import ImageConfig, TextConfig, VisionConfig
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.model.model import Model

EXAMPLE = Path(__file__).parents[1] / "examples" / "three.png"
QUESTIONS = [
    "What is in this picture?",
    "Where is the square?",
    "What color is the square?",
    "How many shapes are there?",
    "Is there a circle?",
    "What color is the background?",
    "Describe this image.",
    "What is at the top left?",
]


def make_256m(longest_edge: int) -> SmolVLM:
    """Return a random model of SmolVLM-256M's sizes with the demo's tokenizer."""
    demo = load("demo", dtype="float32")
    text = demo.config.text
    config = replace(
        demo.config,
        vision=VisionConfig(768, 3072, 12, 12, 512, 16, 1e-6),
        text=TextConfig(
            576, 1536, 30, 9, 3, 64, 1e5, 1e-5, text.vocab_size, 8192, text.tie_word_embeddings
        ),
        scale_factor=4,
        image=ImageConfig(longest_edge, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
        eos_token_ids=(),
        source="random weights, shaped as SmolVLM-256M",
    )
    mx.random.seed(0)
    builder = type(demo.engine.prompt_builder)(
        demo.path / "tokenizer.json", (demo.path / "chat_template.jinja").read_text(), config
    )
    model = Model(config)
    mx.eval(model.parameters())
    return SmolVLM(Engine(demo.path, config, model, builder))


def measure(vlm: SmolVLM, ask: Callable[[], list[Reply]]) -> tuple[list[Reply], dict[str, Any]]:
    """Return the replies of `ask` and their cost, starting with an empty cache."""
    vlm.engine.memory.clear()
    began = time.perf_counter()
    replies = ask()
    return replies, {
        "seconds": time.perf_counter() - began,
        "encoded_tiles": sum(reply.encoded_tiles for reply in replies),
        "prefilled_tokens": sum(reply.prompt_tokens - reply.cached_tokens for reply in replies),
        "generated_tokens": sum(reply.generation_tokens for reply in replies),
    }


def compare(vlm: SmolVLM, picture: Image.Image, sampling: Sampling) -> dict[str, Any]:
    """Measure both ways, and whether their answers are equal."""

    def singly() -> list[Reply]:
        replies = []
        for question in QUESTIONS:
            vlm.engine.memory.clear()
            replies.append(vlm.ask(question, images=[picture], sampling=sampling))
        return replies

    vlm.ask(QUESTIONS[0], images=[picture.resize((8, 8))], detail="low", sampling=sampling)
    many, together = measure(vlm, lambda: vlm.ask_many(picture, QUESTIONS, sampling=sampling))
    single, apart = measure(vlm, singly)
    same = [one.token_ids for one in many] == [one.token_ids for one in single]
    return {"ask_many": together, "8 x ask": apart, "same_ids": same}


def main() -> None:
    parser = argparse.ArgumentParser(description="Eight questions in one call and in eight.")
    parser.add_argument("--geometry", choices=("demo", "256m"), default="demo")
    parser.add_argument("--tokens", type=int, default=12, help="of an answer at most")
    parser.add_argument("--longest-edge", type=int, default=2048, help="pixels; 2048 is 256M's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.geometry == "demo":
        vlm, picture = load("demo", dtype="float32"), Image.open(EXAMPLE)
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
        vlm, picture = make_256m(options.longest_edge), Image.fromarray(pixels)
    result = compare(vlm, picture, Sampling(max_tokens=options.tokens))
    if options.json:
        print(json.dumps(result))
        return
    print(f"{vlm.config.source}, 8 questions, answers of at most {options.tokens} tokens")
    print(f"{'':18}{'ask_many':>10}{'8 x ask':>10}{'ratio':>8}")
    for name, value in result["ask_many"].items():
        other = result["8 x ask"][name]
        print(f"{name:18}{value:>10.4g}{other:>10.4g}{other / value:>8.2f}")
    print(f"same token ids: {result['same_ids']}")


if __name__ == "__main__":
    main()
