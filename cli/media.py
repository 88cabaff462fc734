"""Pictures and videos on the command line: their options, opening them, frames on disk."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from mlx_smolvlm.cli.output import say
from mlx_smolvlm.errors import redact_url
from mlx_smolvlm.files import append_file, expand_path, replace_file, write_file

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm import Progress, SmolVLM, Video
    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.media.video import Clip


@dataclass(frozen=True)
class VideoOptions:
    """Which frames to take of each video, see `Video`.

    Attributes:
        chunk_s: Split a long video into parts of this length and answer for each.
        frames_folder: Write the frames to this folder.
    """

    fps: float | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    sample: Literal["even", "scene"] = "even"
    chunk_s: float | None = None
    frames_folder: Path | None = None


_VIDEO_OPTION_NAMES = {
    "max_frames": "--max-frames",
    "start_s": "--start",
    "end_s": "--end",
    "chunk_s": "--chunk",
    "frames_folder": "--frames",
}


def name_video_option(field: str) -> str:
    """Return the command-line option that sets a field of `VideoOptions`."""
    return _VIDEO_OPTION_NAMES.get(field, f"--{field}")


def check_video_options(options: VideoOptions) -> VideoOptions:
    """Return `options` unchanged; `Video` checks the values that it takes.

    Raises:
        typer.BadParameter: A value is out of range; the message names the option.
    """
    chunk = options.chunk_s
    if chunk is not None and not 0 < chunk < math.inf:
        raise typer.BadParameter(f"{chunk:g} is not above 0", param_hint="--chunk")
    if options != VideoOptions(chunk_s=chunk, frames_folder=options.frames_folder):
        try:
            make_video("", options)  # imports Pillow, so only where a value was given
        except ValueError as error:
            field, _, rest = str(error).partition(" ")
            rest = rest.replace("start_s", "--start")
            raise typer.BadParameter(rest, param_hint=name_video_option(field)) from None
    return options


def make_video(source: str, options: VideoOptions) -> Video:
    """Return the video at `source` with the choice of frames in `options`."""
    from mlx_smolvlm import Video

    return Video(
        source,
        fps=options.fps,
        max_frames=options.max_frames,
        start_s=options.start_s,
        end_s=options.end_s,
        sample=options.sample,
    )


def parse_time(name: str, text: str | None) -> float | None:
    """Parse seconds, MM:SS or H:MM:SS, and return seconds.

    Raises:
        typer.BadParameter: `text` is not a time; `name` is the option that it is the value of.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not a time; give seconds, MM:SS or H:MM:SS", param_hint=f"--{name}"
        )
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def is_url(source: str) -> bool:
    """Return whether `source` is fetched from the network."""
    return source.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class OpenedImage:
    """An opened picture and its name in messages."""

    name: str
    image: PIL.Image.Image


@dataclass(frozen=True)
class OpenedVideo:
    """An opened video and its name in messages."""

    name: str
    video: Video


OpenedMedium = OpenedImage | OpenedVideo


def open_picture(source: str) -> OpenedImage:
    """Open the picture at a path, a URL, a data URI, or "-" for stdin.

    Raises:
        MediaError: It cannot be opened.
    """
    from mlx_smolvlm.media.picture import open_image

    return OpenedImage(_shorten_source(source), open_image(source))


def open_video_source(source: str, options: VideoOptions) -> OpenedVideo:
    """Open the video at a path, a URL, a data URI, or "-" for stdin.

    Raises:
        MediaError: It cannot be opened.
    """
    return OpenedVideo(_shorten_source(source), make_video(source, options).open())


def _shorten_source(source: str) -> str:
    """Return a short name of a picture or video for messages."""
    if source == "-":
        return "stdin"
    if source[:5].lower() == "data:":
        return "data URI"
    return redact_url(source).rstrip("/").rpartition("/")[2]


def print_cost(vlm: SmolVLM, image: OpenedImage, detail: Detail) -> None:
    """Print the tiles and tokens of a picture, if stderr is a terminal."""
    if sys.stderr.isatty():
        say(describe_cost(vlm, image, detail), dim=True)


def describe_cost(vlm: SmolVLM, image: OpenedImage, detail: Detail) -> str:
    """Return the name of a picture, its tiles and its tokens in one line."""
    from mlx_smolvlm.media.tiles import compute_grid

    grid = compute_grid(image.image.size, vlm.config, detail)
    tiles = "1 tile" if grid.num_tiles == 1 else f"{grid.rows} x {grid.cols} tiles + 1"
    return f"{image.name}: {tiles}, {vlm.engine.prompt_builder.count_image_tokens(grid)} tokens"


def sample_video(vlm: SmolVLM, video: OpenedVideo) -> Clip:
    """Choose the frames that the model sees; on a terminal, print how many tokens they take.

    Raises:
        MediaError: The chosen range has no frame, or the video cannot be decoded.
    """
    from mlx_smolvlm.media.timeline import format_duration
    from mlx_smolvlm.media.video import open_video

    clip = open_video(video.video, vlm.config)
    if sys.stderr.isatty():
        count = len(clip.indices)
        frames = "1 frame" if count == 1 else f"{count} frames"
        tokens = vlm.engine.prompt_builder.count_clip_tokens(clip)
        say(
            f"{video.name}: {frames} of {format_duration(clip.duration_s)}, {tokens} tokens",
            dim=True,
        )
    return clip


class FrameWriter:
    """Writes the frames that the model sees as PNG files, and a list of them to `frames.jsonl`.

    The frames have the size of a tile. The list and frames of an earlier run are replaced.
    """

    def __init__(self, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
        import numpy as np

        folder = expand_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._mean, self._std = folder, np.array(mean), np.array(std)
        self._list = folder / "frames.jsonl"
        write_file(self._list, "", follow_links=False)
        self._count = 0

    def write(self, step: Progress) -> None:
        """Write the frame of `step`, if it has one."""
        import numpy as np
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
