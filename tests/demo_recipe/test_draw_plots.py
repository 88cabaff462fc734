"""Charts as programs draw them, other fonts, unknown pictures: all true to their labels."""

from __future__ import annotations

import string
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageColor

from demo_recipe import fonts, foreign, foreign_scenes, plot_questions, plots, prints, unknown
from demo_recipe.draw import COLORS
from demo_recipe.items import Box, Extent, Glyph, LabeledPicture, join_parts
from demo_recipe.lexicon import HELD_OUT, WORDS
from demo_recipe.plot_questions import PlotBar
from demo_recipe.topics import LATE_TOPICS, draw

SIZES = ((192, 192), (96, 96), (640, 247), (247, 640), (333, 500), (250, 96))


def cut(picture: Image.Image, extent: Extent) -> np.ndarray:
    """The pixels (height, width, 3) of an extent, rounded outward."""
    width, height = picture.size
    left, top, right, bottom = extent
    box = (int(left * width), int(top * height), int(right * width) + 1, int(bottom * height) + 1)
    return np.asarray(picture.crop(box), float)


def name_color(rgb: np.ndarray) -> str:
    """The name of the nearest anchor among all colors that charts have."""
    anchors = {name: (*COLORS[name], *plots.NAMED.get(name, ())) for name in COLORS}
    return min(anchors, key=lambda name: min(np.abs(rgb - a).sum() for a in anchors[name]))


@pytest.mark.parametrize("topic", sorted(LATE_TOPICS))
def test_one_seed_draws_one_picture_and_asks_one_question(topic: str) -> None:
    for seed in range(15):
        first, second = (draw(np.random.default_rng(seed), topic, (160, 120)) for _ in range(2))
        assert first.picture.tobytes() == second.picture.tobytes()
        assert first.glyphs == second.glyphs
        asked = [
            [maker(np.random.default_rng(1)) for maker, _ in one.makers] for one in (first, second)
        ]
        assert asked[0] == asked[1]


