"""Make clips for benchmarks/video.py: 1920 x 1080, 30 frames a second, H.264.

    python -m benchmarks.video_clips FOLDER [--seconds 10,60,600] [--keyint 30]

A window moves over a picture of smooth colours, with noise like that of a sensor and a square that
crosses the frame. Up to a minute is encoded; longer clips repeat the packets of that minute with
later timestamps, which a decoder cannot tell from a clip that was encoded as a whole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from mlx_smolvlm.files import make_private_folder, replace_file

SIZE = (1920, 1080)
FPS = 30
MINUTE = 60  # seconds
SPREAD = 128  # pixels by which the window moves to each side


def locate_clip(folder: Path, seconds: int, keyint: int, size: tuple[int, int] = SIZE) -> Path:
    """Return the path at which `make_clip` stores a clip."""
    return folder / f"{size[0]}x{size[1]}-{seconds}s-keyint{keyint}.mp4"


def make_clip(folder: Path, seconds: int, keyint: int, size: tuple[int, int] = SIZE) -> Path:
    """Make a clip of `seconds` unless it exists, and return its path.

    Args:
        folder: The folder of clips.
        seconds: The length; above a minute a number of whole minutes.
        keyint: Frames between keyframes: 30 is a second, as phones use; 250 is x264's default.
        size: Width and height.

    Raises:
        ValueError: `seconds` is above a minute and not whole minutes.
    """
    if seconds > MINUTE and seconds % MINUTE:
        raise ValueError(f"seconds is {seconds}; above {MINUTE} it must be a multiple of it")
    path = locate_clip(folder, seconds, keyint, size)
    if path.exists():
        return path
    make_private_folder(folder)  # the default is in the system's temporary folder
    with replace_file(path, path.suffix) as partial:
        if seconds > MINUTE:
            _repeat(make_clip(folder, MINUTE, keyint, size), partial, seconds // MINUTE)
        else:
            _encode(partial, seconds * FPS, keyint, size)
    return path


def draw_frames(count: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield `count` frames as planes of YUV 4:2:0, (3 / 2 * H, W) uint8."""
    width, height = size
    random = np.random.default_rng(0)
    y, x = np.mgrid[: height + 2 * SPREAD, : width + 2 * SPREAD].astype(np.float32)
    luma = 110 + 50 * np.sin(x / 37) * np.cos(y / 53) + 30 * np.sin((x + 2 * y) / 11)
    luma = luma.astype(np.uint8)
    chroma = [(128 + 60 * np.sin(part / 91)).astype(np.uint8)[::2, ::2] for part in (x, y)]
    noises = random.normal(0, 5, (8, height, width)).astype(np.int8).view(np.uint8)
    frame = np.empty((height * 3 // 2, width), np.uint8)
    side = height // 6
    for number in range(count):
        left = SPREAD + 2 * round(SPREAD / 2 * math.sin(number / 47))
        top = SPREAD + 2 * round(SPREAD / 2 * math.cos(number / 61))
        np.add(  # uint8 wraps as int8 does, and the luma keeps clear of both ends
            luma[top : top + height, left : left + width],
            noises[random.integers(len(noises))],
            out=frame[:height],
        )
        at = number * 8 % (width - side)
        frame[side : 2 * side, at : at + side] = 235
        planes = [
            plane[top // 2 : (top + height) // 2, left // 2 : (left + width) // 2]
            for plane in chroma
        ]
        frame[height:] = np.concatenate([plane.reshape(-1, width) for plane in planes])
        yield frame


def _encode(path: Path, count: int, keyint: int, size: tuple[int, int]) -> None:
    """Encode `count` frames with x264's veryfast preset and three B-frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyint
        stream.options = {
            "preset": "veryfast",
            "crf": "20",
            "x264-params": f"keyint={keyint}:scenecut=0:bframes=3",
        }
        for planes in draw_frames(count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())


def _repeat(source: Path, path: Path, times: int) -> None:
    """Write `source` `times` times over into one file, without encoding."""
    with av.open(str(path), "w") as out:
        stream, end = None, 0
        for _ in range(times):
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or out.add_stream_from_template(video)
                length = 0
                for packet in container.demux(video):
                    if not packet.size:
                        continue
                    assert packet.pts is not None
                    assert packet.dts is not None
                    length = max(length, packet.pts + (packet.duration or 0))
                    packet.pts, packet.dts = packet.pts + end, packet.dts + end
                    packet.stream = stream
                    out.mux(packet)
            end += length


def parse_numbers(text: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the clips of benchmarks/video.py.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=parse_numbers, default=[10, 60, 600])
    parser.add_argument("--keyint", type=parse_numbers, default=[30])
    options = parser.parse_args(arguments)
    for keyint in options.keyint:
        for seconds in options.seconds:
            path = make_clip(options.folder, seconds, keyint)
            size = path.stat().st_size
            print(f"{path}  {size / 1e6:.1f} MB  {size * 8 / seconds / 1e6:.1f} Mbit/s")


if __name__ == "__main__":
    main()
