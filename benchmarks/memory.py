"""Compare the memory of answers with the estimate and the limit.

    python -m benchmarks.memory [--files FOLDER] [--work FOLDER] [--all] [--max-tokens N]

Each line is a separate process that loads a checkpoint of SmolVLM2-256M's sizes with random
weights and answers a question about a picture of 640 x 480. `peak` is the most resident memory
of that process (`ru_maxrss`), `estimate` what the package says before it begins. `--all` adds
more numbers of tiles and bits. FILES are as in `benchmarks.random_checkpoint`.

At the end, `mlx-smolvlm chat` answers with `--memory-limit 600MB`, and refuses with 300MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.random_checkpoint import make_random_checkpoint

MB = 10**6
SIZE = (640, 480)  # of the picture; 13 tiles
QUESTION = "What is in this picture?"


class Case(NamedTuple):
    """A line of the table; `bits` of 16 means float, `limit` is in MB."""

    bits: int
    detail: str
    limit: int | None = None


CASES = (Case(4, "low", 600), Case(4, "high", 600), Case(4, "high"))
MORE_CASES = (
    *(Case(4, "low"), Case(4, "2", 600), Case(8, "low", 700), Case(8, "high", 700)),
    *(Case(16, "low"), Case(16, "high")),
)


def find_checkpoints(work: Path, files: Path | None, bits: Sequence[int]) -> dict[int, Path]:
    """Make a random checkpoint with each of `bits` in `work`, unless it exists.

    A process of its own makes them, since on Linux the peak of a new process begins with the size
    of the one that starts it.
    """
    numbers = ",".join(map(str, bits))
    given = [] if files is None else [str(files)]
    command = [sys.executable, "-m", "benchmarks.memory", "--make", str(work), numbers, *given]
    subprocess.run(command, check=True)
    return {number: work / ("converted" if number == 16 else f"{number}-bit") for number in bits}


def make_checkpoints(work: str, bits: str, files: str | None = None) -> None:
    """Make a random checkpoint with each of `bits`, such as "4,8", in `work`, if it is missing."""
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import convert_checkpoint

    make_random_checkpoint(Path(work), None if files is None else Path(files))
    for number in {*map(int, bits.split(","))} - {16}:
        folder = Path(work) / f"{number}-bit"
        if not folder.exists():
            convert_checkpoint(Path(work) / "hf", folder, ConvertOptions(bits=number))


def measure_peak(command: list[str]) -> tuple[int, str, str, int]:
    """Run `command`, and return its exit status, stdout, stderr, and peak in bytes."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        error.seek(0)
        scale = 1 if sys.platform == "darwin" else 1024
        return process.returncode, out.read(), error.read(), usage.ru_maxrss * scale


def answer(folder: str, detail: str, limit: str, max_tokens: str, picture: str) -> None:
    """Answer in this process, and print the estimate and counts as JSON."""
    from mlx_smolvlm import load
    from mlx_smolvlm.generate.engine import describe_work
    from mlx_smolvlm.generate.memory_plan import estimate
    from mlx_smolvlm.prompt.messages import read_request

    most = int(limit) * MB or None
    vlm = load(folder, memory_limit=most)
    level: Any = int(detail) if detail.isdigit() else detail
    request = read_request(QUESTION, [picture], (), None)
    prompt = vlm.engine.make_prompt(request.messages, vlm.engine.open_media(request, level))
    assert vlm.engine.guard is not None
    setup = vlm.engine.guard.setup
    guess = estimate(setup, describe_work(prompt, int(max_tokens)), most)
    reply = vlm.ask(QUESTION, picture, detail=level, max_tokens=int(max_tokens))
    row = {
        "tiles": reply.image_tiles,
        "packed": setup.is_packed,
        "tile_batch": setup.tile_batch,
        "prefill_chunk": setup.prefill_chunk,
        "estimate": guess.total,
        "parts": asdict(guess),
        "first_s": round(reply.time_to_first_token_s, 1),
        "tokens_per_s": round(reply.generation_tps, 1),
    }
    print(json.dumps(row))


def run_case(case: Case, folder: Path, max_tokens: int, picture: Path) -> dict[str, Any]:
    """Answer in a new process, and return what it printed with its peak."""
    words = [str(folder), case.detail, str(case.limit or 0), str(max_tokens), str(picture)]
    status, out, error, peak = measure_peak(
        [sys.executable, "-m", "benchmarks.memory", "--answer", *words]
    )
    if status:
        raise SystemExit(error)
    return {**case._asdict(), **json.loads(out), "peak": peak}


def run_chat(folder: Path, limit: int, max_tokens: int, picture: Path) -> dict[str, Any]:
    """Run `chat` with `--memory-limit`, and return its status, message and peak."""
    chat = [sys.executable, "-m", "mlx_smolvlm.cli.app", "chat", QUESTION, "-i", str(picture)]
    options = ["-m", str(folder), "--max-tokens", str(max_tokens), "--memory-limit", f"{limit}MB"]
    started = time.perf_counter()
    status, out, error, peak = measure_peak([*chat, *options, "--detail", "high"])
    seconds = round(time.perf_counter() - started, 1)
    text = {"answer": len(out), "message": error.strip()}
    return {"limit": limit, "status": status, **text, "peak": peak, "seconds": seconds}


def main() -> None:
    """Measure each case, print the table, and check the limits."""
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--make"]:
        make_checkpoints(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=Path, help="small files of the published checkpoint")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "smolvlm-memory")
    parser.add_argument("--all", action="store_true", help="more numbers of tiles and bits")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    cases = (*CASES, *(MORE_CASES if options.all else ()))
    folders = find_checkpoints(options.work, options.files, [one.bits for one in cases])
    picture = options.work / "picture.png"
    _draw(picture)
    print(
        "bits  tiles  limit MB  batch  chunk  packed  "
        "estimate MB  peak MB  estimate / peak  first s"
    )
    rows = []
    for case in cases:
        row = run_case(case, folders[case.bits], options.max_tokens, picture)
        rows.append(row)
        print(
            f"{case.bits:4}  {row['tiles']:5}  {case.limit or '-':>8}  {row['tile_batch']:5}  "
            f"{row['prefill_chunk']:5}  {'yes' if row['packed'] else 'no':>6}  "
            f"{row['estimate'] / MB:11.0f}  {row['peak'] / MB:7.0f}  "
            f"{row['estimate'] / row['peak']:15.2f}  {row['first_s']:7.1f}",
            flush=True,
        )
    chats = [run_chat(folders[4], limit, options.max_tokens, picture) for limit in (600, 300)]
    for chat in chats:
        print(
            f"chat --memory-limit {chat['limit']}MB: status {chat['status']}, "
            f"peak {chat['peak'] / MB:.0f} MB, {chat['seconds']} s {chat['message']}"
        )
    if options.json:
        options.json.write_text(json.dumps({"cases": rows, "chat": chats}, indent=2) + "\n")


def _draw(path: Path) -> None:
    """Write a picture of `SIZE`."""
    from PIL import Image

    gradient = Image.linear_gradient("L").resize(SIZE)
    Image.merge("RGB", (gradient, gradient.rotate(180), gradient)).save(path)


if __name__ == "__main__":
    main()
