"""Short video files, made when a test needs them, and what decoding all of one gives."""

import contextlib
import functools
import io
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

NTSC = Fraction(30000, 1001)
QUESTION = "What happens?"


@dataclass(frozen=True)
class Spec:
    """How a file is made.

    Attributes:
        container: FFmpeg's name of the format.
        codec: FFmpeg's name of the encoder.
        frames: How many.
        rate: Frames a second.
        size: Width and height in pixels.
        pix_fmt: Of the encoder.
        options: Of the encoder.
        muxing: Options of the container.
        times: Time of each frame in units of 1 / (rate * 10); None is even spacing.
        picture: Pixels (H, W, 3) from the number of a frame and the size.
        all_keys: Call each packet a keyframe, though it is none.
    """

    container: str = "mp4"
    codec: str = "libx264"
    frames: int = 50
    rate: Fraction | int = 25
    size: tuple[int, int] = (64, 48)
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    muxing: dict[str, str] = field(default_factory=dict)
    times: tuple[int, ...] | None = None
    picture: Callable[[int, tuple[int, int]], np.ndarray] | None = None
    all_keys: bool = False


FAST = {"preset": "ultrafast"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=25:pools=1:frame-threads=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}
AV1 = {"preset": "12", "svtav1-params": "keyint=20:lp=1"}


