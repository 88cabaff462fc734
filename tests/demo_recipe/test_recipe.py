"""The demo's training: pictures true to their labels, a sound tokenizer, learning, resuming."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from demo_recipe import batches, pages, questions
from demo_recipe import run as run_module
from demo_recipe.batches import Mix, make_encoder_batch
from demo_recipe.draw import (
    COLOR_NAMES,
    COLORS,
    SHAPES,
    Scene,
    Shape,
    compute_area,
    compute_outline,
    render,
    render_index_map,
    sample_scene,
)
from demo_recipe.fast import fast_gelu, fast_swiglu
from demo_recipe.items import Glyph, Turn, join_parts
from demo_recipe.kinds import GLYPHS
from demo_recipe.labels import make_patch_labels, make_token_mask
from demo_recipe.losses import PairedBatch, encoder_loss, normalize_pixels, step_loss
from demo_recipe.optimizer import FlatAdamW, StackedMuon
from demo_recipe.run import STAGES as ALL_STAGES
from demo_recipe.run import Run, Stage, make_batch, save_checkpoint, start
from demo_recipe.shapes import make_demo_config
from demo_recipe.tokenizer import FIRST_TOKENS, LAST_TOKENS, TAGS, build_tokenizer
from demo_recipe.topics import ORDINALS, ask_several, draw_shapes, make_shape_glyphs
from mlx_smolvlm.config import Config
from mlx_smolvlm.convert.hub import DEMO, resolve
from mlx_smolvlm.media.tiles import Grid, tile_picture
from mlx_smolvlm.model import text, vision
from mlx_smolvlm.prompt.builder import PromptBuilder

STAGES = (
    Stage("encoder", steps=3, size=4, rate=0.01),
    Stage("answers", steps=4, rate=0.01, clips=0.5, frames=2),
)


def scenes(count: int) -> list[Scene]:
    """Scenes of a few seeds."""
    return [sample_scene(np.random.default_rng(seed)) for seed in range(count)]


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
        shown = render_index_map(scene, 90)
        for i, shape in enumerate(scene.shapes):
            rows, cols = np.nonzero(shown == i + 1)
            middle = (rows.min() + rows.max()) / 2, (cols.min() + cols.max()) / 2
            assert shape.cell == 3 * int(middle[0] // 30) + int(middle[1] // 30)


def test_shapes_are_told_apart_by_the_share_of_their_box_that_they_fill() -> None:
    fill: dict[str, float] = {}
    for kind in ("circle", "square", "triangle", "star", "diamond", "cross"):
        shape = Shape(kind, "red", (255, 0, 0), 50, 50, 40, 0.0, False, 4)
        shown = (
            render_index_map(Scene(100, 100, "white", (255, 255, 255), (shape,), False), 200) > 0
        )
        rows, cols = np.nonzero(shown)
        fill[kind] = float(shown.sum() / (np.ptp(rows) + 1) / (np.ptp(cols) + 1))
    expected = {"circle": 0.785, "square": 1, "triangle": 0.5, "diamond": 0.5, "cross": 0.53}
    for kind, share in expected.items():
        assert fill[kind] == pytest.approx(share, abs=0.03)
    assert fill["star"] < 0.4


def squares(grid: Grid, side: int) -> list[tuple[float, float, float, float]]:
    """Extents of the squares of a picture's tiles, crops first, `side` x `side` a tile."""
    found = []
    tiles = [(r, c, grid.rows, grid.cols) for r in range(grid.rows) for c in range(grid.cols)]
    for row, col, rows, cols in [*tiles, (0, 0, 1, 1)]:
        high, wide = rows * side, cols * side
        for y in range(row * side, (row + 1) * side):
            for x in range(col * side, (col + 1) * side):
                found.append((x / wide, y / high, (x + 1) / wide, (y + 1) / high))
    return found


