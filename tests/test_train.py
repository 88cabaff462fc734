"""The demo's training: pictures true to their labels, a sound tokenizer, learning, resuming."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_smolvlm
from mlx_smolvlm import text, vision
from mlx_smolvlm.model import Model
from mlx_smolvlm.prompt import PromptBuilder
from mlx_smolvlm.train import questions
from mlx_smolvlm.train.batches import _conversation, batch, encoder_batch
from mlx_smolvlm.train.demo import CHAT_TEMPLATE, Run, Stage, start
from mlx_smolvlm.train.draw import COLORS, Scene, Shape, index_map, render, sample_scene
from mlx_smolvlm.train.encoder import patch_labels
from mlx_smolvlm.train.fast import fast_gelu, fast_swiglu
from mlx_smolvlm.train.grounding import hidden_states, referents, word_table
from mlx_smolvlm.train.questions import Turn
from mlx_smolvlm.train.shapes import demo_config
from mlx_smolvlm.train.tokenizer import FIRST_TOKENS, LAST_TOKENS, build_tokenizer

DEMO = Path(mlx_smolvlm.__file__).parent / "demo"
STAGES = (
    Stage("encoder", steps=3, size=4, rate=0.01),
    Stage("single", steps=3, size=3, rate=0.01),
    Stage("tiled", steps=2, size=2, rate=0.005, tiled=1.0),
)
CLIP_STAGES = (
    Stage("heads", steps=1, size=1, rate=0.01, frames=2, heads_only=True),
    Stage("clips", steps=2, size=1, rate=0.01, frames=2),
)


def scenes(count: int) -> list[Scene]:
    """Scenes of a few seeds."""
    return [sample_scene(np.random.default_rng(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """The demo's prompts, with pictures cut into tiles at full detail."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = build_tokenizer()
    tokenizer.save(str(path))
    config = demo_config(tokenizer)
    tiled = dataclasses.replace(config, image=dataclasses.replace(config.image, longest_edge=128))
    return PromptBuilder(path, CHAT_TEMPLATE, tiled)


