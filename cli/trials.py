"""Small trials of what answers are made of: pictures, videos, the demo, checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.health import Finding
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.quoting import one_line

if TYPE_CHECKING:
    from mlx_smolvlm.config import Config

SIDE, FRAMES = 64, 8
PICTURES = ("PNG", "JPEG", "WEBP")
DECODERS = ("h264", "hevc", "vp9", "av1")
REINSTALL = "pip install --force-reinstall"


def pictures() -> Iterator[Finding]:
    """Whether common kinds of pictures are written, and read back by what reads a user's."""
    from PIL import Image

    from mlx_smolvlm.picture import open_image

    works: list[str] = []
    fails: list[str] = []
    for kind in PICTURES:
        stream = io.BytesIO()
        try:
            Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(stream, kind)
            red, green, _ = open_image(stream.getvalue()).getpixel((8, 8))  # type: ignore[misc]
        except Exception as error:  # of a broken library
            fails.append(f"{kind} ({one_line(error)})")
        else:
            (works if red > 150 > green else fails).append(kind)
    if works:
        yield Finding("pictures", "ok", f"{', '.join(works)} are read")
    if fails:
        yield Finding("pictures", "broken", f"not read: {', '.join(fails)}", f"{REINSTALL} pillow")


def videos() -> Iterator[Finding]:
    """Whether a clip made in memory is read back, and which kinds can be."""
    try:
        import av

        from mlx_smolvlm.readers import open_reader

        data = _clip()
        reader = open_reader(lambda: io.BytesIO(data), "the trial clip")
        count = len(list(reader.read(range(reader.timeline.num_frames))))
        found = [name for name in DECODERS if name in av.codecs_available]
    except Exception as error:  # of a broken library
        yield Finding("videos", "broken", one_line(error), f"{REINSTALL} av")
        return
    if count != FRAMES:
        text = f"{count} of {FRAMES} frames are read"
        yield Finding("videos", "broken", text, f"{REINSTALL} av")
        return
    lost = [name for name in DECODERS if name not in found]
    text = f"a clip is read; decoders: {', '.join(found)}"
    if lost:
        yield Finding("videos", "note", f"{text}; none for {', '.join(lost)}", f"{REINSTALL} av")
    else:
        yield Finding("videos", "ok", text)


def _clip() -> bytes:
    """A few frames as an mp4 file."""
    import av
    import numpy as np

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            pixels = np.full((SIDE, SIDE, 3), 20 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(video.encode(None))
    return stream.getvalue()


def demo() -> Iterator[Finding]:
    """Whether the bundled model answers."""
    from mlx_smolvlm import Sampling, load

    try:
        reply = load("demo").ask("What is this?", sampling=Sampling(max_tokens=4))
    except Exception as error:  # whatever it is, it is what the user has to know
        yield Finding("demo", "broken", one_line(error), f"{REINSTALL} mlx-smolvlm")
        return
    text = f"answers, {reply.generation_tokens} tokens"
    yield Finding("demo", "ok" if reply.token_ids else "broken", text)


def checkpoint(name: str, folder: Path) -> Iterator[Finding]:
    """Whether the checkpoint in `folder` is whole: headers, tokenizer, template, sums."""
    from mlx_smolvlm.checkpoint import (
        build_checked,
        chat_template,
        read_config,
        tokenizer_path,
    )
    from mlx_smolvlm.checksums import check_sums, read_sums
    from mlx_smolvlm.prompt import PromptBuilder
    from mlx_smolvlm.safetensors import read_headers

    advice = f"convert or fetch it again; {folder}"
    try:
        config: Config = read_config(folder)
        build_checked(config, read_headers(folder))
        PromptBuilder(tokenizer_path(folder), chat_template(folder), config)
        wrong = [f"{file} {problem}" for file, problem in check_sums(folder) if problem]
        has_sums = read_sums(folder) is not None
    except SmolVLMError as error:
        yield Finding(name, "broken", f"{error}", advice)
        return
    if wrong:
        yield Finding(name, "broken", "; ".join(wrong), advice)
    elif has_sums:
        yield Finding(name, "ok", "every file is what was written")
    else:
        text = "its parts fit; it states no sums, so its weights cannot be verified"
        yield Finding(name, "note", text, "convert it again to have them")