def covered(square: tuple[float, ...], extent: tuple[float, ...], pixels: int = 2400) -> float:
    """Pixels of a picture of `pixels` a side that lie in both."""
    sides = []
    for low in (0, 1):
        centres = np.arange(pixels) + 0.5
        inside = [
            (centres > box[low] * pixels) & (centres < box[low + 2] * pixels)
            for box in (square, extent)
        ]
        sides.append((inside[0] & inside[1]).sum())
    return float(sides[0] * sides[1])


@pytest.mark.parametrize("grid", [Grid(0, 0), Grid(2, 2), Grid(1, 2), Grid(2, 1)])
def test_a_box_is_shown_by_the_tokens_whose_squares_it_covers(grid: Grid) -> None:
    rng = np.random.default_rng(grid.rows * 3 + grid.cols)
    for _ in range(12):
        (left, right), (top, bottom) = np.sort(rng.integers(0, 2399, (2, 2))) / 2400 + [0, 1 / 2400]
        extent = (float(left), float(top), float(right), float(bottom))
        cover = np.array([covered(square, extent) for square in squares(grid, 4)])
        area = covered((0, 0, 2, 2), extent)
        expected = []
        for part in (cover[:-16], cover[-16:]):  # crops, then the global tile
            if len(part):
                square = 2400**2 / len(part)
                least = 0.35 * min(square, area)  # of the square, or of a box within it
                expected += ((part >= min(least, part.max())) & (part > 0)).tolist()
        assert make_token_mask(extent, grid, 4).tolist() == expected, extent


def test_a_small_box_is_shown_by_the_token_that_it_lies_in() -> None:
    for number, (left, top, right, bottom) in enumerate(squares(Grid(0, 0), 4)):
        x, y = (left + right) / 2, (top + bottom) / 2
        found = make_token_mask((x - 0.01, y - 0.01, x + 0.01, y + 0.01), Grid(0, 0), 4)
        assert np.flatnonzero(found).tolist() == [number]


