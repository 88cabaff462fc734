"""Measure how long building the graph of a decoded token takes, beside mlx-vlm.

    python -m benchmarks.graph --rival PYTHON [--size 256m] [--rounds 10] [--work FOLDER]

Nothing is computed. Both programs build the graph of one token of the same random model in MLX, in
turns. The figures are processor times of the thread, so that other work on the machine disturbs
them little. PYTHON is the interpreter of an environment with mlx-vlm. The target for 256M is 1.3 ms
where mlx-vlm takes 2.2 ms, so a ratio of 0.59.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from mlx_smolvlm.bench.programs import Program, launch_ours, launch_peer
from mlx_smolvlm.bench.random_model import make_config, make_random_source
from mlx_smolvlm.convert.run import convert_checkpoint

PROMPT, STEPS = 64, 20


def main() -> None:
    """Print the medians, the fastest, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rival", required=True, help="Python of an environment with mlx-vlm")
    parser.add_argument("--size", default="256m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, help="folder that keeps the model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        source = make_random_source(work / "hf", make_config(options.size, "float32"))
        own = work / "converted"
        if not own.exists():
            convert_checkpoint(source, own)
        launches = (launch_ours(own), launch_peer("mlx-vlm", source, options.rival, True))
        with Program(launches[0]) as ours, Program(launches[1]) as theirs:
            times: dict[str, list[float]] = {ours.name: [], theirs.name: []}
            for _ in range(options.rounds):
                for program in (ours, theirs):
                    result = program.ask(do="graph", prompt=PROMPT, repeat=STEPS)
                    times[program.name] += result["seconds"]
    for name, seconds in times.items():
        median, fastest = statistics.median(seconds) * 1e3, min(seconds) * 1e3
        print(f"{name:12} median {median:.2f} ms, fastest {fastest:.2f} ms")
    medians = [statistics.median(seconds) for seconds in times.values()]
    print(f"ratio of the medians {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
