"""Short clips of colored shapes, and the frames of them that the model is shown.

In a clip one shape moves along a side of the picture, or nothing moves, or one thing
(a shape or the background) changes its color a few times. A frame is a `Scene`, so it is
drawn as pictures are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from demo_recipe.draw import RGB, Scene, Shape, render
from mlx_smolvlm.config import VideoConfig
from mlx_smolvlm.media.timeline import sample_indices

# SmolVLM2's, but for half as many frames at most and the demo's tile.
VIDEO = VideoConfig(fps=1.0, max_frames=32, longest_edge=96, skip_secs=1.0)

Event = Literal["moves", "stays", "shape turns", "background turns"]
EVENTS: tuple[Event, ...] = ("moves", "stays", "shape turns", "background turns")
Motion = Literal["none", "left", "right", "up", "down"]
MOTIONS: tuple[Motion, ...] = ("none", "left", "right", "up", "down")

Paint = tuple[str, RGB]


@dataclass(frozen=True)
class Clip:
    """A clip of `frames` frames at `fps`.

    Attributes:
        shapes: As they are in the first frame; what moves or turns is the first of them.
        travel: How far the first shape gets, in pixels (x, y).
        pace: Exponent of the time that the travel follows; 1 is an even speed.
        motion: Where the first shape moves.
        paints: The colors of what turns, in order; empty where nothing does.
        turns: The frame at which each of `paints` but the first appears.
    """

    event: Event
    width: int
    height: int
    fps: float
    frames: int
    background: Paint
    shapes: tuple[Shape, ...]
    travel: tuple[float, float]
    pace: float
    motion: Motion
    paints: tuple[Paint, ...]
    turns: tuple[int, ...]
    smooth: bool

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.frames / self.fps

    @property
    def colors(self) -> tuple[str, ...]:
        """Names of the colors that what turns has, in order."""
        return tuple(name for name, _ in self.paints)

    def color_number(self, index: int) -> int:
        """Which of `paints` frame `index` shows."""
        return sum(index >= turn for turn in self.turns)

    def scene(self, index: int) -> Scene:
        """Frame `index`."""
        share = (index / max(1, self.frames - 1)) ** self.pace
        (ground, ground_rgb), shapes = self.background, list(self.shapes)
        if shapes:
            x, y = (
                shapes[0].x + share * self.travel[0],
                shapes[0].y + share * self.travel[1],
            )
            shapes[0] = replace(shapes[0], x=x, y=y, cell=find_cell(x, y, self.width, self.height))
        if self.paints:
            color, rgb = self.paints[self.color_number(index)]
            if self.event == "background turns":
                ground, ground_rgb = color, rgb
            else:
                shapes[0] = replace(shapes[0], color=color, rgb=rgb)
        return Scene(self.width, self.height, ground, ground_rgb, tuple(shapes), self.smooth)


def sampled_indices(frames: int, fps: float) -> tuple[int, ...]:
    """Frames of a file that the demo is shown, as `video.open_video` samples them."""
    return sample_indices(frames, fps, frames / fps, VIDEO)


def find_cell(x: float, y: float, width: int, height: int) -> int:
    """Return the number of the grid cell (of nine) that a point lies in."""
    return 3 * min(2, int(3 * y / height)) + min(2, int(3 * x / width))


def render_sampled_frames(clip: Clip, rng: np.random.Generator | None = None) -> list[Image.Image]:
    """Render the sampled frames, RGB; with `rng`, half of them get compression artifacts."""
    frames = [render(clip.scene(i)) for i in sampled_indices(clip.frames, clip.fps)]
    if rng is None or rng.random() < 0.5:
        return frames
    quality = int(rng.integers(35, 96))
    return [_compress(frame, quality) for frame in frames]


def _compress(frame: Image.Image, quality: int) -> Image.Image:
    """Compress `frame` as JPEG and back; this halves the color resolution, as H.264 does."""
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")