@pytest.mark.parametrize("grid", [Grid(0, 0), Grid(2, 2), Grid(1, 2)])
def test_patches_are_labelled_by_what_covers_them(grid: Grid) -> None:
    for scene in scenes(25):
        glyphs = make_shape_glyphs(scene)
        labels, extents = make_patch_labels(glyphs, scene.background, grid, 8)
        places = squares(grid, 8)
        assert labels.shape[:2] == extents.shape[:2] == (len(places) // 64, 64)
        whole = len(labels) - 1
        for (tile, patch), square in zip(np.ndindex(*labels.shape[:2]), places, strict=True):
            told = labels[tile, patch].tolist()
            size = covered(square, square)
            shares = {g: covered(square, g.extent) / size for g in glyphs}
            held = [g for g in glyphs if holds(square, g)]
            shown = [g for g, share in shares.items() if share > 0.41] + held
            if not shown and all(share < 0.39 for share in shares.values()):
                assert told == [0, COLOR_NAMES.index(scene.background), -1, -1, -1]
            if len(set(shown)) == 1:
                (glyph,) = set(shown)
                counted = [glyph.rank, glyph.total] if tile == whole else [-1, -1]
                kind, color = 1 + GLYPHS.index(glyph.kind), COLOR_NAMES.index(str(glyph.color))
                assert told == [kind, color, *counted, -1]
                assert extents[tile, patch] == pytest.approx(seen_from(square, glyph), abs=1e-5)


def holds(square: tuple[float, ...], glyph: Glyph) -> bool:
    """Whether the middle of `glyph` lies in `square`."""
    left, top, right, bottom = glyph.extent
    x, y = (left + right) / 2, (top + bottom) / 2
    return square[0] <= x < square[2] and square[1] <= y < square[3]


def seen_from(square: tuple[float, ...], glyph: Glyph) -> list[float]:
    """Way from the middle of `square` to that of `glyph`, and its size, in tiles of 8 patches."""
    left, top, right, bottom = glyph.extent
    wide, high = 8 * (square[2] - square[0]), 8 * (square[3] - square[1])
    x, y = left + right - square[0] - square[2], top + bottom - square[1] - square[3]
    found = [x / 2 / wide, y / 2 / high, (right - left) / wide, (bottom - top) / high]
    return [max(-1.5, min(1.5, value)) for value in found]


def scene_of(*shapes: tuple[str, str, int]) -> Scene:
    """A scene of (colour, kind, cell)."""
    made = [Shape(k, c, (0, 0, 0), 10, 10, 5, 0.0, False, cell) for c, k, cell in shapes]
    return Scene(96, 96, "gray", (128, 128, 128), tuple(made), False)


def test_answers_in_words() -> None:
    scene = scene_of(("red", "cross", 0), ("orange", "star", 4), ("red", "cross", 8))
    assert join_parts(questions.list_contents(scene)) == "Two red crosses and an orange star."
    assert join_parts(questions.describe_scene(scene)) == (
        "A red cross at the top left, an orange star in the center and a red cross at the bottom "
        "right, on a gray background."
    )
    assert join_parts(questions.list_contents(scene_of())) == "Nothing."


Maker = Callable[[Scene, np.random.Generator], Turn]


def all_answers(maker: Maker, scene: Scene) -> dict[str, str]:
    """Answer to each question that `maker` asks about `scene`."""
    turns = [maker(scene, np.random.default_rng(seed)) for seed in range(3000)]
    pairs = [(join_parts(turn.question), join_parts(turn.answer)) for turn in turns]
    answers = dict(pairs)
    assert all(answers[question] == answer for question, answer in pairs)
    return answers


def test_answers_are_true() -> None:
    scene = scene_of(("red", "circle", 0), ("blue", "circle", 2), ("red", "star", 7))
    counts = all_answers(questions.ask_count, scene)
    assert counts["How many circles are there?"] == "2."
    assert counts["How many red shapes are there?"] == "2."
    assert counts["Count the shapes."] == "3."
    assert counts["How many squares are there?"] == "0."
    places = all_answers(questions.ask_where, scene)
    assert places["Where is the star?"] == "At the bottom."
    assert places["Where is the blue shape?"] == "At the top right."
    assert places["Where is the cross?"] == "There is no cross."
    assert "Where is the circle?" not in places
    colors = all_answers(questions.ask_color, scene)
    assert colors["What color is the star?"] == "Red."
    assert "What color is the circle?" not in colors
    exists = all_answers(questions.ask_exists, scene)
    assert exists["Is there a blue circle?"] == "Yes."
    assert exists["Is there a blue star?"] == "No."
    assert all_answers(questions.ask_at, scene)["What is on the left?"] == "Nothing."
    assert all_answers(questions.ask_background, scene)["What color is the background?"] == "Gray."


def test_comparisons_are_true() -> None:
    made = (
        Shape("circle", "red", (0, 0, 0), 20, 20, 15, 0.0, False, 0),
        Shape("star", "blue", (0, 0, 0), 80, 30, 5, 0.0, False, 2),
    )
    scene = Scene(96, 96, "gray", (128, 128, 128), made, False)
    answers = all_answers(questions.ask_compare, scene)
    assert answers["Which is larger, the circle or the star?"] == "The circle."
    assert answers["Is the star or the circle bigger?"] == "The circle."
    assert answers["Which is smaller, the circle or the blue star?"] == "The blue star."
    assert answers["Is the circle left of the star?"] == "Yes."
    assert answers["Is the circle right of the star?"] == "No."
    assert answers["Is the star right of the red circle?"] == "Yes."
    assert not any("above" in question or "below" in question for question in answers)
    under = (made[0], Shape("star", "blue", (0, 0, 0), 30, 80, 14, 0.0, False, 7))
    answers = all_answers(questions.ask_compare, Scene(96, 96, "gray", (0, 0, 0), under, False))
    assert answers["Is the circle above the star?"] == "Yes."
    assert answers["Is the circle below the star?"] == "No."
    assert not any("larger" in question or "left" in question for question in answers)


@pytest.mark.parametrize(("radius", "asked"), [(13, False), (17, False), (19, True)])
def test_size_is_asked_about_where_both_measures_agree(radius: int, asked: bool) -> None:
    """At 1.7 times a circle's radius a star covers 1.14 times as much, at 1.9 times 1.42."""
    made = (
        Shape("star", "blue", (0, 0, 0), 30, 30, radius, 0.0, False, 0),
        Shape("circle", "red", (0, 0, 0), 80, 80, 10, 0.0, False, 8),
    )
    answers = all_answers(questions.ask_compare, Scene(96, 96, "gray", (0, 0, 0), made, False))
    said = {answer for question, answer in answers.items() if "larger" in question}
    assert said == ({"The star.", "The blue star."} if asked else set())


@pytest.mark.parametrize("kind", SHAPES)
def test_area_is_what_is_painted(kind: str) -> None:
    shape = Shape(kind, "red", (0, 0, 0), 500, 500, 400, 0.2, False, 4)
    mask = Image.new("1", (1000, 1000))
    ImageDraw.Draw(mask).polygon(compute_outline(shape), fill=1)
    assert compute_area(shape) == pytest.approx(int(np.asarray(mask).sum()), rel=0.01)


def test_half_of_the_pictures_of_several_hold_small_and_large_shapes() -> None:
    drawn = [sample_scene(np.random.default_rng(seed), 2, (200, 200)) for seed in range(400)]
    radii = [sorted(shape.radius for shape in scene.shapes) for scene in drawn]
    assert sum(large > 1.4 * small for small, large in radii) > 130
    assert all(small > 19 and large < 200 * 0.26 for small, large in radii)


def test_second_questions_are_about_the_shape_of_the_first() -> None:
    scene = scene_of(("red", "circle", 0), ("blue", "star", 7))
    facts = {
        "red circle": {"where": "At the top left.", "color": "Red.", "shape": "A circle."},
        "blue star": {"where": "At the bottom.", "color": "Blue.", "shape": "A star."},
    }
    then = {
        **dict.fromkeys(questions.THEN_WHERE, "where"),
        **dict.fromkeys(questions.THEN_COLOR, "color"),
        **dict.fromkeys(questions.THEN_SHAPE, "shape"),
    }
    asked = Counter[str]()
    for seed in range(300):
        first, second = questions.ask_follow_up(scene, np.random.default_rng(seed))
        words = join_parts(first.question).rstrip("?.").split()
        is_red = "red" in words or "circle" in words
        assert is_red != ("blue" in words or "star" in words)
        truth = facts["red circle" if is_red else "blue star"]
        fact = then[join_parts(second.question)]
        assert join_parts(first.answer) in set(truth.values()) - {truth[fact]}
        assert join_parts(second.answer) == truth[fact]
        asked[fact] += 1
    assert set(asked) == {"where", "color", "shape"}


def test_answers_about_several_pictures_are_true_and_point_into_their_own() -> None:
    seen = Counter[str]()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        pictures = [draw_shapes(rng, (96, 96)) for _ in range(2 + seed % 2)]
        turn = ask_several(pictures, rng)
        question, answer = join_parts(turn.question), join_parts(turn.answer)
        if question in ("How many pictures are there?", "How many images do you see?"):
            assert answer == ("Two.", "Three.")[len(pictures) - 2]
            seen["how many"] += 1
        elif answer.endswith(" one."):
            number = ORDINALS.index(answer.split()[1])
            words = question.rstrip("?").split()
            kind, hue = words[-1], words[-2] if words[-2] in COLOR_NAMES else None
            held = [
                any(g.kind == kind and hue in (None, g.color) for g in picture.glyphs)
                for picture in pictures
            ]
            if kind in ("circle", "square", "triangle", "star", "diamond", "cross"):
                assert [i for i, one in enumerate(held) if one] == [number]
                seen["which"] += 1
        for said in (turn.question, turn.answer):
            for part in said if isinstance(said, tuple) else ():
                for box in part.boxes:
                    assert 0 <= box.picture < len(pictures)
        lead = [i for i, word in enumerate(ORDINALS) if f"the {word} " in question]
        if lead:
            pointed = {
                box.picture
                for said in (turn.question, turn.answer)
                for part in (said if isinstance(said, tuple) else ())
                for box in part.boxes
            }
            assert pointed <= set(lead)
            seen["about"] += 1
    assert min(seen[kind] for kind in ("how many", "which", "about")) > 5


def test_a_picture_of_every_kind_can_be_asked_about() -> None:
    kinds = ("circle", "square", "triangle", "star", "diamond", "cross")
    scene = scene_of(*(("red", kind, cell) for cell, kind in enumerate(kinds)))
    for maker in (questions.ask_color, questions.ask_where):
        assert "There is no" not in "".join(all_answers(maker, scene).values())


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = build_tokenizer()
    for sample in (
        "What color is the circle?",
        "Zażółć \U0001f600\U0001f469‍\U0001f680 \x00 42",
        " a\n\n b\t",
    ):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def shipped_tokenizer() -> Tokenizer:
    """The tokenizer that a run takes."""
    return Tokenizer.from_file(str(resolve(DEMO) / "tokenizer.json"))


BOTH = pytest.mark.parametrize("make", [build_tokenizer, shipped_tokenizer])


def test_a_tokenizer_follows_from_its_seed() -> None:
    assert build_tokenizer().to_str() == build_tokenizer().to_str()


@BOTH
def test_tokenizer_has_the_special_tokens(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert [tokenizer.token_to_id(token) for token in FIRST_TOKENS] == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(t) for t in LAST_TOKENS] == list(
        range(size - len(LAST_TOKENS), size)
    )
    assert size == 960 + len(TAGS)
    assert tokenizer.encode("\n\n<image>").tokens == ["ĊĊ", "<image>"]


@BOTH
def test_what_is_printed_is_spelled_letter_by_letter(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for printed in ("HELLO", "ZEBRA", "1234567890", "QUICK", "THE"):
        assert tokenizer.encode(printed).tokens == list(printed)
        assert len(tokenizer.encode(f" {printed}.").ids) <= len(printed) + 2


@BOTH
def test_doctags_are_tokens_that_stay_in_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert set(pages.TAGS) < set(TAGS)
    for tag in TAGS:
        assert tokenizer.encode(tag).tokens == [tag]
    page = "<doctag><title><loc_0><loc_25><loc_500><loc_75>A CAT</title></doctag>"
    assert all(tag in page for tag in ("<doctag>", "</doctag>"))
    ids = tokenizer.encode(page).ids
    assert tokenizer.decode(ids) == page
    assert tokenizer.decode([*ids, tokenizer.token_to_id("<end_of_utterance>")]) == page


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures a batch, narrow layers: fast enough without a fast BLAS too."""
    mixes = ((Mix(("shapes", "pages"), 2, 2, detail="high"), 0.5), (Mix(("words",), 2, 2), 0.5))
    monkeypatch.setattr(batches, "MIXES", mixes)
    monkeypatch.setattr(run_module, "make_demo_config", small_config)


def small_config(tokenizer: Tokenizer) -> Config:
    """The demo's configuration with narrow layers, and one of them in the encoder."""
    config = make_demo_config(tokenizer)
    narrow = {"hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return replace(
        config,
        vision=replace(config.vision, num_hidden_layers=1, num_attention_heads=1, **narrow),
        text=replace(config.text, **narrow, **heads),
    )


@pytest.mark.usefixtures("small")
def test_steps_lower_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        run = start(tmp_path / str(number), 0, STAGES[number : number + 1])
        same = run._ahead.get((0, 0))
        monkeypatch.setattr(run._ahead, "get", lambda _place, same=same: same)
        before, _, after = run.advance(), run.advance(), run.advance()
        assert after < before


def test_encoder_batches_follow_from_the_seed(demo_builder: PromptBuilder) -> None:
    first, second = (make_encoder_batch(4, demo_builder.config, 3) for _ in range(2))
    assert (first.pixels == second.pixels).all()
    other = make_encoder_batch(5, demo_builder.config, 3)
    assert not np.array_equal(first.pixels, other.pixels)


@pytest.mark.usefixtures("small")
def test_the_encoder_is_trained_alone_and_then_with_the_rest(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 0, (Stage("encoder", 1, 0.01, size=2), STAGES[1]))
    taken = (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert taken == (resolve(DEMO) / "tokenizer.json").read_bytes()
    before = weights_of(run)
    run.advance()
    moved = {
        name for name, value in weights_of(run).items() if not mx.array_equal(value, before[name])
    }
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"model", "dense_head"}
    assert all("vision_model" in name for name in moved if name.startswith("model"))
    before = weights_of(run)
    run.advance()
    moved = {
        name for name, value in weights_of(run).items() if not mx.array_equal(value, before[name])
    }
    assert any("text_model" in name for name in moved)
    assert any("connector" in name for name in moved)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    steps = 5
    whole = start(tmp_path / "whole", 0, STAGES)
    losses = [whole.advance() for _ in range(steps)]
    stopped = start(tmp_path / "stopped", 0, STAGES)
    for _ in range(stop):
        stopped.advance()
    stopped.save(tmp_path / "state.safetensors")
    resumed = start(tmp_path / "stopped", 0, STAGES)
    resumed.restore(tmp_path / "state.safetensors")
    assert [resumed.advance() for _ in range(steps - stop)] == losses[stop:]
    expected = weights_of(whole)
    assert all(mx.array_equal(value, expected[name]) for name, value in weights_of(resumed).items())


def test_raw_pixels_are_normalized_as_the_model_wants_them(demo_builder: PromptBuilder) -> None:
    drawn = draw_shapes(np.random.default_rng(3), (250, 180))
    expected = tile_picture(drawn.picture, demo_builder.config).pixel_values
    pixels = batches.label_tiles(drawn, demo_builder.config, "high")[0].pixels
    assert pixels.dtype == np.uint8
    assert (
        np.abs(np.array(normalize_pixels(pixels, demo_builder.config.image)) - expected).max()
        <= 1e-5
    )


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (StackedMuon(0.02, weight_decay=0.0), optim.Muon(0.02, weight_decay=0.0)),
        (
            FlatAdamW(0.02, bias_correction=True, weight_decay=0.0),
            optim.AdamW(0.02, bias_correction=True, weight_decay=0.0),
        ),
    ],
)
def test_stacked_optimizers_step_as_those_of_mlx(
    own: optim.Optimizer, expected: optim.Optimizer
) -> None:
    matrices = {"a": (6, 10), "b": (10, 6), "c": (6, 10), "d": (4, 4)}
    start_at = {name: mx.random.normal(shape) for name, shape in matrices.items()}
    ours, theirs = start_at, start_at
    own.init(ours)
    expected.init(theirs)
    for _ in range(4):
        gradient = tree_map(lambda weight: mx.random.normal(weight.shape), start_at)
        ours = own.apply_gradients(gradient, ours)
        theirs = expected.apply_gradients(gradient, theirs)
        for name, weight in theirs.items():
            assert mx.abs(ours[name] - weight).max().item() <= 1e-5, name
            assert mx.abs(weight - start_at[name]).max().item() > 1e-3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_drawn_ahead_are_those_of_their_steps(tmp_path: Path, workers: int) -> None:
    stages = (Stage("a", 2, 0.01, size=2), Stage("b", 2, 0.01, size=3))
    run = start(tmp_path / "run", 0, stages, workers)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 1)):
        (found,) = run._ahead.get(place)
        expected = make_batch(run.builder, stages, 0, (*place, 0))
        assert (found.pixels == expected.pixels).all(), place  # type: ignore[union-attr]
        assert len(found.pixels) == stages[place[0]].size  # type: ignore[union-attr]


