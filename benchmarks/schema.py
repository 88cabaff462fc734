"""Measure the cost of constraining answers to a schema.

    python -m benchmarks.schema [--tokenizer FILE] [--tokens N] [--rounds N]

It times four kinds of answers in turns: a free one, one of the same length with a mask at every
token, and answers to a schema with the forced tokens decoded one by one and together. The models
are the demo and, with --tokenizer, a decoder of SmolVLM-256M's size with random weights and the
vocabulary in FILE, a tokenizer.json of such a checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_smolvlm
from mlx_smolvlm import Sampling
from mlx_smolvlm.config import Config, ImageConfig, QuantizationConfig, TextConfig, VisionConfig
from mlx_smolvlm.generate.grammar import Constrainer, Constraint
from mlx_smolvlm.generate.loop import generate_constrained_tokens, generate_tokens
from mlx_smolvlm.generate.sampling import make_sampler
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.prompt.builder import PromptBuilder

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 999},
        "y": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["x", "y"],
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["receipt", "invoice", "letter"]},
        "date": {"type": "string", "format": "date"},
        "is_paid": {"type": "boolean"},
        "corners": {"type": "array", "items": POINT, "minItems": 2, "maxItems": 2},
    },
    "required": ["title", "kind", "date", "is_paid", "corners"],
}
ANYTHING = "(?s:.{4000})"  # any text, longer than the answers of the benchmark
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Timed(Constraint):
    """A constraint that sums up the seconds spent in llguidance."""

    masks_s, steps_s, chosen = 0.0, 0.0, 0

    def compute_mask(self) -> mx.array:
        started = time.perf_counter()
        mask = super().compute_mask()
        self.masks_s += time.perf_counter() - started
        self.chosen += 1
        return mask

    def take(self, token_id: int) -> None:
        started = time.perf_counter()
        super().take(token_id)
        self.steps_s += time.perf_counter() - started

    def take_forced(self, most: int) -> list[int]:
        started = time.perf_counter()
        token_ids = super().take_forced(most)
        self.steps_s += time.perf_counter() - started
        return token_ids


class OneByOne(Timed):
    """Decodes forced tokens like all others."""

    def take_forced(self, most: int) -> list[int]:
        return []


class Runs:
    """Generates free and constrained answers of one model, and times them."""

    def __init__(self, model: Model, constrainer: Constrainer, most: int) -> None:
        self._model, self._constrainer, self._most = model, constrainer, most
        self._embeds = model.embed(np.arange(100, 108))
        mx.eval(self._embeds)
        self.last: dict[str, tuple[list[int], Timed | None]] = {}

    def constraint(self, kind: type[Timed], sampling: Sampling) -> Timed:
        """Return a constraint of class `kind`."""
        made = self._constrainer(sampling)
        made.__class__ = kind
        assert isinstance(made, Timed)
        return made

    def run(self, name: str) -> float:
        """Generate the answer `name` to a prompt of 8 tokens, and return the seconds."""
        model, constraint = self._model, None
        sampler, cache = make_sampler(Sampling()), model.make_cache()
        ids: Iterator[int]
        if name == "free":
            ids = generate_tokens(model, self._embeds, cache, sampler, self._most)
        else:
            kind = OneByOne if name == "schema, one by one" else Timed
            held = Sampling(regex=ANYTHING) if name == "masked" else Sampling(schema=SCHEMA)
            most = self._most if name == "masked" else 1000
            constraint = self.constraint(kind, held)
            ids = generate_constrained_tokens(model, self._embeds, cache, sampler, constraint, most)
        started = time.perf_counter()
        said = list(ids)
        elapsed = time.perf_counter() - started
        self.last[name] = said, constraint
        return elapsed


def print_report(title: str, runs: Runs, rounds: int) -> None:
    """Print medians over `rounds`, after a warm-up round."""
    names = ("free", "masked", "schema, one by one", "schema, together")
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            elapsed = runs.run(name)
            if number:
                times[name].append(elapsed)
    assert runs.last[names[2]][0] == runs.last[names[3]][0], "forced tokens changed the answer"
    print(title)
    print(
        f"{'':22}{'tokens':>7}{'chosen':>7}{'ms':>8}{'ms a token':>12}{'mask ms':>9}{'rest ms':>9}"
    )
    for name in names:
        said, constraint = runs.last[name]
        total = 1000 * statistics.median(times[name])
        chosen = len(said) if constraint is None else constraint.chosen
        line = f"{name:22}{len(said):7}{chosen:7}{total:8.1f}{total / len(said):12.3f}"
        if constraint is not None:
            mask, rest = constraint.masks_s, constraint.steps_s
            line += f"{1000 * mask / chosen:9.3f}{1000 * rest / chosen:9.3f}"
        print(line)
    ratios = [m / f for m, f in zip(times["masked"], times["free"], strict=True)]
    saved = [o / t for o, t in zip(times[names[2]], times[names[3]], strict=True)]
    print(f"masked / free, a token: {statistics.median(ratios):.3f}")
    print(f"schema, one by one / together: {statistics.median(saved):.2f}\n")


def make_large_model(tokenizer: Path) -> tuple[Model, Constrainer]:
    """Return a random decoder of SmolVLM-256M's size, and its constrainer."""
    config = Config(
        vision=VisionConfig(64, 128, 1, 2, 32, 8, 1e-6),
        text=TextConfig(576, 1536, 30, 9, 3, 64, 1e5, 1e-5, 49280, 8192, False),
        scale_factor=2,
        image_token_id=49190,
        eos_token_ids=(49279,),
        image=ImageConfig(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
        video=None,
        quantization=QuantizationConfig(None, None, None, None),
        dtype="float32",
        source="random",
    )
    mx.random.seed(0)
    model = Model(config)
    mx.eval(model.parameters())
    started = time.perf_counter()
    constrainer = Constrainer(PromptBuilder(tokenizer, TEMPLATE, config))
    print(f"reading a tokenizer of 49,280 tokens: {time.perf_counter() - started:.2f} s, once\n")
    return model, constrainer


def time_median(make: Callable[[], object]) -> float:
    """Return the median seconds of nine calls of `make`."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        make()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of constrained answers.")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json of 49,280 tokens")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    demo = mlx_smolvlm.load("demo")
    print_report("demo", Runs(demo.model, demo.engine.constrainer, options.tokens), options.rounds)
    if options.tokenizer is not None:
        model, constrainer = make_large_model(options.tokenizer)
        print_report(
            "256M, random weights", Runs(model, constrainer, options.tokens), options.rounds
        )
        sampling = Sampling(schema=SCHEMA)
        print(f"checking the schema: {1000 * time_median(lambda: Sampling(schema=SCHEMA)):.1f} ms")
        print(f"starting an answer: {1000 * time_median(lambda: constrainer(sampling)):.1f} ms")


if __name__ == "__main__":
    main()
