"""The bundled demo checkpoint answers questions about pictures that it never saw."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm.train.draw import render
from mlx_smolvlm.train.evaluate import answers, by_family, held_out
from mlx_smolvlm.train.examples import PICTURES, asked, example

FOLDER = Path(mlx_smolvlm.__file__).parent / "demo"
EXAMPLES = Path(__file__).parents[1] / "examples"
BARS = {"what": 0.5, "color": 0.9, "count": 0.7, "where": 0.8}  # below train/README.md's


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


@pytest.mark.parametrize("picture", PICTURES)
def test_examples_are_answered(demo: mlx_smolvlm.SmolVLM, picture: str) -> None:
    drawn = Image.open(EXAMPLES / picture)
    assert np.array_equal(np.asarray(drawn), np.asarray(render(example(picture))))
    listed = (EXAMPLES / "README.md").read_text().partition(f"## {picture}")[2].partition("##")[0]
    for turn in asked(example(picture)):
        assert f"| {turn.question} | {turn.answer} |" in listed
        assert demo.ask(turn.question, images=[EXAMPLES / picture]).text == turn.answer


def test_text_alone(demo: mlx_smolvlm.SmolVLM) -> None:
    assert demo.ask("Hello").text == "Hello! Show me a picture of colored shapes and ask about it."
    assert demo.ask("What is in this picture?").text == "I see no picture here. Please add one."
