"""The clips and the lines of benchmarks/video.py, and the memory that they watch over."""

import gc
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.video.frame import PictureType, VideoFrame

import mlx_smolvlm as smolvlm
from benchmarks import video as bench
from benchmarks import video_clips
from mlx_smolvlm import Sampling, Video
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.convert.hub import ResolveOptions, resolve
from mlx_smolvlm.media.video import open_video

SIZE = (64, 48)


def packets(path: Path) -> list[tuple[int, bool]]:
    """Time in frames, and whether it is a keyframe, of each packet in the order shown."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        unit = stream.time_base * Fraction(30)
        found = [(p.pts * unit, p.is_keyframe) for p in container.demux(stream) if p.size]
    return sorted((int(time), key) for time, key in found if time.denominator == 1)


def test_clip_has_its_frames_and_keyframes(tmp_path: Path) -> None:
    path = video_clips.make_clip(tmp_path, 2, 25, SIZE)
    assert packets(path) == [(i, i in (0, 25, 50)) for i in range(60)]
    with av.open(str(path)) as container:
        kinds = {PictureType(frame.pict_type).name for frame in container.decode(video=0)}
    assert kinds == {"I", "P", "B"}  # B-frames as cameras' and most files have them
    made = path.stat().st_mtime_ns
    assert video_clips.make_clip(tmp_path, 2, 25, SIZE).stat().st_mtime_ns == made


def test_long_clip_repeats_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_clips, "MINUTE", 1)
    path = video_clips.make_clip(tmp_path, 3, 25, SIZE)
    assert packets(path) == [(i, i % 30 in (0, 25)) for i in range(90)]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert (frames[7] == frames[67]).all()
    assert (frames[7] != frames[8]).any()
    monkeypatch.setattr(video_clips, "MINUTE", 2)
    with pytest.raises(ValueError, match="multiple"):
        video_clips.make_clip(tmp_path, 5, 25, SIZE)


def frames_alive() -> int:
    """How many decoded frames Python holds."""
    return sum(type(one) is VideoFrame for one in gc.get_objects())


def test_frames_are_let_go_without_the_garbage_collector(tmp_path: Path) -> None:
    path = video_clips.make_clip(tmp_path, 4, 25, SIZE)
    config = read_config(resolve("demo", ResolveOptions()))
    clip = open_video(Video(path, fps=30, max_frames=120), config)
    gc.collect()
    gc.disable()
    try:
        others = frames_alive()
        held = [frames_alive() - others for _ in clip.read_frames()]
    finally:
        gc.enable()
    assert len(held) == 120
    assert max(held) < 60  # the decoder's last are as many as it has threads


def test_measured_line(tmp_path: Path) -> None:
    path = video_clips.make_clip(tmp_path, 2, 25, SIZE)
    rows = [bench.measure(path, 2, frames, "demo", media=True) for frames in (3, 5)]
    assert [(row["frames"], row["tiles"]) for row in rows] == [(3, 3), (5, 5)]
    row = bench.measure(path, 2, 4, "demo", media=False)
    assert (row["frames"], row["tiles"]) == (4, 4)
    vlm = smolvlm.load("demo")
    reply = vlm.ask(
        "What happens here?",
        videos=[Video(path, fps=2, max_frames=4)],
        sampling=Sampling(max_tokens=1),
    )
    assert row["tokens"] == reply.prompt_tokens
    parts = ("index_s", "decode_s", "resize_s", "encode_s", "prefill_s")
    assert sum(row[part] for part in parts) <= row["total_s"]
    assert all(name in row for name in bench.COLUMNS)
    assert len(bench.format_row(row)) >= len(bench.format_row(row, heading=True))


def test_each_length_is_compared_with_the_shortest_of_as_many_frames() -> None:
    rows = [
        {"frames": frames, "seconds": seconds, "peak_mb": frames + seconds, "total_s": seconds}
        for frames in (10, 64)
        for seconds in (10, 60)
    ]
    assert bench.compare_with_shortest(rows) == [
        {
            "frames": frames,
            "seconds": 60,
            "shortest_seconds": 10,
            "more_peak_mb": 50,
            "times_as_long": 6,
        }
        for frames in (10, 64)
    ]
