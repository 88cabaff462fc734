"""Open thousands of damaged files, each as a user would, and print what happened.

    python -m tests.fuzz [KIND...] [--files N] [--seed N] [--seconds S] [--megabytes N]

A file may be used or refused with an error of this package. What fails is a traceback, a
crash, more than 20 seconds, more than 1.5 GB of memory, or output on stderr. Files are made
from seeds, so every run of a version damages the same ones: --seed prints one failure again.
The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import IO, Any

HARD_BYTES = 12 * 10**9  # of address space: an allocation beyond it fails
START_SECONDS = 300.0  # to import, make the files to damage and open each once
KINDS_MODULE = os.environ.get("FUZZ_KINDS", "tests.helpers.fuzz_kinds")  # a test puts its own there

UNAVOIDABLE = "tempfile.tif: "  # libtiff's, of damaged files; Pillow has no way to stop it

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one file may take."""

    seconds: float = 20.0
    megabytes: int = 1500


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one file: "used", "refused", or why it counts as a failure."""

    kind: str
    seed: int
    result: str
    detail: str = ""
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        return self.result not in ("used", "refused")


def work(kind: str, start: int, stop: int) -> None:
    """Open the files with seeds `start` to `stop`; print JSON before and after each."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not a report
    resource.setrlimit(resource.RLIMIT_AS, (HARD_BYTES, HARD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = _load_kinds()
    from mlx_smolvlm.errors import SmolVLMError

    warnings.simplefilter("ignore")
    number = list(kinds).index(kind)
    with tempfile.TemporaryDirectory() as folder:
        case = kinds[kind][0](Path(folder))
        report.write(json.dumps({"ready": True}) + "\n")
        for seed in range(start, stop):
            action = case(random.Random(f"{number} {seed}"))
            report.write(json.dumps({"seed": seed}) + "\n")
            _reset_peak()
            printed = os.fstat(2).st_size
            began, result, detail = time.monotonic(), "used", ""
            try:
                action()
            except SmolVLMError as error:
                result, detail = "refused", str(error)
            except BaseException as error:
                result = "traceback"
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                detail = f"{type(error).__name__} at {place}: {str(error)[:200]}"
            seconds = time.monotonic() - began
            said = os.pread(2, 10_000, printed).decode(errors="replace").split("\n")
            said = [line for line in said if line and not line.startswith(UNAVOIDABLE)]
            if result in ("used", "refused") and said:
                result, detail = "printed", said[0]
            done = {"result": result, "detail": detail, "seconds": seconds, "nbytes": _peak()}
            report.write(json.dumps(done) + "\n")


def _load_kinds() -> dict[str, Any]:
    """Kinds of files by name: how each is made and opened, and how many a full run damages."""
    sys.path.insert(0, str(ROOT))  # it may be run as a file
    kinds: dict[str, Any] = importlib.import_module(KINDS_MODULE).KINDS
    return kinds


def _reset_peak() -> None:
    """Let the kernel count the peak of memory anew, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Most bytes of memory since `_reset_peak`; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


def run(kind: str, start: int, stop: int, limits: Limits) -> list[Outcome]:
    """What became of the files of `kind` with seeds `start` to `stop`."""
    outcomes: list[Outcome] = []
    while start < stop:
        done = _run_worker(kind, start, stop, limits)
        outcomes += done
        if not done:
            raise SystemExit(f"{kind}: the worker did not start")
        start = done[-1].seed + 1
    return outcomes


def _run_worker(kind: str, start: int, stop: int, limits: Limits) -> list[Outcome]:
    """What one process said until it was done, crashed or hung."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--worker", kind, str(start), str(stop)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        seed = -1
        while True:
            try:
                line = lines.get(timeout=START_SECONDS if seed < 0 else limits.seconds)
            except queue.Empty:
                process.kill()
                line = ""
                result = "hang"
            else:
                result = "crash"
            if not line:
                status = process.wait()
                if seed >= 0 and (status or result == "hang"):
                    outcomes.append(Outcome(kind, seed, result, f"exit status {status}"))
                elif status:
                    errors.seek(0)
                    print(errors.read(), file=sys.stderr)
                return outcomes
            said = json.loads(line)
            if "seed" in said:
                seed = said["seed"]
            elif "result" in said:
                outcome = Outcome(kind, seed, **said)
                if not outcome.failed and outcome.nbytes > limits.megabytes * 10**6:
                    outcome = dataclasses.replace(outcome, result="memory")
                outcomes.append(outcome)


def _pump(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put each line of `stream` into `lines`, and an empty one at its end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def table(outcomes: list[Outcome]) -> str:
    """The outcomes by kind, in Markdown."""
    rows = [
        "| files | opened | used | refused | failed | longest | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = Counter(outcome.result for outcome in own)
        failed = sum(outcome.failed for outcome in own)
        longest = max(outcome.seconds for outcome in own)
        most = max(outcome.nbytes for outcome in own) / 1e6
        rows.append(
            f"| {kind} | {len(own)} | {counts['used']} | {counts['refused']} | {failed} | "
            f"{longest:.1f} s | {most:,.0f} MB |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the command in `sys.argv`."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    kinds = _load_kinds()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--files", type=int, help="damage so many of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of each kind")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="limit of each")
    parser.add_argument("--megabytes", type=int, default=Limits.megabytes, help="limit of each")
    options = parser.parse_args()
    for kind in options.kinds:
        if kind not in kinds:
            parser.error(f"{kind!r} is none of {', '.join(kinds)}")
    limits = Limits(options.seconds, options.megabytes)
    outcomes = []
    for kind in options.kinds or kinds:
        count = options.files or kinds[kind][1]
        done = run(kind, options.seed, options.seed + count, limits)
        for outcome in done:
            if outcome.failed:
                print(
                    f"{kind} {outcome.seed}: {outcome.result}: {outcome.detail[:300]}", flush=True
                )
        outcomes += done
    print(table(outcomes))
    failed = sum(outcome.failed for outcome in outcomes)
    print(f"\n{len(outcomes):,} files, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
