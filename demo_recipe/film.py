"""Clips as files: H.264 in mp4, as a phone or a screen recorder writes them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av

from demo_recipe.clips import Clip
from demo_recipe.draw import render


def write_mp4(clip: Clip, path: Path, quality: int = 23) -> None:
    """Write all frames of `clip` to `path`.

    Args:
        quality: libx264's `crf`: 18 is hard to tell from the original, 23 its default.
    """
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(clip.fps))
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.options = {"crf": str(quality)}
        for index in range(clip.frames):
            frame = av.VideoFrame.from_image(render(clip.scene(index)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
