"""Measure the accuracy by task of a checkpoint and of its conversions.

    python -m benchmarks.recipes MODEL DATASET [--limit 100] [--only tiny] [--work FOLDER]

Conversions are made by `mlx-smolvlm convert` and evaluated by `mlx-smolvlm eval`, each in its own
process. With `--work`, conversions and results are kept, and a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Options of `mlx-smolvlm convert`.
CONVERSIONS: dict[str, list[str]] = {
    "8 bits": ["--bits", "8"],
    "quality": ["--recipe", "quality"],
    "balanced": ["--recipe", "balanced"],
    "4 bits": ["--bits", "4"],
    "4 bits, GPTQ": ["--bits", "4", "--gptq"],
    "tiny": ["--recipe", "tiny"],
}


def run(*arguments: object) -> str:
    """Run `mlx-smolvlm` and return its stdout; exits the program if it fails."""
    command = [str(Path(sys.executable).with_name("mlx-smolvlm")), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"mlx-smolvlm {' '.join(map(str, arguments))} failed, see above")
    return done.stdout


def evaluate(model: str | Path, data: Path, results: Path, limit: int | None) -> dict[str, Any]:
    """Return the report of `mlx-smolvlm eval`."""
    bound = [] if limit is None else ["--limit", limit]
    report = run("eval", model, data, "--results", results, "--json", *bound)
    values: dict[str, Any] = json.loads(report)
    return values


def count_weight_bytes(folder: Path) -> int:
    """Return the bytes of the weights in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def print_table(reports: dict[str, dict[str, Any]], sizes: dict[str, int]) -> None:
    """Print a line for each task and a column for each conversion."""
    names = list(reports)
    print(f"| task | n | {' | '.join(names)} |")
    print("|---|---|" + "---|" * len(names))
    first = reports[names[0]]
    shares = {
        name: {one["task"]: one["share"] for one in [*report["tasks"], report["overall"]]}
        for name, report in reports.items()
    }
    for task in [*first["tasks"], first["overall"]]:
        cells = [f"{100 * shares[name][task['task']]:.1f}" for name in names]
        print(f"| {task['task']} | {task['n']} | {' | '.join(cells)} |")
    print(f"| MB of weights | | {' | '.join(f'{sizes[name] / 1e6:.2f}' for name in names)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the accuracy of conversions by task.")
    parser.add_argument("model", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, help="lines of each task; default: all")
    parser.add_argument("--only", action="append", choices=CONVERSIONS)
    parser.add_argument("--work", type=Path, help="folder to keep conversions and results in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        work = options.work or Path(spare)
        work.mkdir(parents=True, exist_ok=True)
        limit = options.limit
        reports = {"source": evaluate(options.model, options.data, work / "source.jsonl", limit)}
        sizes = {"source": count_weight_bytes(options.model)}
        for name in options.only or CONVERSIONS:
            folder = work / name.replace(", ", "-").replace(" ", "-")
            if not folder.exists():
                run("convert", options.model, folder, *CONVERSIONS[name])
            results = folder.with_suffix(".jsonl")
            reports[name] = evaluate(folder, options.data, results, limit)
            sizes[name] = count_weight_bytes(folder)
        print_table(reports, sizes)


if __name__ == "__main__":
    main()