@pytest.mark.parametrize("size", SIZES)
def test_bars_are_as_high_as_their_values_and_have_their_colors(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    named = Counter[bool]()
    for _ in range(25):
        drawn = plots.sample(rng, size)
        bars = [glyph for glyph in drawn.glyphs if glyph.kind == "bar"]
        height = drawn.picture.height
        units = [(bar.extent[3] - bar.extent[1]) * height / bar.value for bar in bars]
        assert max(units) - min(units) < 1e-6
        assert len({bar.extent[3] for bar in bars}) == 1
        assert [bar.rank for bar in bars] == list(range(len(bars)))
        for bar in bars:
            inner = cut(drawn.picture, bar.extent)
            middle = inner[len(inner) // 2, inner.shape[1] // 2]
            named[name_color(middle) == bar.color] += 1
            assert np.median(np.abs(inner - middle).max(-1)) < 12  # edges and numbers aside
    assert named[True] / named.total() > 0.93


def labels_of(drawn: LabeledPicture) -> list[str]:
    """The labels of a chart, as its questions name them."""
    (bars,) = {maker.args[0] for maker, _ in drawn.makers}  # type: ignore[attr-defined]
    return [bar.label for bar in bars]


def test_letters_lie_on_ink_and_nothing_held_out_is_printed_in_training() -> None:
    seen: set[str] = set()
    for seed in range(60):
        drawn = prints.sample(np.random.default_rng(seed), (200, 150))
        ground = np.asarray(drawn.picture, float)[0, 0]
        for glyph in drawn.glyphs:
            inner = np.abs(cut(drawn.picture, glyph.extent) - ground).max(-1)
            assert (inner > 60).mean() > 0.08, (seed, glyph)
            seen.add(glyph.kind)
        outside = np.abs(np.asarray(drawn.picture, float) - ground).max(-1)
        for left, top, right, bottom in (glyph.extent for glyph in drawn.glyphs):
            x0, y0 = int(left * 200) - 2, int(top * 150) - 2
            outside[max(0, y0) : int(bottom * 150) + 3, max(0, x0) : int(right * 200) + 3] = 0
        assert outside.max() < 60
    assert len(seen & set(string.ascii_lowercase)) > 20
    words: set[str] = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        words.update(label.upper() for label in labels_of(plots.sample(rng, (300, 200))))
        drawn = prints.sample(rng, (200, 150))
        text = "".join(" " * (g.rank == 0) + g.kind for g in drawn.glyphs)
        words.update(text.upper().split())
    assert len(words & set(WORDS)) > 50
    assert not words & set(HELD_OUT)
    held = plots.sample(np.random.default_rng(8), (300, 200), heldout=True)
    for seed in range(40):
        held = plots.sample(np.random.default_rng(seed), (300, 200), heldout=True)
        assert {label.upper() for label in labels_of(held) if len(label) > 1} <= set(HELD_OUT)


def test_all_fonts_are_used_and_differ() -> None:
    rng = np.random.default_rng(0)
    assert {fonts.sample_font(rng) for _ in range(300)} == set(fonts.FONTS)
    drawn = set()
    for name in sorted(set(fonts.FONTS)):
        page = Image.new("RGB", (120, 40), "white")
        fonts.write_text(page, "Gaq", (4, 30), (name, fonts.find_size(name, 20), 0.0), (0, 0, 0))
        drawn.add(page.tobytes())
        assert abs(fonts.compute_cap_share(name) * fonts.find_size(name, 60) - 60) < 1
    assert len(drawn) == len(set(fonts.FONTS))


def make_bars(*bars: tuple[str, str, int]) -> tuple[PlotBar, ...]:
    """Bars of (label, color, value)."""
    box = Box((0.0, 0.0, 1.0, 1.0))
    return tuple(PlotBar(*bar, box, box) for bar in bars)


def ask_all(bars: tuple[PlotBar, ...], labels: str) -> dict[str, str]:
    """The answer to every question that is asked about `bars`."""
    found: dict[str, str] = {}
    for maker, _ in plot_questions.makers(bars, labels):
        for seed in range(1200):
            turn = maker(np.random.default_rng(seed))
            asked, said = join_parts(turn.question), join_parts(turn.answer)
            assert found.setdefault(asked, said) == said, asked
    return found


def test_answers_about_charts_are_true() -> None:
    found = ask_all(make_bars(("A", "red", 3), ("B", "blue", 7), ("C", "green", 1)), "letter")
    assert found["Which bar is the highest?"] == "The blue bar."
    assert found["Which bar is the lowest?"] == "The green bar."
    assert found["Which letter has the highest bar?"] == "B."
    assert found["Is the red bar higher than the blue bar?"] == "No."
    assert found["Is bar A higher than bar C?"] == "Yes."
    assert found["How many bars are there?"] == "3."
    assert found["What is this?"] == "A bar chart with 3 bars."
    assert found["What color is bar C?"] == "Green."
    assert found["Which letter is under the green bar?"] == "C."
    assert found["What is the value of the pink bar?"] == "There is no pink bar."


def test_values_and_words_of_charts_are_not_told() -> None:
    """Their numbers and words are too small; so the demo says that it cannot tell them."""
    bars = make_bars(("cat", "red", 3), ("dog", "blue", 7))
    found = ask_all(bars, "word")
    for question in (
        "What is the value of the red bar?", "What is the highest value?", "List the values.",
        "Which word is under the blue bar?",
    ):  # fmt: skip
        assert found[question] == unknown.CANNOT_TELL


def test_bars_of_one_color_are_told_by_their_order() -> None:
    found = ask_all(make_bars(("A", "blue", 3), ("B", "blue", 2)), "letter")
    assert found["Which bar is the highest?"] == "The first bar."
    assert found["Is the second bar higher than the first bar?"] == "No."
    assert found["Which letter is under the second bar?"] == "B."
    assert not any("blue" in question for question in found)


def test_labels_that_are_too_small_are_not_asked_about() -> None:
    found = ask_all(make_bars(("A", "red", 3), ("B", "blue", 7)), "none")
    assert not any("letter" in asked or "label" in asked or "bar A" in asked for asked in found)


def test_every_unknown_picture_is_drawn_at_every_size_and_has_one_answer() -> None:
    painters = {*unknown.TEXTURES, *unknown.SCENES, *unknown.FIGURES, *unknown.CHARTS}
    painters |= {one for kind in foreign_scenes.KINDS.values() for one in kind}
    for paint in painters:
        for size in SIZES:
            picture = paint(np.random.default_rng(2), size)
            assert (picture.size, picture.mode) == (size, "RGB")
            assert np.asarray(picture, float).std() > 1, paint
    drawn = unknown.sample(np.random.default_rng(4), (100, 100))
    assert not drawn.glyphs
    said = {drawn.makers[0][0](np.random.default_rng(seed)) for seed in range(400)}
    assert {turn.answer for turn in said} == {unknown.CANNOT_TELL}
    asked = {str(turn.question) for turn in said}
    for known in (
        "What is this?",
        "What does it say?",
        "Describe this image.",
        "What shape is this?",
    ):
        assert known in asked
    assert not any("{" in question for question in asked)


def test_the_foreign_set_draws_what_training_does_not() -> None:
    own = {
        paint.__code__
        for group in (unknown.TEXTURES, unknown.SCENES, unknown.FIGURES, unknown.CHARTS)
        for paint in group
    }
    assert not own & {one.__code__ for kind in foreign_scenes.KINDS.values() for one in kind}
    items = list(foreign.collect(2, seed=1))
    tasks = Counter(task for task, *_ in items)
    assert {task.partition(":")[0] for task in tasks} == {"matplotlib", "vega", "cannot tell"}
    for kind in ("scene", "texture", "shape"):
        assert tasks[f"cannot tell: {kind}"] == 2
    assert {answer for task, _, _, answer in items if task.startswith("cannot")} == {
        unknown.CANNOT_TELL
    }


@pytest.mark.parametrize("program", ["draw_with_matplotlib", "draw_with_vega"])
def test_charts_of_other_programs_show_the_bars_that_are_asked_about(program: str) -> None:
    """Each color is found from left to right, and as high as its value says."""
    checked = 0
    for seed in range(12):
        picture, bars, labels = getattr(foreign, program)(np.random.default_rng(seed))
        pixels = np.asarray(picture, int)
        _, same, codes = foreign.sample_bars(np.random.default_rng(seed))
        assert bars == same
        if len(set(codes)) < len(codes) or {"black", "gray"} & set(codes):
            continue  # text and lines have these colors too
        lefts, units = [], []
        for bar, code in zip(bars, codes, strict=True):
            near = np.abs(pixels - ImageColor.getrgb(code)[:3]).sum(-1) < 8
            columns = np.flatnonzero(near.sum(0) > 0.5 * near.sum(0).max())
            lefts.append(columns[0])
            units.append(np.median(near.sum(0)[columns]) / bar.value)
        assert lefts == sorted(lefts)
        assert max(units) - min(units) < 0.12 * max(units) + 1
        assert labels in ("letter", "word", "none")
        checked += 1
    assert checked > 2


def test_glyphs_of_labels_are_within_the_picture() -> None:
    for seed in range(60):
        drawn = plots.sample(np.random.default_rng(seed), (250, 180))
        for glyph in drawn.glyphs:
            assert isinstance(glyph, Glyph)
            left, top, right, bottom = glyph.extent
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