def test_scene_and_picture_follow_from_the_seed() -> None:
    first, second, other = (sample_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == second != other
    assert render(first).tobytes() == render(second).tobytes()
    assert render(first).size == (first.width, first.height)


def nearest_color(rgb: np.ndarray) -> str:
    """The name of the colour with the anchor nearest to `rgb`."""
    return min(
        COLORS, key=lambda name: min(np.abs(np.subtract(rgb, a)).sum() for a in COLORS[name])
    )


def test_pixels_have_the_colors_of_the_labels() -> None:
    for scene in scenes(60):
        pixels = np.asarray(render(scene), float)
        for shape in scene.shapes:
            middle = pixels[int(shape.y), int(shape.x)]
            assert np.abs(middle - shape.rgb).max() <= 1, (scene, shape)
        assert np.abs(pixels[0, 0] - scene.background_rgb).max() <= 1
        assert scene.background not in [shape.color for shape in scene.shapes]


def test_colors_bear_their_names() -> None:
    drawn = [shape for scene in scenes(200) for shape in scene.shapes]
    named = [nearest_color(np.array(shape.rgb)) == shape.color for shape in drawn]
    assert np.mean(named) > 0.97


def test_places_are_the_cells_that_the_pixels_lie_in() -> None:
    for scene in scenes(60):
        shown = index_map(scene, 90)
        for i, shape in enumerate(scene.shapes):
            rows, cols = np.nonzero(shown == i + 1)
            middle = (rows.min() + rows.max()) / 2, (cols.min() + cols.max()) / 2
            assert shape.cell == 3 * int(middle[0] // 30) + int(middle[1] // 30)


def test_shapes_are_told_apart_by_the_share_of_their_box_that_they_fill() -> None:
    fill: dict[str, float] = {}
    for kind in ("circle", "square", "triangle", "star", "diamond", "cross"):
        shape = Shape(kind, "red", (255, 0, 0), 50, 50, 40, 0.0, False, 4)
        shown = index_map(Scene(100, 100, "white", (255, 255, 255), (shape,), False), 200) > 0
        rows, cols = np.nonzero(shown)
        fill[kind] = float(shown.sum() / (np.ptp(rows) + 1) / (np.ptp(cols) + 1))
    expected = {"circle": 0.785, "square": 1, "triangle": 0.5, "diamond": 0.5, "cross": 0.53}
    for kind, share in expected.items():
        assert fill[kind] == pytest.approx(share, abs=0.03)
    assert fill["star"] < 0.4


def test_patch_labels_mark_each_shape_once_per_centre() -> None:
    config = demo_config(build_tokenizer()).vision
    for scene in scenes(20):
        for tiles in (1, 2):
            labels = patch_labels(scene, config, tiles)
            assert labels.shape == (tiles**2, 64, 5)
            assert labels[..., 2].sum() == len(scene.shapes)
        assert set(labels[..., 0][labels[..., 2] == 1]) <= set(range(1, 7))


def scene_of(*shapes: tuple[str, str, int]) -> Scene:
    """A scene of (colour, kind, cell)."""
    made = [Shape(k, c, (0, 0, 0), 10, 10, 5, 0.0, False, cell) for c, k, cell in shapes]
    return Scene(96, 96, "gray", (128, 128, 128), tuple(made), False)


def test_answers_in_words() -> None:
    scene = scene_of(("red", "cross", 0), ("orange", "star", 4), ("red", "cross", 8))
    assert questions.contents(scene) == "Two red crosses and an orange star."
    assert questions.description(scene) == (
        "A red cross at the top left, an orange star in the center and a red cross at the bottom "
        "right, on a gray background."
    )
    assert questions.contents(scene_of()) == "Nothing."


Maker = Callable[[Scene, np.random.Generator], Turn]


def all_answers(maker: Maker, scene: Scene) -> dict[str, str]:
    """Answer to each question that `maker` asks about `scene`."""
    turns = [maker(scene, np.random.default_rng(seed)) for seed in range(3000)]
    answers = {turn.question: turn.answer for turn in turns}
    assert all(answers[turn.question] == turn.answer for turn in turns)
    return answers


def test_answers_are_true() -> None:
    scene = scene_of(("red", "circle", 0), ("blue", "circle", 2), ("red", "star", 7))
    counts = all_answers(questions.count, scene)
    assert counts["How many circles are there?"] == "2."
    assert counts["How many red shapes are there?"] == "2."
    assert counts["Count the shapes."] == "3."
    assert counts["How many squares are there?"] == "0."
    places = all_answers(questions.where, scene)
    assert places["Where is the star?"] == "At the bottom."
    assert places["Where is the blue shape?"] == "At the top right."
    assert places["Where is the cross?"] == "There is no cross."
    assert "Where is the circle?" not in places
    colors = all_answers(questions.color, scene)
    assert colors["What color is the star?"] == "Red."
    assert "What color is the circle?" not in colors
    exists = all_answers(questions.exists, scene)
    assert exists["Is there a blue circle?"] == "Yes."
    assert exists["Is there a blue star?"] == "No."
    assert all_answers(questions.at, scene)["What is on the left?"] == "Nothing."
    assert all_answers(questions.background, scene)["What color is the background?"] == "Gray."


def test_a_picture_of_every_kind_can_be_asked_about() -> None:
    kinds = ("circle", "square", "triangle", "star", "diamond", "cross")
    scene = scene_of(*(("red", kind, cell) for cell, kind in enumerate(kinds)))
    for maker in (questions.color, questions.where):
        assert "There is no" not in "".join(all_answers(maker, scene).values())


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = build_tokenizer()
    for sample in (
        "What color is the circle?",
        "Zażółć \U0001f600\U0001f469‍\U0001f680 \x00 42",
        " a\n\n b\t",
    ):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_tokenizer_is_reproducible_and_has_the_special_tokens() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.to_str() == build_tokenizer().to_str()
    assert [tokenizer.token_to_id(token) for token in FIRST_TOKENS] == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    assert size == 640
    assert [tokenizer.token_to_id(t) for t in LAST_TOKENS] == list(
        range(size - len(LAST_TOKENS), size)
    )
    assert tokenizer.encode("\n\n<image>").tokens == ["ĊĊ", "<image>"]
    assert len(tokenizer.encode("12").ids) == 2


def test_conversations_are_tokenized_as_prompts_are(builder: PromptBuilder) -> None:
    rng = np.random.default_rng(3)
    scene = sample_scene(rng)
    turns = questions.ask(scene, rng, 3)
    from mlx_smolvlm.image import tiles

    for detail in ("high", "low"):
        grid = tiles(render(scene), builder.config, detail).grid
        messages = []
        for number, turn in enumerate(turns):
            asked = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": asked})
            answer = [{"type": "text", "text": turn.answer}]
            messages.append({"role": "assistant", "content": answer})
        ids, weights = _conversation(builder, turns, grid, np.random.default_rng(0))
        built = builder.build(messages, [grid], add_generation_prompt=False)
        assert [*ids, *builder.tokenizer.encode("\n").ids] == built.tolist()
        learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
        answers = builder.tokenizer.decode(learned, skip_special_tokens=False)
        assert answers == "".join(f" {turn.answer}<end_of_utterance>" for turn in turns)


def test_batch_targets_are_the_tokens_after_their_places(builder: PromptBuilder) -> None:
    made = batch(1, builder, 4, "high")
    assert (made.input_ids.reshape(-1)[made.places + 1] == made.targets).all()
    assert made.weights.sum() == pytest.approx(1)
    images = (made.input_ids == builder.config.image_token_id).sum()
    assert images == 16 * len(made.tile_order)
    assert set(made.tile_order) == set(range(len(made.pixel_values)))


def test_words_refer_to_the_shapes_that_they_name() -> None:
    tokenizer = build_tokenizer()
    scene = scene_of(("red", "circle", 0), ("blue", "circle", 2), ("red", "star", 7))
    ids = tokenizer.encode("Is a red circle, a red shape, a star, a cross or a blue there?").ids
    found = [what for _, *what in referents(scene, ids, word_table(tokenizer))]
    red_circle, star, blue_circle = [1, 0, 0, 0], [1, 3, 0, 7], [1, 0, 4, 2]
    reds, none = [2, -1, -1, -1], [0, -1, -1, -1]
    assert found == [reds, red_circle, reds, reds, star, none, blue_circle]


def test_hidden_states_end_as_the_model_ends(builder: PromptBuilder) -> None:
    text_model = Model(builder.config).text_model
    embeds = mx.random.normal((2, 7, builder.config.text.hidden_size))
    assert mx.array_equal(hidden_states(text_model, embeds)[1], text_model(embeds))


def test_fast_curves_are_close_and_have_their_slopes() -> None:
    x, up = mx.linspace(-8, 8, 1001), mx.linspace(1, 2, 1001)
    assert mx.abs(fast_gelu(x) - vision.gelu_tanh(x)).max() < 3e-4
    assert mx.abs(fast_swiglu(x, up) - text.swiglu(x, up)).max() < 2e-3
    for fast, exact in ((fast_gelu, vision.gelu_tanh),):
        slopes = [mx.grad(lambda v, f=f: f(v).sum())(x) for f in (fast, exact)]  # type: ignore[misc]
        assert mx.abs(slopes[0] - slopes[1]).max() < 5e-3
    pairs = [
        mx.grad(lambda g, u, f=f: f(g, u).sum(), (0, 1))(x, up) for f in (fast_swiglu, text.swiglu)
    ]  # type: ignore[misc]
    for a, b in zip(*pairs, strict=True):
        assert mx.abs(a - b).max() < 5e-3


def weights_of(run: Run) -> dict[str, mx.array]:
    """All parameters by name."""
    return dict(tree_flatten(run.trainee.parameters()))


def test_steps_lower_the_loss(tmp_path: Path) -> None:
    for first in (0, 1):
        run = start(tmp_path / str(first), 0, STAGES[first : first + 1])
        same = run.data()
        run.data = lambda same=same: same  # type: ignore[method-assign, misc]
        before, _, after = run.advance(), run.advance(), run.advance()
        assert after < before


def test_encoder_batches_follow_from_the_seed(builder: PromptBuilder) -> None:
    first, second = (encoder_batch(4, builder.config, 3) for _ in range(2))
    assert (first.pixel_values == second.pixel_values).all()
    assert not np.array_equal(first.pixel_values, encoder_batch(5, builder.config, 3).pixel_values)


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 0, CLIP_STAGES)
    run.take_weights(DEMO)
    stored = mx.load(str(DEMO / "model.safetensors"))
    assert isinstance(stored, dict)

    def kept() -> list[bool]:
        model = dict(tree_flatten(run.trainee.model.parameters()))
        assert set(model) == set(stored)
        return [bool(mx.array_equal(model[name], stored[name])) for name in stored]

    assert all(kept())
    run.advance()  # the heads alone
    assert all(kept())
    run.advance()
    assert not any(kept())


@pytest.mark.parametrize(
    ("stages", "stop", "steps"), [(STAGES, 2, 6), (STAGES, 4, 6), (CLIP_STAGES, 2, 3)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, stages: tuple[Stage, ...], stop: int, steps: int
) -> None:
    whole = start(tmp_path / "whole", 0, stages)
    losses = [whole.advance() for _ in range(steps)]
    stopped = start(tmp_path / "stopped", 0, stages)
    for _ in range(stop):
        stopped.advance()
    stopped.save(tmp_path / "state.safetensors")
    resumed = start(tmp_path / "stopped", 0, stages)
    resumed.restore(tmp_path / "state.safetensors")
    assert [resumed.advance() for _ in range(steps - stop)] == losses[stop:]
    expected = weights_of(whole)
    assert all(mx.array_equal(value, expected[name]) for name, value in weights_of(resumed).items())
