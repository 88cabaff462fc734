"""Training on videos and on mixtures: the tokens of `ask`, the frames' pixels, and exact resume."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.media.video import Video
from mlx_smolvlm.smolvlm import SmolVLM, load
from mlx_smolvlm.train.batches import (
    BatchLoader,
    EmbeddingCache,
    MediaOptions,
    build_row,
    measure_media,
    open_media,
)
from mlx_smolvlm.train.dataset import Example, read_dataset
from mlx_smolvlm.train.finetune import Tuning
from mlx_smolvlm.train.settings import read_settings
from tests.helpers import tuning_cases as cases

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a dataset of clips in data, one of them with a picture before it."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("left.mp4", "up.mp4", "three.png"):
        shutil.copyfile(EXAMPLES / name, data / name)
    lines = []
    for video, way in (("left.mp4", "left"), ("up.mp4", "up")):
        shown = [{"type": "video"}, {"type": "text", "text": "Which way?"}]
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": shown},
                    {"role": "assistant", "content": f"It moves {way}."},
                    {"role": "user", "content": "Sure?"},
                    {"role": "assistant", "content": "Yes."},
                ],
                "videos": [video],
            }
        )
    both = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Both?"}]
    lines.append(
        {
            "messages": [
                {"role": "user", "content": both},
                {"role": "assistant", "content": "No."},
            ],
            "images": ["three.png"],
            "videos": ["up.mp4"],
        }
    )
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (data / "valid.jsonl").write_text(json.dumps(lines[0]) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "media_options", [MediaOptions(), MediaOptions(detail="low", max_frames=2)]
)
def test_training_sees_the_tokens_and_frames_that_ask_sees(
    tiny_video: SmolVLM, work: Path, media_options: MediaOptions
) -> None:
    for example in read_dataset(work / "data"):
        media = open_media(tiny_video, example, media_options)
        row = build_row(tiny_video.engine.prompt_builder, example, media)
        known = build_row(
            tiny_video.engine.prompt_builder,
            example,
            measure_media(tiny_video, example, media_options),
        )
        assert np.array_equal(row.ids, known.ids)
        assert np.array_equal(row.is_target, known.is_target)
        reply = tiny_video.ask(
            example.prompt,
            images=[str(path) for path in example.images],
            videos=[Video(path, max_frames=media_options.max_frames) for path in example.videos],
            detail=media_options.detail,
            sampling=Sampling(max_tokens=1),
        )
        prompt = tiny_video.engine.make_prompt(example.prompt, media).input_ids
        assert reply.prompt_tokens == prompt.size
        assert np.array_equal(row.ids[: prompt.size], prompt)
        answers = [m["content"][0]["text"] for m in example.messages if m["role"] == "assistant"]
        said = tiny_video.engine.prompt_builder.tokenizer.decode(row.ids[row.is_target].tolist())
        assert said == "".join(f" {answer}" for answer in answers)


def test_the_features_of_a_batch_are_those_of_its_frames(tiny_video: SmolVLM, work: Path) -> None:
    examples = read_dataset(work / "data")
    loader = BatchLoader(
        tiny_video, lambda number: examples, 1, MediaOptions(), EmbeddingCache(tiny_video)
    )
    batch = loader.load_batch(0)
    loader.close()
    assert batch.image_embeds is not None
    places = batch.input_ids == tiny_video.config.image_token_id
    assert places.sum() == batch.image_embeds.shape[0] * tiny_video.config.image_seq_len
    expected, counts = [], []
    for example in examples:
        media = open_media(tiny_video, example, MediaOptions())
        tiles = [np.stack([t for _, t in m.make_tiles(tiny_video.config)]) for m in media]
        expected += [tiny_video.model.encode(mx.array(pixels)) for pixels in tiles]
        counts.append(sum(map(len, tiles)) * tiny_video.config.image_seq_len)
    assert places.sum(1).tolist() == counts
    assert mx.allclose(batch.image_embeds, mx.concatenate(expected), atol=1e-5)


def test_a_training_on_clips_learns_and_goes_on_where_it_stopped(
    tiny_video_folder: Path, work: Path
) -> None:
    weights = {}
    for out, stops in (("whole", (None,)), ("parts", (2, None))):
        for stop in stops:
            settings = read_settings(cases.write_config(work, tiny_video_folder, steps=5))
            tuning = Tuning(settings, work / out)
            losses = []
            for event in tuning.run():
                if event.report is not None:
                    losses.append(event.report.loss)
                    if event.report.step == stop:
                        break
            tuning.close()
        if out == "whole":
            assert losses[-1] < 0.8 * losses[0]
        weights[out] = (work / out / "adapter" / "adapters.safetensors").read_bytes()
    assert weights["whole"] == weights["parts"]
    reply = load(tiny_video_folder, adapter=work / "whole" / "adapter").ask(
        "Which way?", videos=[work / "data" / "left.mp4"], sampling=Sampling(max_tokens=3)
    )
    assert reply.generation_tokens


def test_pictures_and_videos_in_another_order_are_not_mixed_up(
    tiny_video: SmolVLM, work: Path
) -> None:
    """Two lines of the same files, whose embeddings are kept."""
    picture, video = {"type": "image"}, {"type": "video"}
    lines = [
        {
            "messages": [
                {"role": "user", "content": [*items, {"type": "text", "text": "Both?"}]},
                {"role": "assistant", "content": "No."},
            ],
            "images": ["three.png"],
            "videos": ["up.mp4"],
        }
        for items in ([picture, video], [video, picture])
    ]
    (work / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples, media_options = read_dataset(work / "data"), MediaOptions("low", max_frames=2)

    def embeds(shown: list[Example]) -> list[np.ndarray]:
        loader = BatchLoader(
            tiny_video,
            lambda number: [shown[number]],
            len(shown),
            media_options,
            EmbeddingCache(tiny_video),
        )
        found = [np.array(loader.load_batch(number).image_embeds) for number in range(len(shown))]
        loader.close()
        return found

    first, second = embeds(examples)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, embeds(examples[:1])[0])
    assert np.array_equal(second, embeds(examples[1:])[0])