@pytest.mark.usefixtures("small")
def test_tiles_beside_conversations_count_too(tmp_path: Path) -> None:
    stages = (Stage("more", 2, 0.01, tiles=3), Stage("plain", 2, 0.01))
    run = start(tmp_path / "run", 0, stages)
    found = make_batch(run.builder, stages, 0, (0, 0, 0))
    assert isinstance(found, PairedBatch)
    assert len(found.tiles.pixels) == 3
    again = make_batch(run.builder, stages, 0, (0, 0, 0))
    assert (again.tiles.pixels == found.tiles.pixels).all()  # type: ignore[union-attr]
    parts = step_loss(run.trainee, found.talk), encoder_loss(run.trainee, found.tiles)
    total = step_loss(run.trainee, found)
    assert parts[0].item() < total.item()
    assert total.item() == pytest.approx((parts[0] + 0.3 * parts[1]).item(), rel=1e-5)


TWO = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from demo_recipe import batches, run
from demo_recipe.batches import Mix
from demo_recipe.run import Stage, start
from tests.demo_recipe.test_recipe import small_config
batches.MIXES = ((Mix(("shapes",), 1, 2), 1.0),)
run.demo_config = small_config
one = start(Path(sys.argv[1]), 0, (Stage("answers", 2, 0.01, parts=2),))
losses = [one.advance() for _ in range(2)]
if one.group.rank() == 0:
    mx.save_safetensors(sys.argv[2], dict(tree_flatten(one.trainee.parameters())))
    print(json.dumps([one.group.size(), *losses]))
