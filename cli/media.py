"""Pictures and videos on the command line: opening them, saying what they cost, frames on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_smolvlm.cli.options import VideoOptions, make_video
from mlx_smolvlm.cli.render import say
from mlx_smolvlm.files import append_file, expand_path, replace_file, write_file
from mlx_smolvlm.quoting import redact_url

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm import Progress, SmolVLM, Video
    from mlx_smolvlm.image import Detail
    from mlx_smolvlm.video import Clip


@dataclass(frozen=True)
class OpenedImage:
    """An opened picture and what to call it."""

    name: str
    image: PIL.Image.Image


@dataclass(frozen=True)
class OpenedVideo:
    """An opened video and what to call it."""

    name: str
    video: Video


Opened = OpenedImage | OpenedVideo


def open_picture(source: str) -> OpenedImage:
    """The picture at a path, a URL, a data URI or "-" for stdin.

    Raises:
        MediaError: It cannot be opened.
    """
    from mlx_smolvlm.image import open_image

    return OpenedImage(_name(source), open_image(source))


def open_footage(source: str, options: VideoOptions) -> OpenedVideo:
    """The video at a path, a URL, a data URI or "-" for stdin.

    Raises:
        MediaError: It cannot be opened.
    """
    return OpenedVideo(_name(source), make_video(source, options).opened())


def _name(source: str) -> str:
    """What to call a source, in short."""
    if source == "-":
        return "stdin"
    if source[:5].lower() == "data:":
        return "data URI"
    return redact_url(source).rstrip("/").rpartition("/")[2]


def describe_image(vlm: SmolVLM, image: OpenedImage, detail: Detail) -> None:
    """Say what a picture costs, if stderr is a terminal."""
    if sys.stderr.isatty():
        say(cost_of(vlm, image, detail), dim=True)


def cost_of(vlm: SmolVLM, image: OpenedImage, detail: Detail) -> str:
    """The name of a picture, its tiles and its tokens."""
    from mlx_smolvlm.image import grid_of

    grid = grid_of(image.image.size, vlm.config, detail)
    tiles = "1 tile" if grid.num_tiles == 1 else f"{grid.rows} x {grid.cols} tiles + 1"
    return f"{image.name}: {tiles}, {vlm.engine.prompt_builder.tokens_of(grid)} tokens"


def sampled(vlm: SmolVLM, video: OpenedVideo) -> Clip:
    """The clip that the model looks at; what it costs is said if stderr is a terminal.

    Raises:
        MediaError: There is nothing between start and end, or it cannot be decoded.
    """
    from mlx_smolvlm.timeline import clock
    from mlx_smolvlm.video import open_video

    clip = open_video(video.video, vlm.config)
    if sys.stderr.isatty():
        count = len(clip.indices)
        frames = "1 frame" if count == 1 else f"{count} frames"
        tokens = vlm.engine.prompt_builder.tokens_of_clip(clip)
        say(f"{video.name}: {frames} of {clock(clip.duration_s)}, {tokens} tokens", dim=True)
    return clip


class FrameWriter:
    """Writes the frames that the model sees, as PNGs of a tile's size, and `frames.jsonl`.

    The list has a line with number and time of each. An earlier run's list, and its frames
    of the same names, are replaced.
    """

    def __init__(self, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
        folder = expand_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._mean, self._std = folder, np.array(mean), np.array(std)
        self._list = folder / "frames.jsonl"
        write_file(self._list, "", follow_links=False)
        self._count = 0

    def write(self, step: Progress) -> None:
        """Write the frame of `step`, if it has one."""
        from PIL import Image

        if step.frame is None or step.tile is None:
            return
        self._count += 1
        frame = step.frame
        name = f"frame-{self._count:04d}-{frame.stamp.replace(':', 'm')}s.png"
        pixels = np.rint((step.tile * self._std + self._mean) * 255).clip(0, 255)
        with replace_file(self._folder / name, ".png", follow_links=False) as part:
            Image.fromarray(pixels.astype(np.uint8)).save(part)
        row = {
            "file": name,
            "video": step.name.strip("'"),
            "index": frame.index,
            "timestamp_s": round(frame.timestamp_s, 6),
            "stamp": frame.stamp,
        }
        append_file(self._list, json.dumps(row, ensure_ascii=False) + "\n")
