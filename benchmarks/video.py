"""Measure memory and time of a video by its length and its number of frames.

    python -m benchmarks.video [--files FOLDER | --model MODEL] [--media] [--json]
                               [--seconds 10,60,600] [--frames 10,32,64] [--keyint 30]

Each line is measured in its own process. The clips are made on the first run (video_clips.py: some
minutes, and 1.5 GB for ten minutes of video) and kept in --cache. Without --model, the model has
SmolVLM2-256M's sizes and random weights, which cost as much as trained ones; its small files come
from --files or from the hub. --media measures only opening, decoding and resizing. On two CPU
cores the whole table takes most of an hour, mainly in the encoder; use fewer --frames or --media
there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.video_clips import locate_clip, parse_numbers

CACHE = Path(tempfile.gettempdir()) / "mlx-smolvlm-benchmark"

Row = dict[str, Any]

COLUMNS = {  # heading and format of each value
    "seconds": ("clip s", "d"),
    "frames": ("frames", "d"),
    "tiles": ("tiles", "d"),
    "tokens": ("tokens", "d"),
    "index_s": ("index s", ".2f"),
    "decode_s": ("decode s", ".2f"),
    "resize_s": ("resize s", ".2f"),
    "encode_s": ("encode s", ".2f"),
    "prefill_s": ("prefill s", ".2f"),
    "total_s": ("total s", ".2f"),
    "s_per_frame": ("s/frame", ".3f"),
    "before_mb": ("MB before", ".0f"),
    "peak_mb": ("peak MB", ".0f"),
    "mlx_peak_mb": ("MLX peak MB", ".0f"),
}


def read_peak_mb() -> float:
    """Return the peak memory of this process, in 10**6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


@contextmanager
def add_seconds(row: Row, name: str) -> Iterator[None]:
    """Add the seconds of the `with` block to `row[name]`."""
    started = time.perf_counter()
    yield
    row[name] = row.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def time_stages(row: Row) -> Iterator[None]:
    """Add the seconds of decoding and resizing inside the `with` block to `row`."""
    from mlx_smolvlm.media import tiles as image
    from mlx_smolvlm.media import video

    frames, tile_frame = video.Clip.read_frames, image.tile_frame

    def timed_frames(self: video.Clip) -> Iterator[video.Frame]:
        pictures = frames(self)
        while True:
            with add_seconds(row, "decode_s"):
                picture = next(pictures, None)
            if picture is None:
                return
            yield picture

    def timed_tile(*given: Any) -> Any:
        with add_seconds(row, "resize_s"):
            return tile_frame(*given)

    try:
        video.Clip.read_frames, image.tile_frame = timed_frames, timed_tile  # type: ignore[method-assign]
        yield
    finally:
        video.Clip.read_frames, image.tile_frame = frames, tile_frame  # type: ignore[method-assign]


def measure(path: Path, seconds: int, frames: int, model: str, media: bool) -> Row:
    """Measure a row of the table in this process.

    `decode_s` includes waiting for the encoder's previous batch; `encode_s` is the rest.
    """
    import mlx_smolvlm as smolvlm
    from mlx_smolvlm.checkpoint.load import read_config
    from mlx_smolvlm.convert.hub import ResolveOptions, resolve
    from mlx_smolvlm.media.video import open_video

    vlm = None if media else smolvlm.load(model)
    config = read_config(resolve(model, ResolveOptions())) if vlm is None else vlm.config
    row: Row = {"seconds": seconds, "before_mb": read_peak_mb()}
    with add_seconds(row, "total_s"):
        with add_seconds(row, "index_s"):
            wanted = smolvlm.Video(path, fps=frames / seconds, max_frames=frames)
            clip = open_video(wanted, config)
        with time_stages(row):
            if vlm is None:
                row["tiles"] = _count_tiles(clip, config)
            else:
                row |= _time_answer(vlm, clip, row)
    row["frames"] = len(clip.indices)
    row["s_per_frame"] = row["total_s"] / row["frames"]
    row["peak_mb"] = read_peak_mb()
    return row


def _count_tiles(clip: Any, config: Any) -> int:
    """Make the tiles of `clip`, drop them, and return their number."""
    from mlx_smolvlm.media import tiles as image

    edge = config.video.longest_edge if config.video else config.tile_size
    return sum(len(image.tile_frame(one.picture, edge, config)) for one in clip.read_frames())


