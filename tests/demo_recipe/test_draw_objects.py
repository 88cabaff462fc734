"""Drawn objects: pixels show what the labels say, and answers are true to the labels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo_recipe
from demo_recipe import objects
from demo_recipe.draw import COLORS, PLACES, sample_size
from demo_recipe.items import Glyph, LabeledPicture, Part, Turn, get_parts, join_parts
from demo_recipe.object_questions import make_plural

SIZES = ((192, 192), (96, 96), (640, 247), (247, 640), (96, 51), (51, 96), (333, 500), (250, 96))
FAMILIES = {
    "object", "objects", "object where", "object at", "object exists", "object count",
    "object describe", "background", "absent",
}  # fmt: skip
FOLDER = Path(demo_recipe.__file__).parent
NUMBERS = {2: "two", 3: "three", 4: "four"}


def turn_of(drawn: LabeledPicture, rng: np.random.Generator) -> Turn:
    weights = np.array([weight for _, weight in drawn.makers])
    return drawn.makers[int(rng.choice(len(weights), p=weights / weights.sum()))][0](rng)


def samples(count: int, seed: int) -> list[tuple[LabeledPicture, list[Turn]]]:
    """Pictures of all sizes, a turn by every maker for each."""
    rng = np.random.default_rng(seed)
    drawn = [objects.sample(rng, sample_size(rng)) for _ in range(count)]
    return [(one, [maker(rng) for maker, _ in one.makers]) for one in drawn]


def pixel_box(drawn: LabeledPicture, glyph: Glyph) -> tuple[int, int, int, int]:
    """The glyph's extent in whole pixels, which it has to be, inside the picture."""
    exact = np.array(glyph.extent) * np.tile(drawn.picture.size, 2)
    assert np.abs(exact - np.round(exact)).max() < 1e-6
    left, top, right, bottom = (int(value) for value in np.round(exact))
    assert 0 <= left < right <= drawn.picture.width
    assert 0 <= top < bottom <= drawn.picture.height
    return left, top, right, bottom


def place_of(glyph: Glyph) -> str:
    """Its place by the third of the picture that its middle lies in."""
    left, top, right, bottom = glyph.extent
    return PLACES[int(3 * (top + bottom) / 2) * 3 + int(3 * (left + right) / 2)]


