"""Bar charts: bars as high as their values, letters under them, and answers true to the picture."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from demo_recipe import charts
from demo_recipe.draw import COLOR_NAMES, sample_size
from demo_recipe.items import Glyph, LabeledPicture, Turn, get_parts, join_parts
from tests.helpers import read_print as reader

SIZES = ((192, 192), (96, 96), (640, 247), (247, 640), (96, 51), (51, 96), (333, 500), (250, 96))
FAMILIES = {
    "value", "extreme", "chart compare", "chart list", "bars", "bar color", "bar letter", "absent",
    "what chart", "describe chart",
}  # fmt: skip


def bars_of(drawn: LabeledPicture) -> list[Glyph]:
    return [glyph for glyph in drawn.glyphs if glyph.kind == "bar"]


def letters_of(drawn: LabeledPicture) -> list[Glyph]:
    return [glyph for glyph in drawn.glyphs if glyph.kind != "bar"]


def turn_of(drawn: LabeledPicture, rng: np.random.Generator) -> Turn:
    weights = np.array([weight for _, weight in drawn.makers])
    assert abs(weights.sum() - 1) < 1e-9
    return drawn.makers[int(rng.choice(len(weights), p=weights))][0](rng)


def test_one_seed_draws_one_picture_and_asks_one_question() -> None:
    for seed in range(20):
        first, second = (charts.sample(np.random.default_rng(seed), (160, 120)) for _ in range(2))
        assert first.picture.tobytes() == second.picture.tobytes()
        assert first.glyphs == second.glyphs
        turns = [turn_of(one, np.random.default_rng(seed)) for one in (first, second)]
        assert turns[0] == turns[1]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_drawn_with_bars_and_letters_large_enough(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    scale = charts.MEASURE / max(size)
    unit = 0.062 if size[0] > 2 * size[1] else 0.07  # letters take more of a low picture
    for _ in range(60):
        drawn = charts.sample(rng, size)
        assert drawn.picture.size == size
        assert drawn.picture.mode == "RGB"
        bars, letters = bars_of(drawn), letters_of(drawn)
        assert 2 <= len(bars) == len(letters) <= 5
        assert [bar.rank for bar in bars] == list(range(len(bars)))
        assert {bar.total for bar in bars} == {len(bars)}
        assert len({bar.color for bar in bars} | {drawn.background}) == len(bars) + 1
        assert len({letter.kind for letter in letters} & set(charts.KINDS)) == len(bars)
        values = [bar.value for bar in bars]
        assert values.count(max(values)) == values.count(min(values)) == 1
        for bar in bars:
            left, top, right, bottom = reader.pixels(drawn.picture, bar.extent)
            assert (right - left) * scale > 9
            assert (bottom - top) / bar.value > unit * size[1] - 1 / bar.value
        tall = max(letter.extent[3] - letter.extent[1] for letter in letters) * size[1]
        assert tall * scale > min(14, 0.18 * size[1] * scale) - 1.5 * scale


def test_values_are_read_off_the_lines_of_the_plot() -> None:
    """The line of ten and the axis are found in the gap between two bars."""
    rng = np.random.default_rng(2)
    for _ in range(150):
        width, height = sample_size(rng)
        drawn = charts.sample(rng, (width, height))
        bars = [reader.pixels(drawn.picture, bar.extent) for bar in bars_of(drawn)]
        seen = np.asarray(drawn.picture, int)
        axis = bars[0][3]
        gap = (bars[0][2] + bars[1][0]) // 2
        lines = np.nonzero((seen[:axis, gap] != seen[0, 0]).any(axis=1))[0]
        thick = (np.diff(lines) > 1).argmax() + 1  # rows of the first line
        ten = lines[0] + (thick - 1) / 2
        for bar, (left, top, right, bottom) in zip(bars_of(drawn), bars, strict=True):
            assert bottom == axis
            read = 10 * (axis - top) / (axis - ten)
            assert abs(read - bar.value) < 0.05 + 10 / (axis - ten)
            assert round(read) == bar.value
            core = seen[top + 1 : bottom - 1, left + 1 : right - 1].reshape(-1, 3)
            assert len(np.unique(core, axis=0)) == 1
            middle = (left + right) // 2
            assert (seen[top, middle] != seen[top - 1, middle]).any()


def test_letters_stand_under_their_bars() -> None:
    rng = np.random.default_rng(3)
    total = 0
    for _ in range(60):
        drawn = charts.sample(rng, (400, 400))
        marks = reader.ink(drawn.picture, drawn.picture.getpixel((0, 0)))
        for bar, letter in zip(bars_of(drawn), letters_of(drawn), strict=True):
            left, top, right, bottom = reader.pixels(drawn.picture, letter.extent)
            cut = marks[top:bottom, left:right]
            assert cut.max() > 100
            assert reader.read(cut, string.ascii_uppercase) == letter.kind
            assert bar.extent[3] < letter.extent[1]
            middle = (bar.extent[0] + bar.extent[2]) / 2
            assert abs(middle - (letter.extent[0] + letter.extent[2]) / 2) < 0.006
            marks[top:bottom, left:right] = 0
            total += 1
        below = reader.pixels(drawn.picture, bars_of(drawn)[0].extent)[3] + 3  # the axis
        assert not marks[below:].any()
    assert total > 150


def asked_bars(question: str, drawn: LabeledPicture) -> list[int]:
    """The ranks of the bars that `question` names, in its order."""
    colors = [bar.color for bar in bars_of(drawn)]
    letters = [letter.kind for letter in letters_of(drawn)]
    names = re.findall(rf"\b({'|'.join(COLOR_NAMES)}) bar|\bbar ([A-Z])\b", question)
    return [colors.index(color) if color else letters.index(letter) for color, letter in names]


def expected(turn: Turn, drawn: LabeledPicture) -> str:
    """The answer to `turn`, worked out from the glyphs alone."""
    bars, letters, question = bars_of(drawn), letters_of(drawn), join_parts(turn.question)
    values = [bar.value for bar in bars]
    count = len(bars)
    simple = {
        "bars": f"{count}.",
        "what chart": f"A bar chart with {count} bars.",
        "chart list": f"{', '.join(map(str, values))}.",
        "describe chart": f"A bar chart with {count} bars: "
        + ", ".join(f"{x.kind} {b.color} {b.value}" for b, x in zip(bars, letters, strict=True))
        + ".",
    }
    if turn.family in simple:
        return simple[turn.family]
    if turn.family == "extreme":
        high = bool(re.search("highest|tallest|largest|biggest", question))
        assert high != bool(re.search("lowest|shortest|smallest", question))
        rank = values.index(max(values) if high else min(values))
        if "value" in question or question.startswith("How high"):
            return f"{values[rank]}."
        if "letter" in question:
            return f"{letters[rank].kind}."
        return f"The {bars[rank].color} bar."
    asked = asked_bars(question, drawn)
    if turn.family == "chart compare":
        one, other = (values[rank] for rank in asked)
        assert one != other
        return "Yes." if (one > other) == ("higher" in question) else "No."
    [rank] = asked
    return {
        "value": f"{values[rank]}.",
        "bar color": f"{str(bars[rank].color).capitalize()}.",
        "bar letter": f"{letters[rank].kind}.",
    }[turn.family]


def test_answers_are_true_and_every_family_is_asked() -> None:
    rng = np.random.default_rng(4)
    answers: dict[str, Counter[str]] = {}
    for _ in range(4000):
        drawn = charts.sample(rng, (150, 150))
        turn = turn_of(drawn, rng)
        answer = join_parts(turn.answer)
        answers.setdefault(turn.family, Counter())[answer] += 1
        if turn.family == "absent":
            with pytest.raises(ValueError, match="not in list"):
                asked_bars(join_parts(turn.question), drawn)
            name = re.findall(r"the (\w+ bar)|(bar [A-Z])\b", join_parts(turn.question))[-1]
            assert answer == f"There is no {''.join(name)}."
        else:
            assert answer == expected(turn, drawn), join_parts(turn.question)
    assert set(answers) == FAMILIES
    limits = {"chart compare": 0.55, "bars": 0.4, "what chart": 0.4, "bar letter": 0.25}
    for family, counts in answers.items():
        assert counts.total() > 100
        most = limits.get(family, 0.18)
        assert counts.most_common(1)[0][1] / counts.total() < most, family


def test_parts_point_at_the_bars_and_letters_they_name() -> None:
    rng = np.random.default_rng(5)
    pointed = 0
    for _ in range(500):
        drawn = charts.sample(rng, (192, 192))
        glyphs = {glyph.extent: glyph for glyph in drawn.glyphs}
        turn = turn_of(drawn, rng)
        for part in (*get_parts(turn.question), *get_parts(turn.answer)):
            shown = [glyphs[box.extent] for box in part.boxes]
            text = part.text.strip().lower()
            pointed += bool(shown)
            if text in COLOR_NAMES:
                assert [glyph.color for glyph in shown] == [text] or turn.family == "absent"
            elif re.fullmatch("[A-Z]", part.text.strip()):
                assert shown[0].kind == part.text.strip()
                # In a question a letter points at the bar as well.
                assert {glyph.rank for glyph in shown} == {shown[0].rank}
            elif text.isdigit() and len(shown) == 1:
                assert shown[0].value == int(text)
            elif text.isdigit():
                assert len(shown) == int(text) == len(bars_of(drawn))
        if turn.family in ("value", "chart list"):
            assert all(part.boxes for part in get_parts(turn.answer) if part.text.isdigit())
        if turn.family == "chart compare":
            assert len(get_parts(turn.answer)[0].boxes) == 2
    assert pointed > 800


def test_the_picture_is_its_own() -> None:
    """Drawing twice from one generator gives two pictures."""
    rng = np.random.default_rng(6)
    first, second = charts.sample(rng, (120, 120)), charts.sample(rng, (120, 120))
    assert isinstance(first.picture, Image.Image)
    assert first.picture.tobytes() != second.picture.tobytes()