def _time_answer(vlm: Any, clip: Any, row: Row) -> Row:
    """Time an answer of one token in `row`, and return its counts."""
    from mlx_smolvlm import Sampling

    stream = vlm.stream("What happens here?", videos=[clip], sampling=Sampling(max_tokens=1))
    with add_seconds(row, "encode_s"):
        for _ in stream.prepare():
            pass
    row["encode_s"] -= row["decode_s"] + row["resize_s"]
    with add_seconds(row, "prefill_s"):
        reply = stream.finish()
    return {
        "tiles": reply.video_frames,
        "tokens": reply.prompt_tokens,
        "mlx_peak_mb": reply.peak_memory_gb * 1e3,
    }


def run(module: str, *arguments: str | Path) -> str:
    """Run `module` as a command with `arguments`, and return the last line that it prints.

    The work runs in other processes to keep this one small: on Linux the peak memory of a process
    starts at the size of its parent.

    Raises:
        SystemExit: The command failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return result.stdout.strip().splitlines()[-1]


def prepare_model(options: argparse.Namespace) -> str:
    """Make the clips and the model, and return the folder of the model."""
    lengths = ",".join(map(str, options.seconds))
    clips = options.cache / "clips"
    run("benchmarks.video_clips", clips, "--seconds", lengths, "--keyint", str(options.keyint))
    if options.model is not None:
        return str(options.model)
    files = ["--files", options.files] if options.files else []
    return run("benchmarks.random_checkpoint", options.cache / "random-256m", *files)


def measure_rows(options: argparse.Namespace, model: str) -> Iterator[Row]:
    """Yield the rows of the table, each measured in its own process."""
    for frames in options.frames:
        for seconds in options.seconds:
            path = locate_clip(options.cache / "clips", seconds, options.keyint)
            one = {"path": str(path), "seconds": seconds, "frames": frames, "model": model}
            yield json.loads(
                run("benchmarks.video", "--one", json.dumps(one | {"media": options.media}))
            )


def format_row(row: Row, heading: bool = False) -> str:
    """Return the text of `row`, or the headings of its columns."""
    shown = {name: column for name, column in COLUMNS.items() if name in row}
    if heading:
        return "  ".join(head for head, _ in shown.values())
    return "  ".join(f"{row[name]:{len(head)}{form}}" for name, (head, form) in shown.items())


def compare_with_shortest(rows: Sequence[Row]) -> list[Row]:
    """Compare each length with the shortest one for the same number of frames."""
    found = []
    for row in rows:
        same = [other for other in rows if other["frames"] == row["frames"]]
        shortest = min(same, key=lambda other: other["seconds"])
        if row is not shortest:
            found.append(
                {
                    "frames": row["frames"],
                    "seconds": row["seconds"],
                    "shortest_seconds": shortest["seconds"],
                    "more_peak_mb": row["peak_mb"] - shortest["peak_mb"],
                    "times_as_long": row["total_s"] / shortest["total_s"],
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure memory and time of a video.")
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--files", type=Path, help="the published checkpoint without weights")
    parser.add_argument("--seconds", type=parse_numbers, default=[10, 60, 600])
    parser.add_argument("--frames", type=parse_numbers, default=[10, 32, 64])
    parser.add_argument("--keyint", type=int, default=30, help="frames from keyframe to keyframe")
    parser.add_argument("--media", action="store_true", help="leave the model out")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for clips and random weights")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(**options.one)))
        return
    model = prepare_model(options)
    rows: list[Row] = []
    for row in measure_rows(options, model):
        if not options.json:
            print(
                format_row(row) if rows else f"{format_row(row, heading=True)}\n{format_row(row)}",
                flush=True,
            )
        rows.append(row)
    compared = compare_with_shortest(rows)
    if options.json:
        print(json.dumps({"rows": rows, "against_shortest": compared}, indent=2))
        return
    for one in compared:
        print(
            f"{one['frames']} frames of {one['seconds']} s against {one['shortest_seconds']} s: "
            f"{one['more_peak_mb']:+.0f} MB, {one['times_as_long']:.2f} times as long"
        )


if __name__ == "__main__":
    main()