def test_one_seed_draws_one_picture_and_asks_one_question() -> None:
    for seed in range(20):
        first, second = (objects.sample(np.random.default_rng(seed), (160, 120)) for _ in range(2))
        assert first.picture.tobytes() == second.picture.tobytes()
        assert first.glyphs == second.glyphs
        turns = [turn_of(one, np.random.default_rng(seed)) for one in (first, second)]
        assert turns[0] == turns[1]
    other = objects.sample(np.random.default_rng(100), (160, 120))
    assert other.picture.tobytes() != first.picture.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_drawn_with_objects_large_enough_and_apart(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        drawn = objects.sample(rng, size)
        assert drawn.picture.size == size
        assert drawn.picture.mode == "RGB"
        boxes = [pixel_box(drawn, glyph) for glyph in drawn.glyphs]
        for left, top, right, bottom in boxes:
            # 36 of 192 pixels, half of a narrow picture's short side, less what squeezing takes.
            assert max(right - left, bottom - top) > 0.9 * min(36 * max(size) / 192, min(size) / 2)
        for i, (left, top, right, bottom) in enumerate(boxes):
            for a, b, c, d in boxes[:i]:
                assert right <= a or c <= left or bottom <= b or d <= top


def test_glyphs_stand_in_reading_order_and_are_counted() -> None:
    for drawn, _ in samples(200, 2):
        cells = [PLACES.index(place_of(glyph)) for glyph in drawn.glyphs]
        assert cells == sorted(set(cells))
        assert [glyph.rank for glyph in drawn.glyphs] == list(range(len(cells)))
        kinds = [glyph.kind for glyph in drawn.glyphs]
        assert set(kinds) <= set(objects.KINDS)
        assert [glyph.total for glyph in drawn.glyphs] == [kinds.count(kind) for kind in kinds]


def test_ink_lies_in_the_boxes_and_reaches_their_edges() -> None:
    for drawn, _ in samples(200, 3):
        ground = np.array(drawn.picture.getpixel((0, 0)), float)
        marks = np.abs(np.asarray(drawn.picture, float) - ground).max(axis=2)
        for glyph in drawn.glyphs:
            left, top, right, bottom = pixel_box(drawn, glyph)
            cut = marks[top:bottom, left:right] > 6
            near = 1 + (right - left) // 16, 1 + (bottom - top) // 16
            assert cut[: near[1]].any()
            assert cut[-near[1] :].any()
            assert cut[:, : near[0]].any()
            assert cut[:, -near[0] :].any()
            marks[top:bottom, left:right] = 0
        assert not marks.any()


def sheet() -> Image.Image:
    with Image.open(FOLDER / "objects.png") as picture:
        return picture.convert("RGBA")


def test_pixels_show_the_kinds_that_the_glyphs_name() -> None:
    cells = []
    picture = sheet()
    for i in range(len(objects.KINDS)):
        x, y = 96 * (i % 6), 96 * (i // 6)
        cell = picture.crop((x, y, x + 96, y + 96))
        cells.append(cell.crop(cell.getchannel("A").getbbox()).resize((24, 24)))
    wrong = total = 0
    for drawn, _ in samples(150, 4):
        ground = Image.new("RGBA", (24, 24), drawn.picture.getpixel((0, 0)))
        known = [np.asarray(Image.alpha_composite(ground, cell).convert("RGB")) for cell in cells]
        known += [one[:, ::-1] for one in known]
        for glyph in drawn.glyphs:
            cut = np.asarray(drawn.picture.crop(pixel_box(drawn, glyph)).resize((24, 24)), float)
            errors = [np.abs(cut - one).mean() for one in known]
            wrong += objects.KINDS[int(np.argmin(errors)) % len(cells)] != glyph.kind
            total += 1
    assert total > 200
    assert wrong == 0


def test_the_sheet_holds_the_objects_in_the_order_of_their_names() -> None:
    picture = np.asarray(sheet(), float)
    assert picture.shape == (4 * 96, 6 * 96, 4)
    solid = {}
    for i, kind in enumerate(objects.KINDS):
        cell = picture[96 * (i // 6) :, 96 * (i % 6) :][:96, :96].reshape(-1, 4)
        solid[kind] = cell[cell[:, 3] > 200, :3].mean(axis=0)
    red, green, blue = (
        {kind: color[i] - np.delete(color, i).max() for kind, color in solid.items()}
        for i in range(3)
    )
    assert set(sorted(red, key=lambda kind: red[kind])[-4:]) == {"apple", "book", "car", "clock"}
    assert max(green, key=lambda kind: green[kind]) == "tree"
    assert set(sorted(blue, key=lambda kind: blue[kind])[-3:]) == {"umbrella", "fish", "shoe"}
    assert min(solid, key=lambda kind: solid[kind].sum()) == "hat"
    yellow = {kind: min(color[:2]) - color[2] for kind, color in solid.items()}
    assert set(sorted(yellow, key=lambda kind: yellow[kind])[-4:]) == {"cat", "key", "moon", "sun"}


def test_the_sheet_is_small_and_comes_with_its_licence() -> None:
    assert (FOLDER / "objects.png").stat().st_size < 250_000
    text = (FOLDER / "OBJECTS_LICENSE.txt").read_text()
    assert "Noto Color Emoji" in text
    assert "Copyright 2022 Google Inc." in text
    assert "SIL OPEN FONT LICENSE Version 1.1" in text


def articled(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sentence(pieces: list[str]) -> str:
    head, last = pieces[:-1], pieces[-1]
    text = f"{', '.join(head)} and {last}." if head else f"{last}."
    return text[0].upper() + text[1:]


def listed(kinds: list[str]) -> str:
    """Kinds in reading order, equal ones together."""
    counted = Counter(kinds)
    return sentence(
        [
            articled(kind) if n == 1 else f"{NUMBERS[n]} {make_plural(kind)}"
            for kind, n in counted.items()
        ]
    )


def named_in(question: str) -> str:
    """The kind that `question` is about."""
    words = re.findall(r"[a-z]+", question.lower())
    found = [kind for kind in objects.KINDS if kind in words or make_plural(kind) in words]
    assert len(found) == 1, question
    return found[0]


def expected(turn: Turn, drawn: LabeledPicture) -> str:
    """The answer to `turn`, worked out from the glyphs alone."""
    question, kinds = join_parts(turn.question), [glyph.kind for glyph in drawn.glyphs]
    places = [place_of(glyph) for glyph in drawn.glyphs]
    if turn.family in ("object", "objects"):
        assert (turn.family == "object") == (len(kinds) == 1)
        return listed(kinds) if kinds else "Nothing."
    if turn.family == "object describe":
        ground = f"{articled(str(drawn.background))} background."
        if not kinds:
            return f"Nothing on {ground}"
        said = [f"{articled(k)} {place}" for k, place in zip(kinds, places, strict=True)]
        return f"{sentence(said)[:-1]}, on {ground}"
    if turn.family == "background":
        return f"{str(drawn.background).capitalize()}."
    if turn.family == "object at":
        place = max((p for p in PLACES if p in question), key=len)
        found = [kind for kind, where in zip(kinds, places, strict=True) if where == place]
        return f"{articled(found[0]).capitalize()}." if found else "Nothing."
    if turn.family == "object count" and re.search("objects|things", question):
        return f"{len(kinds)}."
    kind = named_in(question)
    if turn.family == "object count":
        return f"{kinds.count(kind)}."
    if turn.family == "object exists":
        return "Yes." if kind in kinds else "No."
    if turn.family == "absent":
        assert kind not in kinds
        return f"There is no {kind}."
    assert turn.family == "object where"
    assert kinds.count(kind) == 1
    return f"{places[kinds.index(kind)].capitalize()}."


def test_answers_are_true_to_the_glyphs() -> None:
    seen = set()
    for drawn, turns in samples(600, 5):
        for turn in turns:
            seen.add(turn.family)
            assert join_parts(turn.answer) == expected(turn, drawn), join_parts(turn.question)
    assert seen == FAMILIES


def test_parts_that_name_an_object_point_to_every_one_of_it() -> None:
    pointed = 0
    elsewhere = ("object describe", "absent", "object at")  # these are about single places
    for drawn, turns in samples(300, 6):
        for turn in turns:
            for part in (*get_parts(turn.question), *get_parts(turn.answer)):
                extents = [box.extent for box in part.boxes]
                assert all(min(e) >= 0 and max(e) <= 1 for e in extents)
                assert all(box.picture == 0 for box in part.boxes)
                named = named_part(part)
                if named and part.boxes and turn.family not in elsewhere:
                    assert extents == [g.extent for g in drawn.glyphs if g.kind == named]
                    pointed += 1
            if turn.family == "object describe" and drawn.glyphs:
                boxed = [part.boxes[0].extent for part in get_parts(turn.answer) if part.boxes]
                assert boxed == [glyph.extent for glyph in drawn.glyphs]
    assert pointed > 500


def named_part(part: Part) -> str | None:
    """The kind whose name `part` is, if it is one."""
    word = part.text.lower().split(" ")[-1]
    return next((kind for kind in objects.KINDS if word in (kind, make_plural(kind))), None)


def test_backgrounds_are_light_and_named_by_their_hue() -> None:
    for drawn, _ in samples(200, 7):
        rgb = np.array(drawn.picture.getpixel((0, 0)), float)
        assert rgb @ (0.299, 0.587, 0.114) > 140
        spread = rgb - rgb.mean()
        if drawn.background in ("white", "gray"):
            assert np.abs(spread).max() < 16
            assert (rgb.mean() > 230) == (drawn.background == "white")
        else:
            anchor = np.array(COLORS[str(drawn.background)][0], float)
            hue = anchor - anchor.mean()
            assert spread @ hue > 0.6 * np.linalg.norm(spread) * np.linalg.norm(hue)


def test_no_answer_dominates_its_family() -> None:
    rng = np.random.default_rng(8)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(2500):
        turn = turn_of(objects.sample(rng, (120, 100)), rng)
        answers[turn.family][join_parts(turn.answer)] += 1
    bounds = {"background": 0.66, "object exists": 0.6, "object count": 0.5}
    for family in FAMILIES:
        (_, most), *_ = answers[family].most_common()
        total = sum(answers[family].values())
        assert total > 50, family
        assert most / total < bounds.get(family, 0.3), family
    assert len(answers["object"]) == len(objects.KINDS)
