"""Memory and time of a video, by its length and by the frames taken of it.

    python -m benchmarks.video [--files FOLDER | --model MODEL] [--media] [--json]
                               [--seconds 10,60,600] [--frames 10,32,64] [--keyint 30]

Each line is a process of its own. The clips are made on the first run (video_clips.py:
some minutes, and 1.5 GB for ten minutes of video) and kept in --cache. Unless --model
names another, the model has SmolVLM2-256M's sizes and random weights, which cost what
trained ones do; its small files come from --files, or from the hub. --media leaves the model
out: opening, decoding and resizing alone. On two CPU cores the whole table takes the
better part of an hour, which the encoder spends; choose fewer --frames or --media there.
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

from benchmarks.video_clips import numbers, path_of

CACHE = Path(tempfile.gettempdir()) / "mlx-smolvlm-benchmark"

Row = dict[str, Any]

COLUMNS = {  # of the table: the heading, and how a value is written
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


def peak_mb() -> float:
    """The most memory that this process has held, in 10**6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


@contextmanager
def clock(row: Row, name: str) -> Iterator[None]:
    """Adds the seconds within to `row`."""
    started = time.perf_counter()
    yield
    row[name] = row.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def stages_timed(row: Row) -> Iterator[None]:
    """Within this, decoding and resizing add their seconds to `row`."""
    from mlx_smolvlm.media import tiles as image
    from mlx_smolvlm.media import video

    frames, tile_frame = video.Clip.read_frames, image.tile_frame

    def timed_frames(self: video.Clip) -> Iterator[video.Frame]:
        pictures = frames(self)
        while True:
            with clock(row, "decode_s"):
                picture = next(pictures, None)
            if picture is None:
                return
            yield picture

    def timed_tile(*given: Any) -> Any:
        with clock(row, "resize_s"):
            return tile_frame(*given)

    try:
        video.Clip.read_frames, image.tile_frame = timed_frames, timed_tile  # type: ignore[method-assign]
        yield
    finally:
        video.Clip.read_frames, image.tile_frame = frames, tile_frame  # type: ignore[method-assign]


def measure(path: Path, seconds: int, frames: int, model: str, media: bool) -> Row:
    """A line of the table, measured in this process.

    `decode_s` has also what the encoder's batch before holds up; `encode_s` is the rest.
    """
    import mlx_smolvlm as smolvlm
    from mlx_smolvlm.checkpoint.load import read_config
    from mlx_smolvlm.convert.hub import ResolveOptions, resolve
    from mlx_smolvlm.media.video import open_video

    vlm = None if media else smolvlm.load(model)
    config = read_config(resolve(model, ResolveOptions())) if vlm is None else vlm.config
    row: Row = {"seconds": seconds, "before_mb": peak_mb()}
    with clock(row, "total_s"):
        with clock(row, "index_s"):
            wanted = smolvlm.Video(path, fps=frames / seconds, max_frames=frames)
            clip = open_video(wanted, config)
        with stages_timed(row):
            if vlm is None:
                row["tiles"] = _resized(clip, config)
            else:
                row |= _answered(vlm, clip, row)
    row["frames"] = len(clip.indices)
    row["s_per_frame"] = row["total_s"] / row["frames"]
    row["peak_mb"] = peak_mb()
    return row


def _resized(clip: Any, config: Any) -> int:
    """How many tiles `clip` has, each made as for the encoder and dropped."""
    from mlx_smolvlm.media import tiles as image

    edge = config.video.longest_edge if config.video else config.tile_size
    return sum(len(image.tile_frame(one.picture, edge, config)) for one in clip.read_frames())


def _answered(vlm: Any, clip: Any, row: Row) -> Row:
    """What the model adds to `row`, by an answer of one token."""
    from mlx_smolvlm import Sampling

    stream = vlm.stream("What happens here?", videos=[clip], sampling=Sampling(max_tokens=1))
    with clock(row, "encode_s"):
        for _ in stream.prepare():
            pass
    row["encode_s"] -= row["decode_s"] + row["resize_s"]
    with clock(row, "prefill_s"):
        reply = stream.finish()
    return {
        "tiles": reply.video_frames,
        "tokens": reply.prompt_tokens,
        "mlx_peak_mb": reply.peak_memory_gb * 1e3,
    }


def run(module: str, *arguments: str | Path) -> str:
    """What `module`, run as a command with `arguments`, prints last.

    The work is done in others so that this process stays small: on Linux the peak of
    a process begins with the size of its parent.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return result.stdout.strip().splitlines()[-1]


def prepared(options: argparse.Namespace) -> str:
    """The model, once it and the clips are there."""
    lengths = ",".join(map(str, options.seconds))
    clips = options.cache / "clips"
    run("benchmarks.video_clips", clips, "--seconds", lengths, "--keyint", str(options.keyint))
    if options.model is not None:
        return str(options.model)
    files = ["--files", options.files] if options.files else []
    return run("benchmarks.random_checkpoint", options.cache / "random-256m", *files)


def measured(options: argparse.Namespace, model: str) -> Iterator[Row]:
    """Each line of the table, by a process of its own."""
    for frames in options.frames:
        for seconds in options.seconds:
            path = path_of(options.cache / "clips", seconds, options.keyint)
            one = {"path": str(path), "seconds": seconds, "frames": frames, "model": model}
            yield json.loads(
                run("benchmarks.video", "--one", json.dumps(one | {"media": options.media}))
            )


def line(row: Row, heading: bool = False) -> str:
    """`row` in the table, or the headings of its columns."""
    shown = {name: column for name, column in COLUMNS.items() if name in row}
    if heading:
        return "  ".join(head for head, _ in shown.values())
    return "  ".join(f"{row[name]:{len(head)}{form}}" for name, (head, form) in shown.items())


def against_shortest(rows: Sequence[Row]) -> list[Row]:
    """For each number of frames, each length against the shortest one."""
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
    parser = argparse.ArgumentParser(description="Memory and time of a video.")
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--files", type=Path, help="the published checkpoint without weights")
    parser.add_argument("--seconds", type=numbers, default=[10, 60, 600])
    parser.add_argument("--frames", type=numbers, default=[10, 32, 64])
    parser.add_argument("--keyint", type=int, default=30, help="frames from keyframe to keyframe")
    parser.add_argument("--media", action="store_true", help="leave the model out")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for clips and random weights")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(**options.one)))
        return
    model = prepared(options)
    rows: list[Row] = []
    for row in measured(options, model):
        if not options.json:
            print(line(row) if rows else f"{line(row, heading=True)}\n{line(row)}", flush=True)
        rows.append(row)
    compared = against_shortest(rows)
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
