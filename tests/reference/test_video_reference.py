"""Videos against transformers' SmolVLM processor: frames chosen, times, pixels, prompts."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata

from mlx_smolvlm.config import VideoConfig
from mlx_smolvlm.convert.hf_processor import read_processors, read_video_config
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.media.tiles import Grid, tile_frame
from mlx_smolvlm.media.timeline import sample_indices
from mlx_smolvlm.media.video import Video, open_video
from mlx_smolvlm.prompt.builder import PromptBuilder
from tests.helpers import media_cases as cases
from tests.helpers import oracle
from tests.helpers import video_cases as clips
from tests.helpers import video_oracle as videos

PIXELS = 1e-5
NAMES = ["SmolVLM2-256M-Video-Instruct", "SmolVLM2-500M-Video-Instruct", "SmolVLM2-2.2B-Instruct"]

pytestmark = pytest.mark.skipif(
    not (oracle.REFERENCE / "checkpoints").is_dir(),
    reason="the published checkpoint files are not here; set SMOLVLM_REFERENCE",
)


class PublishedFiles(Source):
    """A folder of a checkpoint's settings, which lacks the config.json that a `Source` needs."""

    def __post_init__(self):
        pass


class Pair:
    """A published checkpoint's processing, ours and transformers'."""

    def __init__(self, name):
        folder = oracle.REFERENCE / "checkpoints" / name
        _, seq_len, image_token_id, vocab_size, _ = oracle.CHECKPOINTS[name]
        side, patch, scale = {64: (512, 16, 4), 81: (384, 14, 3)}[seq_len]
        config = cases.config(
            tile=side, patch=patch, scale=scale, image_token_id=image_token_id,
            vocab_size=vocab_size,
        )  # fmt: skip
        published = read_processors(PublishedFiles(folder, name))
        self.config = replace(config, video=read_video_config(*published))
        assert self.config.image_seq_len == seq_len
        self.builder = PromptBuilder(
            oracle.tokenizer_json(name), oracle.chat_template(name), self.config
        )
        tokenizer = oracle.Oracle(name).tokenizer
        self.theirs = videos.VideoOracle(folder, tokenizer, seq_len, **oracle.SMALL)

    def pixels(self, clip):
        edge = self.config.video.longest_edge
        return [tile_frame(frame.picture, edge, self.config)[0] for frame in clip.read_frames()]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return Pair(request.param)


@pytest.fixture(scope="module", params=[NAMES[0], NAMES[2]], ids=["512 px", "384 px"])
def tile_pair(request):
    return Pair(request.param)


def animated(durations):
    """A GIF of frames that are shown for these milliseconds."""
    pictures = [Image.fromarray(clips.moving(n, (60, 44))) for n in range(len(durations))]
    file = io.BytesIO()
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    return file.getvalue()


def file_of(name, folder):
    path = folder / f"clip.{name.split()[-1]}"
    path.write_bytes(animated([100] * 40) if name == "gif" else clips.data(name))
    return path


def upright(name, indices):
    """All frames of a file, for transformers where it cannot read the file as it is."""
    return np.stack([np.asarray(frame) for frame in clips.decoded(clips.data(name))])


def compare(pair, clip, theirs):
    """Indices, times, pixels and prompt of a clip."""
    (metadata,) = theirs["video_metadata"]
    assert list(clip.indices) == list(metadata.frames_indices)
    assert list(clip.timestamps_s) == metadata.timestamps
    assert clip.duration_s == metadata.duration
    pixel_values = theirs["pixel_values"][0].permute(0, 2, 3, 1).numpy()
    ours = pair.pixels(clip)
    assert len(ours) == len(pixel_values)
    for one, other in zip(ours, pixel_values, strict=True):
        assert np.abs(one - other).max() <= PIXELS
    assert pair.builder.build(ASKED, [], clips=[clip]).tolist() == ids_of(theirs)


def ids_of(theirs):
    return theirs["input_ids"][0].tolist()


VIDEO = {"type": "video"}
ASKED = [cases.user(VIDEO, "What happens?")]

# Files that transformers reads with PyAV as they are
READABLE = [
    "h264 mp4", "0.3 s", "one frame", "b frames", "ntsc", "60 fps portrait", "odd size", "3 min",
    "hevc mp4", "vp9 mp4", "av1 mp4", "mpeg-4 avi", "mjpeg mov", "open gop", "gif",
]  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_files(tile_pair, name, tmp_path):
    path = file_of(name, tmp_path)
    compare(tile_pair, open_video(path, tile_pair.config), tile_pair.theirs(ASKED, [str(path)]))


