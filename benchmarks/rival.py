"""Compare this package with mlx-vlm on Linux: as both are installed, and with the same OpenBLAS.

    python -m benchmarks.rival --rival PYTHON [--blas own|ours]... [--size 256m] [--tiles 1,13]
                               [--own-tiles 1] [--repeat 3] [--work FOLDER] [--json FILE]

Vision, prefill and decoding of the same random weights in float32, in turns within one run, as
`mlx-smolvlm bench --against mlx-vlm` measures them. PYTHON is the interpreter of an environment
with mlx-vlm. As installed, mlx-vlm computes with MLX's own BLAS, at half a minute a tile, so one
tile is measured there unless --own-tiles says otherwise; 13 take it ten minutes for each repeat.
The last column of the verdict is the ratio that is wanted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mlx_smolvlm.bench.machine import describe_machine
from mlx_smolvlm.bench.measure import BenchOptions, compute_ratio, run_bench
from mlx_smolvlm.bench.models import BenchModel, make_random_model
from mlx_smolvlm.bench.programs import launch_ours, launch_peer
from mlx_smolvlm.bench.report import Report, format_report

WANTED = {
    "own": {"vision": 10.0, "prefill": 10.0, "decoding": 1.8},
    "ours": {"vision": 1.2, "prefill": 1.1, "decoding": 1.15},
}
NAMES = {"own": "as installed", "ours": "with the same OpenBLAS"}


def compare(model: BenchModel, rival: str, blas: str, options: BenchOptions) -> Report:
    """Run both programs in turns, the rival with its `own` BLAS or `ours`."""
    (folder,) = model.folders.values()
    peer = launch_peer("mlx-vlm", model.get_source(), rival, same_blas=blas == "ours")
    results = run_bench([launch_ours(folder), peer], model.config, options)
    return Report(f"{model.name}, {NAMES[blas]}", describe_machine(), options, results)


def format_verdict(report: Report, blas: str) -> str:
    """Return a line for each ratio: what it is, what is wanted, and whether it is reached."""
    ours, peer = report.results
    lines = []
    for label, measure in peer.measures.items():
        ratio = compute_ratio(ours.measures[label], measure)
        wanted = WANTED[blas][label.split()[0]]
        verdict = "reached" if ratio >= wanted else "MISSED"
        lines.append(f"{label:28} {ratio:6.2f}  wanted {wanted:5.2f}  {verdict}")
    return "\n".join(lines)


def parse_tiles(text: str) -> tuple[int, ...]:
    """Parse numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Print a report and a verdict for each BLAS, and write all repeats to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rival", required=True, help="Python of an environment with mlx-vlm")
    parser.add_argument("--blas", action="append", choices=["own", "ours"], help="default: both")
    parser.add_argument("--size", default="256m")
    parser.add_argument("--tiles", type=parse_tiles, default=(1, 13))
    parser.add_argument("--own-tiles", type=parse_tiles, default=(1,))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder that keeps the model")
    parser.add_argument("--json", type=Path, help="write all repeats here")
    arguments = parser.parse_args()
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = make_random_model(arguments.size, (), arguments.work or Path(temporary))
        for blas in arguments.blas or ("own", "ours"):
            tiles = arguments.own_tiles if blas == "own" else arguments.tiles
            numbers = (arguments.prompt_tokens, arguments.max_tokens, arguments.repeat)
            report = compare(model, arguments.rival, blas, BenchOptions(tiles, *numbers, True))
            reports[blas] = report.to_dict()
            print(format_report(report))
            print(format_verdict(report, blas) + "\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
