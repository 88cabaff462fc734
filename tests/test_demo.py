"""The bundled demo checkpoint answers questions about pictures and clips that it never saw."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from demo_recipe.clips import Clip
from demo_recipe.evaluate import compute_shares, make_cases
from demo_recipe.examples import CLIPS, PICTURES, format_turn, make_example
from demo_recipe.items import join_parts
from demo_recipe.run import CHAT_TEMPLATE
from demo_recipe.shapes import make_demo_config
from demo_recipe.transcripts import retell
from mlx_smolvlm.media.tiles import Detail
from mlx_smolvlm.media.video import open_video

FOLDER = Path(mlx_smolvlm.__file__).parent / "demo"
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Least share of right answers of a family, by topic, detail and how many are asked: some below the
# card's (demo/README.md). A tile takes half a second on a Linux machine, so most are of one.
BARS: dict[tuple[str, Detail, int], dict[str, float]] = {
    ("shapes", "low", 20): {
        "color": 0.95,
        "count": 0.9,
        "where": 0.95,
        "larger": 0.85,
        "two turns": 0.95,
    },
    ("charts", "low", 20): {"value": 0.85, "bars": 0.85},
    ("objects", "low", 20): {"object": 0.85, "absent": 0.75},
    ("words", "high", 8): {"word": 0.75, "number": 0.75},
    ("pages", "high", 8): {"page title": 0.75},
    ("several", "low", 10): {"several": 0.7},
    ("clips", "low", 10): {"clip: direction": 0.8, "clip: ends": 0.8},
    ("chat", "low", 20): {"chat": 0.95},
}


@pytest.fixture(scope="module")
def demo() -> mlx_smolvlm.SmolVLM:
    """The demo, computing in float32."""
    return mlx_smolvlm.load("demo", dtype="float32")


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) <= 12_000_000


def test_what_is_beside_the_weights_is_the_recipes(demo: mlx_smolvlm.SmolVLM) -> None:
    assert (FOLDER / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    made = make_demo_config(demo.engine.prompt_builder.tokenizer).to_dict()
    assert demo.config.to_dict() == {**made, "dtype": "float16"}


def test_weights_are_float16_and_finite() -> None:
    weights = mx.load(str(FOLDER / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {value.dtype for value in weights.values()} == {mx.float16}
    assert all(bool(mx.isfinite(value).all()) for value in weights.values())


@pytest.mark.parametrize("asked", BARS, ids=lambda asked: asked[0])
def test_held_out_answers(demo: mlx_smolvlm.SmolVLM, asked: tuple[str, Detail, int]) -> None:
    topic, detail, items = asked
    bars = BARS[asked]
    found = compute_shares(demo, make_cases(topic, items, families=bars), detail)
    assert {family: total for family, (_, total) in found.items()} == dict.fromkeys(bars, items)
    for family, (right, total) in found.items():
        assert right / total >= bars[family], found


def listed_under(name: str) -> str:
    """What examples/README.md says under the heading `name`."""
    return (EXAMPLES / "README.md").read_text().partition(f"## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", PICTURES)
def test_examples_are_answered(demo: mlx_smolvlm.SmolVLM, name: str) -> None:
    made = make_example(name)
    drawn = Image.open(EXAMPLES / name)
    assert np.array_equal(np.asarray(drawn), np.asarray(made.shown))
    assert made.turns
    for turn in made.turns:
        assert format_turn(turn) in listed_under(name)
        reply = demo.ask(join_parts(turn.question), images=[EXAMPLES / name])
        assert reply.text == join_parts(turn.answer)


@pytest.mark.parametrize("name", CLIPS)
def test_example_clips_are_answered(demo: mlx_smolvlm.SmolVLM, name: str) -> None:
    path = EXAMPLES / name  # its bytes depend on the encoder's version, so they are not compared
    assert path.stat().st_size < 60_000
    made = make_example(name)
    opened, clip = open_video(path, demo.config), made.shown
    assert isinstance(clip, Clip)
    assert (opened.num_frames, opened.fps) == (clip.frames, clip.fps)
    assert 2 <= opened.duration_s <= 7
    assert made.turns
    for turn in made.turns:
        assert format_turn(turn) in listed_under(name)
        assert demo.ask(join_parts(turn.question), videos=[path]).text == join_parts(turn.answer)


def test_the_readme_shows_what_the_demo_says(demo: mlx_smolvlm.SmolVLM) -> None:
    text = (ROOT / "README.md").read_text()
    inside, typed, lines = False, list[str](), list[str]()
    for line in text.splitlines(keepends=True):
        inside = line == "```console\n" or (inside and line != "```\n")
        is_typed = inside and line.startswith(("$ mlx-smolvlm chat", "> "))
        typed += [line] * is_typed
        if is_typed or not inside or line.startswith(("```", "demo: ")):
            lines.append(line)
    assert len(typed) >= 5
    assert len(lines) <= len(text.splitlines()) - len(typed) + 1  # what was said is left out
    assert retell("".join(lines), demo, ROOT) == text


def test_text_alone(demo: mlx_smolvlm.SmolVLM) -> None:
    assert demo.ask("Hello").text == "Hello! Show me a picture or a short video and ask about it."
    assert demo.ask("What is in this picture?").text == "I see no picture here. Please add one."