@pytest.mark.parametrize(
    ("name", "fps", "max_frames"),
    [
        ("ntsc", 2, 64),
        ("ntsc", 0.5, 64),
        ("b frames", 30, 7),
        ("3 min", 1, 8),
        ("3 min", 0.1, 9),
        ("60 fps portrait", 100, 9),
        ("h264 mp4", 1, 1),
    ],
)
def test_other_sampling(tile_pair, name, fps, max_frames, tmp_path):
    path = file_of(name, tmp_path)
    clip = open_video(Video(path, fps=fps, max_frames=max_frames), tile_pair.config)
    theirs = tile_pair.theirs(ASKED, [str(path)], fps=fps, num_frames=max_frames)
    compare(tile_pair, clip, theirs)


@pytest.mark.parametrize(("fps", "max_frames"), [(1, 64), (3, 5)])
def test_uneven_frames_have_the_times_that_are_stored(tile_pair, fps, max_frames, tmp_path):
    """transformers spreads them by the mean rate; everything else is as there."""
    path = file_of("vfr", tmp_path)
    clip = open_video(Video(path, fps=fps, max_frames=max_frames), tile_pair.config)
    theirs = tile_pair.theirs(ASKED, [str(path)], fps=fps, num_frames=max_frames)
    (metadata,) = theirs["video_metadata"]
    with av.open(path) as container:
        frames = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    times = [time - frames[0][0] for time, _ in frames]
    assert list(clip.timestamps_s) == pytest.approx([times[i] for i in clip.indices], abs=1e-6)
    assert clip.num_frames == metadata.total_num_frames == len(times)
    assert len(clip.indices) == len(metadata.frames_indices)
    assert list(clip.indices) != list(metadata.frames_indices)
    strayed = [abs(times[i] - i / metadata.fps) for i in metadata.frames_indices]
    assert max(strayed) > 0.5
    shown = [frame.picture for frame in clip.read_frames()]
    assert clips.same(shown, [frames[i][1] for i in clip.indices])


# transformers takes the header's count of frames, which these files do not have
UNCOUNTED = [
    "hevc mkv", "vp9 webm", "vp8 webm", "av1 webm", "fragmented", "mpeg-2 ts", "h264 ts",
    "raw h264", "flv",
]  # fmt: skip


@pytest.mark.parametrize("name", UNCOUNTED)
def test_files_without_a_count_of_frames(tile_pair, name, tmp_path):
    path = file_of(name, tmp_path)
    clip = open_video(path, tile_pair.config)
    whole, rate = upright(name, clip.indices), float(clips.SPECS[name].rate)
    known = {"total_num_frames": len(whole), "fps": rate, "duration": len(whole) / rate}
    compare(tile_pair, clip, tile_pair.theirs(ASKED, [whole], metadata=[known]))


@pytest.mark.parametrize("turn", ["ROTATE_90", "FLIP_LEFT_RIGHT"])
def test_frames_in_another_orientation(tile_pair, turn):
    """transformers leaves frames as they lie; it is given those that are shown."""
    stored = clips.decoded(clips.data("ntsc"))
    shown = [frame.transpose(getattr(Image.Transpose, turn)) for frame in stored]
    matrix = {"ROTATE_90": (0, -1, 1, 0), "FLIP_LEFT_RIGHT": (-1, 0, 0, 1)}[turn]
    turned = clips.with_matrix(clips.data("ntsc"), matrix)
    known = {"total_num_frames": 150, "fps": 30000 / 1001, "duration": 150 * 1001 / 30000}
    theirs = tile_pair.theirs(ASKED, [np.stack(shown)], metadata=[known])
    compare(tile_pair, open_video(turned, tile_pair.config), theirs)


def test_frames_as_a_list(tile_pair):
    frames = [clips.moving(n, (33, 57)) for n in range(47)]
    known = {"total_num_frames": 47, "fps": 7.5, "duration": 47 / 7.5}
    theirs = tile_pair.theirs(ASKED, [np.stack(frames)], metadata=[known])
    compare(tile_pair, open_video(Video(frames, source_fps=7.5), tile_pair.config), theirs)


