"""Measure the cost of a second question about a picture: tiles, tokens and time.

    python -m benchmarks.turns [--files FILES] [--folder FOLDER] [--rival PYTHON] [--json]

A conversation of two turns about one picture of 640 x 480, which is 13 tiles, with a model of
SmolVLM2-256M's sizes and random weights (benchmarks/random_checkpoint.py; FILES has the
published small files, FOLDER keeps the checkpoint). With --rival, the Python of an environment
with mlx-vlm, its chat program is measured too. The programs run one after the other, each in its
own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS = ("What is in this picture?", "What color is it?")
SIZE = (640, 480)
ANSWER = 4  # tokens

Row = dict[str, Any]


def make_picture(folder: Path) -> str:
    """Write a picture of noise, and return its path."""
    from PIL import Image

    path = folder / "noise.png"
    Image.effect_noise(SIZE, 40).convert("RGB").save(path)
    return str(path)


def measure_ours(folder: str, path: str) -> list[Row]:
    """Measure two turns of a `Conversation`."""
    import mlx_smolvlm as smolvlm

    vlm = smolvlm.load(folder)
    chat = vlm.chat(sampling=smolvlm.Sampling(max_tokens=ANSWER))
    rows = []
    for question, images in zip(QUESTIONS, ([path], []), strict=True):
        reply = chat.ask(question, images=images)
        rows.append(
            {
                "tiles": reply.encoded_tiles,
                "tokens": reply.prompt_tokens,
                "run": reply.prompt_tokens - reply.cached_tokens,
                "first_s": reply.time_to_first_token_s,
            }
        )
    return rows


def measure_mlx_vlm(folder: str, path: str) -> list[Row]:
    """Measure two turns of mlx-vlm's chat program, called as its own loop does."""
    import contextlib
    import io

    from measure_mlx_vlm.chat import MLXVisionChat

    chat = MLXVisionChat(folder, temperature=0.0, max_tokens=ANSWER, verbose=False)
    tiles: list[int] = []
    tower = type(chat.model.vision_model)
    original = tower.__call__

    def counting(self: Any, x: Any, *rest: Any, **more: Any) -> Any:
        tiles.append(x.shape[0])
        return original(self, x, *rest, **more)

    tower.__call__ = counting
    rows = []
    chat.process_image(path)
    for question in QUESTIONS:
        tiles.clear()
        chat.add_to_history("user", question)
        started, first = time.perf_counter(), 0.0
        stream = sys.modules["mlx_vlm.chat"].stream_generate
        prompt_tokens = 0

        def timed(*arguments: Any, stream: Any = stream, **more: Any) -> Any:
            nonlocal first, prompt_tokens
            for chunk in stream(*arguments, **more):
                first = first or time.perf_counter()
                prompt_tokens = chunk.prompt_tokens
                yield chunk

        sys.modules["mlx_vlm.chat"].stream_generate = timed
        with contextlib.redirect_stdout(io.StringIO()):
            said = chat.generate_response()
        sys.modules["mlx_vlm.chat"].stream_generate = stream
        chat.add_to_history("assistant", said.replace("<end_of_utterance>", ""))
        row = {"tiles": sum(tiles), "tokens": prompt_tokens, "run": None}
        rows.append({**row, "first_s": first - started})
    return rows


def run_process(python: str, program: str, folder: Path, path: str) -> list[Row]:
    """Measure the turns of `program` in a process of `python`."""
    command = [python, __file__, "--one", program, str(folder), path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{program} failed:\n{run.stderr[-2000:]}")
    rows: list[Row] = json.loads(run.stdout.splitlines()[-1])
    return rows


def format_table(results: dict[str, list[Row]]) -> str:
    """Return the results as text, a line for each turn."""
    lines = [f"{'program':<12} {'turn':>4} {'tiles':>6} {'tokens':>7} {'run':>6} {'first s':>8}"]
    for program, rows in results.items():
        for turn, row in enumerate(rows, 1):
            run = "-" if row["run"] is None else row["run"]
            lines.append(
                f"{program:<12} {turn:>4} {row['tiles']:>6} {row['tokens']:>7} {run:>6} "
                f"{row['first_s']:>8.2f}"
            )
        ratio = rows[1]["first_s"] / rows[0]["first_s"]
        lines.append(f"{program:<12} time to first token, turn 2 / turn 1: {ratio:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or the rows as JSON."""
    if sys.argv[1:2] == ["--one"]:
        program = {"mlx-smolvlm": measure_ours, "mlx-vlm": measure_mlx_vlm}[sys.argv[2]]
        print(json.dumps(program(sys.argv[3], sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description="Measure the cost of a second question.")
    parser.add_argument("--files", type=Path, help="the published checkpoint's small files")
    parser.add_argument("--folder", type=Path, help="keep the random checkpoint here")
    parser.add_argument("--rival", help="the Python of an environment with mlx-vlm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from benchmarks.random_checkpoint import make_random_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "random-256m"
        converted = make_random_checkpoint(folder, options.files)
        shown = make_picture(Path(temporary))
        results = {"mlx-smolvlm": run_process(sys.executable, "mlx-smolvlm", converted, shown)}
        if options.rival:
            results["mlx-vlm"] = run_process(options.rival, "mlx-vlm", folder / "hf", shown)
    print(json.dumps(results) if options.json else format_table(results))


if __name__ == "__main__":
    main()
