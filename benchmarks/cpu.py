"""Time the network on Linux's CPU: in MLX and in NumPy, as floats and quantized.

    python -m benchmarks.cpu FOLDER [--files FILES] [--repeat N] [--all]

FOLDER is made by `benchmarks.random_checkpoint` (SmolVLM2-256M's sizes, random weights; FILES as
there). Every version of the model is loaded first; then each round times all versions, one after
the other: one tile of 512 x 512 pixels, a prompt of 1,000 tokens, and 16 tokens after it. Printed
are medians, and their ratios to the first version. --all adds packed weights in MLX, which take
minutes a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from benchmarks.random_checkpoint import make_random_checkpoint
from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.loop import prefill
from mlx_smolvlm.model.cpu import compute_in_numpy
from mlx_smolvlm.model.model import Model, compile_encoder
from mlx_smolvlm.model.products import unpack_weights

PROMPT, ANSWER = 1000, 16  # tokens


@dataclass
class Version:
    """A version of the model and its times in seconds."""

    name: str
    model: Model
    encoder: Callable[[mx.array], mx.array]
    tile: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    @property
    def figures(self) -> tuple[float, float, float]:
        """Tiles, tokens of a prompt, and tokens of an answer, per second."""
        times = [statistics.median(one) for one in (self.tile, self.prompt, self.token)]
        return 1 / times[0], PROMPT / times[1], 1 / times[2]


def load_version(name: str, folder: Path, in_numpy: bool, unpack: bool = False) -> Version:
    """Load the checkpoint in `folder` as a version `name`."""
    model = load_model(folder, "float32")
    if unpack:
        unpack_weights(model)
    if in_numpy:
        compute_in_numpy(model)
    return Version(name, model, compile_encoder(model))


def evaluate(compute: Callable[[], mx.array]) -> float:
    """Return how many seconds `compute` and the evaluation of its result take."""
    start = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - start


def time_version(version: Version) -> None:
    """Time a tile, a prompt and an answer, and add the times to `version`."""
    model = version.model
    pixel_values = mx.random.normal((1, 512, 512, 3), key=mx.random.key(0))
    prompt = model.text_model.embed_tokens(mx.arange(PROMPT))[None]
    mx.eval(pixel_values, prompt)
    version.tile.append(evaluate(lambda: version.encoder(pixel_values)))
    cache = model.make_cache()
    version.prompt.append(evaluate(lambda: prefill(model, prompt, cache)))
    times = [evaluate(lambda: model.step(mx.array([5]), cache)) for _ in range(ANSWER)]
    version.token.append(statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the network on Linux's CPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    floats = make_random_checkpoint(options.folder, options.files)
    versions = [
        load_version("floats in NumPy", floats, True),
        load_version("floats in MLX", floats, False),
    ]
    for bits in (8, 4):
        packed = options.folder / f"{bits} bits"
        if not packed.exists():
            convert_checkpoint(options.folder / "hf", packed, ConvertOptions(bits=bits))
        versions += [
            load_version(f"{bits} bits, unpacked", packed, True, True),
            load_version(f"{bits} bits, packed", packed, True),
        ]
        if options.all:
            versions.append(load_version(f"{bits} bits in MLX", packed, False))
    for version in versions:  # compiles, and touches the memory
        mx.eval(version.encoder(mx.zeros((1, 512, 512, 3))))
    for _ in range(options.repeat):
        for version in versions:
            time_version(version)
    first = versions[0].figures
    print(f"{'':20} {'tiles/s':>16} {'prompt tokens/s':>16} {'answer tokens/s':>16}")
    for version in versions:
        columns = (
            f"{value:8.2f} ({value / one:5.2f})"
            for value, one in zip(version.figures, first, strict=True)
        )
        print(f"{version.name:20} {' '.join(columns)}")


if __name__ == "__main__":
    main()