IMAGE = cases.IMAGE
CONVERSATIONS = [
    ([cases.user(VIDEO, "What?")], "a"),
    ([cases.user(VIDEO)], "a"),
    ([cases.user("What?", VIDEO)], "a"),
    ([cases.user("See", VIDEO, "what happens?")], "b"),
    ([cases.user(IMAGE, VIDEO, "Same?")], "a"),
    ([cases.user(VIDEO, IMAGE, "Same?")], "b"),
    ([cases.user(IMAGE, " then\n", VIDEO, "\n", IMAGE, "Same?")], "a"),
    ([cases.user(VIDEO, VIDEO, "Which is longer?")], "aa"),
    ([cases.user("A:", VIDEO, " B:", VIDEO)], "aA"),
    ([cases.system("Be brief."), cases.user(VIDEO, "What?")], "a"),
    ([cases.user(VIDEO, "What?"), cases.assistant("A cat."), cases.user("Why?")], "b"),
    ([cases.user("Hi"), cases.assistant("Hello."), cases.user(VIDEO, "What?")], "a"),
    ([cases.user(VIDEO, "1"), cases.assistant("2"), cases.user(IMAGE, VIDEO, "3")], "aA"),
]
FILES = {"a": "ntsc", "A": "ntsc", "b": "0.3 s"}


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_prompts(pair, number, tmp_path):
    messages, letters = CONVERSATIONS[number]
    paths = [file_of(FILES[letter], tmp_path) for letter in letters]
    opened = [open_video(path, pair.config) for path in paths]
    images = [Image.new("RGB", (8, 8)) for m in messages for i in m["content"] if i == IMAGE]
    # In these settings a picture of 8 x 8 is 6 x 6 tiles of 8 pixels.
    ids = pair.builder.build(messages, [Grid(6, 6) for _ in images], clips=opened)
    theirs = pair.theirs(messages, [str(path) for path in paths], images)
    assert ids.tolist() == ids_of(theirs)


def test_videos_of_different_length_are_each_told_with_their_own_number(pair, tmp_path):
    """transformers pads them, and says the largest number of frames of each."""
    paths = [file_of(FILES[letter], tmp_path) for letter in "ab"]
    messages = [cases.user(VIDEO, VIDEO, "What?")]
    opened = [open_video(path, pair.config) for path in paths]
    assert [len(clip.indices) for clip in opened] == [5, 1]
    decode = pair.builder.tokenizer.decode
    ours = decode(pair.builder.build(messages, [], clips=opened), skip_special_tokens=False)
    theirs = decode(ids_of(pair.theirs(messages, list(map(str, paths)))), skip_special_tokens=False)
    intro = "following series of {} frames from a 0:00:00"
    assert intro.format("one") in ours
    assert theirs.replace(intro.format("five"), intro.format("one")) == ours


@settings(max_examples=400, deadline=None)
@given(
    total=st.integers(1, 30_000),
    rate=st.one_of(
        st.sampled_from([10.0, 12.5, 23.976, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0]),
        st.floats(0.2, 240),
    ),
    fps=st.one_of(st.sampled_from([1, 2, 0.5]), st.floats(0.01, 60)),
    max_frames=st.integers(1, 300),
    skip=st.sampled_from([0, 1, 2.5]),
)
def test_any_choice_of_frames(sampler, total, rate, fps, max_frames, skip):
    duration = total / rate
    metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=duration)
    theirs = sampler(metadata, num_frames=max_frames, fps=fps, skip_secs=skip).tolist()
    chosen = VideoConfig(fps=fps, max_frames=max_frames, longest_edge=512, skip_secs=skip)
    assert list(sample_indices(total, rate, duration, chosen)) == theirs


@pytest.fixture(scope="module")
def sampler():
    folder = oracle.REFERENCE / "checkpoints" / NAMES[0]
    return videos.SmolVLMVideoProcessor.from_pretrained(folder).sample_frames


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_frames_the_size_of_pictures(name):
    """What SmolVLMVideoProcessor does with these files; once it does not, the page is old."""
    folder = oracle.REFERENCE / "checkpoints" / name
    loaded = videos.SmolVLMVideoProcessor.from_pretrained(folder)
    ours = read_video_config(*read_processors(PublishedFiles(folder, name)))
    assert loaded.size["longest_edge"] == 4 * ours.longest_edge


def test_without_the_stand_in_transformers_cannot_do_this():
    """It is gone when nobody uses it, so that other tests meet transformers as it is."""
    from transformers import image_processing_backends, video_processing_utils

    for module in (image_processing_backends, video_processing_utils):
        assert getattr(module, "tvF", None) is not videos.STAND_IN
    with videos.torchvision():
        assert image_processing_backends.tvF is videos.STAND_IN