"""


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))

    def begin(rank: int | None) -> subprocess.Popen[str]:
        name = "alone" if rank is None else "both"
        command = [
            sys.executable,
            "-c",
            TWO,
            str(tmp_path / name),
            str(tmp_path / f"{name}.safetensors"),
        ]
        own = {"PYTHONPATH": str(Path(__file__).parents[2])}  # where tests and demo_recipe are
        if rank is not None:
            own |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        return subprocess.Popen(
            command, env=os.environ | own, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )

    alone = begin(None).communicate(timeout=300)[0]
    pair = [begin(0), begin(1)]
    try:
        both, _ = (process.communicate(timeout=300)[0] for process in pair)
    finally:
        for process in pair:
            process.kill()  # one that waits for the other would wait for ever
    assert [process.returncode for process in pair] == [0, 0]
    assert (json.loads(alone)[0], json.loads(both)[0]) == (1, 2)
    assert json.loads(alone)[1:] == json.loads(both)[1:]
    first, second = (mx.load(str(tmp_path / f"{name}.safetensors")) for name in ("alone", "both"))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert all(mx.array_equal(value, second[name]) for name, value in first.items())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stop", [0, 2, 3])
def test_the_result_is_the_mean_of_the_ends_of_averaged_stages(tmp_path: Path, stop: int) -> None:
    first = Stage("first", 2, 0.01, size=2, averaged=True)
    stages = (first, replace(first, averaged=False), replace(first, steps=1))
    run, ends = start(tmp_path, 0, stages), list[dict[str, mx.array]]()
    for step in range(5):
        if step == stop:
            (tmp_path / "state.part.safetensors").symlink_to("theirs")  # no name is guessable
            run.save(tmp_path / "state.safetensors")
            assert not (tmp_path / "theirs").exists()
            run = start(tmp_path, 0, stages)
            run.restore(tmp_path / "state.safetensors")
        run.advance()
        if step in (1, 4):
            ends.append({k: v for k, v in weights_of(run).items() if k.startswith("model.")})
            mx.eval(ends)
    save_checkpoint(run, tmp_path)
    saved = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(saved, dict)
    assert {f"model.{name}" for name in saved} == set(ends[0])
    assert not all(mx.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
    for name, value in saved.items():
        mean = (ends[0][f"model.{name}"] + ends[1][f"model.{name}"]) / 2
        assert mx.allclose(value, mean, rtol=1e-3, atol=1e-6), name  # float16's


@pytest.mark.usefixtures("small")
def test_a_stage_can_begin_with_the_mean_of_those_before(tmp_path: Path) -> None:
    first = Stage("first", 1, 0.01, size=2, averaged=True)
    stages = (first, replace(first, name="second"), replace(first, name="last", from_average=True))
    apart = start(tmp_path / "apart", 0, (*stages[:2], replace(stages[2], from_average=False)))
    ends = []
    for _ in range(2):
        apart.advance()
        ends.append(apart.trainee.model.vision_model.embeddings.patch_embedding.weight)
    assert not mx.array_equal(*ends)
    run = start(tmp_path / "run", 0, stages)
    run.advance()
    run.advance()
    begun = mx.array(run.trainee.model.vision_model.embeddings.patch_embedding.weight)
    assert mx.allclose(begun, (ends[0] + ends[1]) / 2, atol=1e-7)
    run.advance()
    assert run.is_done
    assert run.ends == 2  # the mean that it began with, and its own end
    last = weights_of(run)["model.vision_model.embeddings.patch_embedding.weight"]
    found = dict(tree_flatten(run.result))["vision_model.embeddings.patch_embedding.weight"]
    assert mx.allclose(found, (begun + last) / 2, atol=1e-7)


@pytest.mark.usefixtures("small")
def test_the_result_is_the_end_of_the_last_stage_where_that_is_not_averaged(tmp_path: Path) -> None:
    first = Stage("first", 1, 0.01, size=2, averaged=True)
    run = start(tmp_path, 0, (first, replace(first, name="last", averaged=False)))
    run.advance()
    run.advance()
    own = weights_of(run)
    assert all(mx.array_equal(v, own[f"model.{name}"]) for name, v in tree_flatten(run.result))


@pytest.mark.usefixtures("small")
def test_a_run_can_begin_with_the_weights_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new heads are fitted to it, and its own weights stay until the first step."""
    monkeypatch.setattr(run_module, "HEAD_STEPS", 2)
    stages = (STAGES[0], replace(STAGES[1], name="later"))
    donor = start(tmp_path / "donor", 0, stages)
    donor.advance()
    save_checkpoint(donor, tmp_path / "donor")
    run = start(tmp_path / "run", 1, stages)
    before = mx.array(run.trainee.dense_head.weight)
    run.begin_at("later", tmp_path / "donor")
    assert (run.stage, run.step) == (1, 0)
    saved = mx.load(str(tmp_path / "donor" / "model.safetensors"))
    assert isinstance(saved, dict)
    for name, value in tree_flatten(run.trainee.model.parameters()):
        assert mx.array_equal(value, saved[name].astype(mx.float32)), name
    assert not mx.array_equal(before, run.trainee.dense_head.weight)
    run.advance()
    name = "vision_model.embeddings.patch_embedding.weight"
    moved = run.trainee.model.vision_model.embeddings.patch_embedding.weight
    assert not mx.array_equal(moved, saved[name].astype(mx.float32))


def test_every_step_of_every_run_draws_from_seeds_of_its_own() -> None:
    for number, stage in enumerate(ALL_STAGES):
        assert 0 < stage.steps <= 250_000, stage  # above are the seeds of tiles and second parts
        assert stage.parts <= 2
        assert number + 1 < 1000