def moving(number: int, size: tuple[int, int]) -> np.ndarray:
    """Slopes that move, with the bits of `number` as a row of black and white blocks."""
    width, height = size
    y, x, c = np.ogrid[:height, :width, :3]
    base = (x * 3 + y * 2 + number * 5 + c * 60) % 256
    block = max(width // 12, 1)
    for bit in range(12):
        base[: height // 4, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return base.astype(np.uint8)


@contextlib.contextmanager
def scheduled_as_before() -> Iterator[None]:
    """This thread is scheduled afterwards as it was before.

    SVT-AV1 gives the thread that opens it the highest realtime priority if root runs it, and
    leaves it so: processes that wait for each other then take every core from everything else.
    """
    if not hasattr(os, "sched_getscheduler"):  # macOS
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def make(spec: Spec) -> bytes:
    """The file that `spec` describes."""
    os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder writes to stderr
    with tempfile.NamedTemporaryFile() as file, scheduled_as_before():
        _write(file.name, spec)
        return file.read()


def _write(path: str, spec: Spec) -> None:
    with av.open(path, "w", format=spec.container, options=dict(spec.muxing)) as container:
        stream = container.add_stream(spec.codec, rate=spec.rate, options=dict(spec.options))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = spec.size
        stream.pix_fmt = spec.pix_fmt
        stream.thread_count = 1
        unit = Fraction(1, 1) / Fraction(spec.rate)
        if spec.times is not None:
            unit /= 10
            stream.codec_context.time_base = unit
        for number in range(spec.frames):
            pixels = (spec.picture or moving)(number, spec.size)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if spec.times is None else spec.times[number]
            frame.time_base = unit
            for packet in stream.encode(frame):
                packet.is_keyframe |= spec.all_keys
                container.mux(packet)
        container.mux(stream.encode(None))


cached = functools.lru_cache(maxsize=None)


@cached
def data(name: str) -> bytes:
    """The file `name` of `SPECS`."""
    return make(SPECS[name])


def decoded(data: bytes, **options: Any) -> list[Image.Image]:
    """Every frame of a file, one after the other, as PyAV gives them: not turned."""
    with av.open(io.BytesIO(data), **options) as container:
        return [
            Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


def same(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> bool:
    """Whether all pixels are the same."""
    return len(first) == len(second) and all(
        a.size == b.size and a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)
    )


def with_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose track is turned by (a, b, c, d)."""
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:place] + packed + data[place + 36 :]


def x264(params: str) -> dict[str, str]:
    """Options of libx264 with its own parameters."""
    return {"preset": "fast", "x264-params": params}


SPECS: dict[str, Spec] = {
    "h264 mp4": Spec(options=FAST, frames=75),
    "0.3 s": Spec(options=FAST, frames=3, rate=10),
    "one frame": Spec(options=FAST, frames=1),
    "b frames": Spec(options=x264("keyint=20:bframes=3"), frames=90),
    "ntsc": Spec(options=FAST, rate=NTSC, frames=150),
    "60 fps portrait": Spec(options=x264("keyint=30"), rate=60, frames=240, size=(46, 80)),
    "odd size": Spec(options=FAST, size=(55, 39), pix_fmt="yuv444p", rate=15),
    "3 min": Spec(options=x264("keyint=50"), rate=10, frames=1800, size=(48, 32)),
    "vfr": Spec(
        options=x264("keyint=12"),
        rate=20,
        frames=60,
        times=tuple(n * 10 + n % 3 * 3 + n * n // 4 for n in range(60)),
    ),
    "front index": Spec(options=FAST, muxing={"movflags": "faststart"}),
    "fragmented": Spec(options=x264("keyint=10"), muxing={"movflags": "frag_keyframe+empty_moov"}),
    "hevc mp4": Spec(codec="libx265", options=HEVC, frames=60),
    "hevc mkv": Spec("matroska", "libx265", options=HEVC, frames=60),
    "vp9 webm": Spec("webm", "libvpx-vp9", options={**VP9, "g": "20"}, frames=60),
    "vp9 mp4": Spec(codec="libvpx-vp9", options=VP9, frames=40, rate=12),
    "vp8 webm": Spec("webm", "libvpx", options=VP9, frames=40),
    "av1 mp4": Spec(codec="libsvtav1", options=AV1, frames=45, size=(64, 64)),
    "av1 webm": Spec("webm", "libsvtav1", options=AV1, frames=45, size=(64, 64)),
    "mpeg-4 avi": Spec("avi", "mpeg4", options={"g": "15", "bf": "2"}, frames=60),
    "mjpeg mov": Spec("mov", "mjpeg", pix_fmt="yuvj420p", frames=30),
    "mpeg-2 ts": Spec("mpegts", "mpeg2video", options={"g": "12", "bf": "2"}, frames=60),
    "h264 ts": Spec("mpegts", options=x264("keyint=15:bframes=2"), frames=60),
    "mpeg-2 ps": Spec("vob", "mpeg2video", options={"g": "12", "bf": "2"}, frames=60),
    "raw h264": Spec("h264", options=x264("keyint=15:bframes=2"), frames=60),
    "raw hevc": Spec("hevc", "libx265", options=HEVC, frames=40),
    "open gop": Spec(options=x264("open-gop=1:keyint=15:min-keyint=15:bframes=3"), frames=90),
    "open gop hevc": Spec(
        codec="libx265",
        options={"x265-params": "log-level=none:open-gop=1:keyint=15:bframes=3:pools=1"},
        frames=60,
    ),
    "intra refresh": Spec(options=x264("intra-refresh=1:keyint=20:bframes=0"), frames=90),
    "false keys": Spec("mov", "mpeg4", options={"g": "20"}, frames=60, all_keys=True),
    "ffv1 mkv": Spec("matroska", "ffv1", frames=20),
    "flv": Spec("flv", options=x264("keyint=15"), frames=40),
}


@dataclass(frozen=True)
class FrameCase:
    """Frames made from numbers, which need no decoder, and how they are sampled.

    Attributes:
        frames: How many.
        source_fps: Of these a second.
        size: Width and height in pixels.
        fps: Frames to take a second; None is the checkpoint's.
        max_frames: At most so many; None likewise.
    """

    frames: int
    source_fps: float
    size: tuple[int, int] = (64, 48)
    fps: float | None = None
    max_frames: int | None = None

    def pictures(self) -> list[np.ndarray]:
        """The frames (H, W, 3)."""
        return [moving(number, self.size) for number in range(self.frames)]


FRAME_CASES = [
    FrameCase(3, 10.0),
    FrameCase(1, 25.0, (5, 4)),
    FrameCase(150, 30000 / 1001),
    FrameCase(90, 30.0, (46, 80)),
    FrameCase(40, 7.5, (333, 217)),
    FrameCase(300, 60.0, (48, 27), fps=2),
    FrameCase(700, 10.0, (32, 24)),
    FrameCase(1800, 10.0, (16, 12), max_frames=8),
    FrameCase(240, 24.0, (24, 32), fps=0.5, max_frames=64),
    FrameCase(100, 12.5, (700, 20), fps=30, max_frames=3),
]


def sound(container, with_cover=False):
    """The bytes of a file with a tone of 0.2 s, and with a cover."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        codec = {"mp3": "libmp3lame", "adts": "aac", "wav": "pcm_s16le"}[container]
        stream = output.add_stream(codec, rate=44100)
        stream.layout = "mono"
        cover = output.add_stream("mjpeg", rate=1) if with_cover else None
        if cover is not None:
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            pixels = av.VideoFrame.from_ndarray(moving(1, (32, 32)), format="rgb24")
            pixels.pts = 0
            packets = [*cover.encode(pixels), *cover.encode(None)]
            output.start_encoding()
            output.mux(packets)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8820), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()
