"""Measure how long commands take in a new process.

    python -m benchmarks.startup [--runs 15] [--model demo] [--json FILE]

Prints the median, the fastest and the slowest of N runs, and how much longer a sampled answer
takes than a greedy one. "First token" is the time until the answer's first character is on
stdout. One run before them, which is not counted, fills the file cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

GREEDY, SAMPLED, FIRST = "greedy answer", "answer with --temperature 0.7", "first token"


def time_command(command: list[str], until_output: bool = False) -> float:
    """Return the wall-clock time of `command` in seconds, or until its first byte on stdout.

    Raises:
        SystemExit: The command failed; the message holds its stderr.
    """
    # An installed package has its bytecode; some test machines forbid writing it.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None
        if until_output:
            process.stdout.read(1)
            elapsed = time.perf_counter() - started
        errors = process.communicate()[1].decode(errors="replace")
        if not until_output:
            elapsed = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {errors.strip()}")
    return elapsed


def main() -> None:
    """Time each command and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=15, help="runs of each command")
    parser.add_argument("--model", default="demo", help="model for `chat`")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    tool = [sys.executable, "-m", "mlx_smolvlm.cli.app"]
    script = Path(sys.executable).with_name("mlx-smolvlm")
    if script.exists():
        tool = [str(script)]
    ask = [*tool, "chat", "-m", arguments.model, "--max-tokens", "16", "Hello"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        'python -c "import mlx_smolvlm"': [sys.executable, "-c", "import mlx_smolvlm"],
        "mlx-smolvlm --help": [*tool, "--help"],
        FIRST: ask,
        GREEDY: ask,
        SAMPLED: [*ask, "--temperature", "0.7", "--seed", "1"],
    }
    for command in commands.values():
        time_command(command)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs):  # in turns, so that a slow moment affects all of them
        for name, command in commands.items():
            times[name].append(time_command(command, until_output=name == FIRST))
    differences = [b - a for a, b in zip(times[GREEDY], times[SAMPLED], strict=True)]
    report = {
        "command": " ".join(["python", "-m", "benchmarks.startup", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "runs": arguments.runs,
        "seconds": {
            name: {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
            for name, values in times.items()
        },
        "sampling adds, s": round(statistics.median(differences), 3),
        "first token / python -c pass": round(
            statistics.median(times[FIRST]) / statistics.median(times["python -c pass"]), 1
        ),
    }
    width = max(map(len, commands))
    print(f"{'':{width}}  median     min     max   (s, {arguments.runs} runs)")
    for name, values in times.items():
        numbers = (statistics.median(values), min(values), max(values))
        print(f"{name:{width}}" + "".join(f"  {number:6.3f}" for number in numbers))
    print(f"sampling adds {report['sampling adds, s']} s (median of the differences by round)")
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
