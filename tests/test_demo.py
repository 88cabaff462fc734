"""The bundled demo checkpoint answers questions about pictures and clips that it never saw."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm.train.draw import render
from mlx_smolvlm.train.evaluate import (
    answers,
    by_family,
    clip_answers,
    held_out,
    held_out_clips,
)
from mlx_smolvlm.train.examples import (
    CLIPS,
    PICTURES,
    asked,
    asked_of_clip,
    example,
    example_clip,
)
from mlx_smolvlm.video import open_video

FOLDER = Path(mlx_smolvlm.__file__).parent / "demo"
EXAMPLES = Path(__file__).parents[1] / "examples"
BARS = {"what": 0.5, "color": 0.9, "count": 0.7, "where": 0.8}  # below train/README.md's
CLIP_BARS = {"direction": 0.93, "moves": 0.93, "mover": 0.8, "ends": 0.75}  # likewise


@pytest.fixture(scope="module")
def demo() -> mlx_smolvlm.SmolVLM:
    """The demo, computing in float32."""
    return mlx_smolvlm.load("demo", dtype="float32")


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) <= 8_000_000


def test_weights_are_float16_and_finite() -> None:
    weights = mx.load(str(FOLDER / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {value.dtype for value in weights.values()} == {mx.float16}
    assert all(bool(mx.isfinite(value).all()) for value in weights.values())


def test_held_out_answers(demo: mlx_smolvlm.SmolVLM) -> None:
    wanted = ((scene, turn) for scene, turn in held_out(40) if turn.family in BARS)
    families = by_family(list(answers(demo, wanted)))
    assert Counter(families.keys()) == Counter(BARS.keys())
    for family, (right, number) in families.items():
        assert right / number >= BARS[family], families


def test_held_out_answers_about_clips(demo: mlx_smolvlm.SmolVLM) -> None:
    wanted = (
        (clip, [turn for turn in turns if turn.family in CLIP_BARS])
        for clip, turns in held_out_clips(40)
    )
    families = by_family(list(clip_answers(demo, wanted)))
    assert Counter(families.keys()) == Counter(CLIP_BARS.keys())
    for family, (right, number) in families.items():
        assert right / number >= CLIP_BARS[family], families


def listed_under(name: str) -> str:
    """What examples/README.md says under the heading `name`."""
    return (EXAMPLES / "README.md").read_text().partition(f"## {name}")[2].partition("##")[0]


@pytest.mark.parametrize("picture", PICTURES)
def test_examples_are_answered(demo: mlx_smolvlm.SmolVLM, picture: str) -> None:
    drawn = Image.open(EXAMPLES / picture)
    assert np.array_equal(np.asarray(drawn), np.asarray(render(example(picture))))
    for turn in asked(example(picture)):
        assert f"| {turn.question} | {turn.answer} |" in listed_under(picture)
        assert demo.ask(turn.question, images=[EXAMPLES / picture]).text == turn.answer


@pytest.mark.parametrize("name", CLIPS)
def test_example_clips_are_answered(demo: mlx_smolvlm.SmolVLM, name: str) -> None:
    path = EXAMPLES / name  # its bytes depend on the encoder's version, so they are not compared
    assert path.stat().st_size < 60_000
    opened, clip = open_video(path, demo.config), example_clip(name)
    assert (opened.num_frames, opened.fps) == (clip.frames, clip.fps)
    assert 2 <= opened.duration_s <= 6
    for turn in asked_of_clip(clip):
        assert f"| {turn.question} | {turn.answer} |" in listed_under(name)
        assert demo.ask(turn.question, videos=[path]).text == turn.answer


def test_text_alone(demo: mlx_smolvlm.SmolVLM) -> None:
    assert demo.ask("Hello").text == "Hello! Show me a picture of colored shapes and ask about it."
    assert demo.ask("What is in this picture?").text == "I see no picture here. Please add one."
