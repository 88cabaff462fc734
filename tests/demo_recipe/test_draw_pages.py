"""Drawn pages: letters where the boxes say, and DocTags true to what is printed."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from demo_recipe import pages
from demo_recipe.items import Glyph, LabeledPicture, Turn, get_parts, join_parts
from demo_recipe.lexicon import HELD_OUT
from tests.helpers import read_print as reader

SIZES = ((144, 192), (192, 192), (96, 96), (640, 247), (247, 640), (192, 101), (96, 250), (250, 96))
FAMILIES = {
    "page", "page table", "page title", "page cell", "page list", "page list count", "absent",
}  # fmt: skip
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Printed:
    """A word by its glyphs."""

    text: str
    box: Box


@dataclass(frozen=True)
class Tagged:
    """An element by its DocTags: its box in units of 0 to 500, its words row by row."""

    tag: str
    box: Box
    rows: list[list[str]]


def around(boxes: list[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def printed(drawn: LabeledPicture) -> list[Printed]:
    """The words that the glyphs spell, in their order: a rank of 0 begins one."""
    words: list[list[Glyph]] = []
    for glyph in drawn.glyphs:
        if len(glyph.kind) > 1:
            continue
        if glyph.rank == 0:
            words.append([])
        assert glyph.rank == len(words[-1])
        words[-1].append(glyph)
    return [Printed("".join(g.kind for g in w), around([g.extent for g in w])) for w in words]


def of_kind(drawn: LabeledPicture, kind: str) -> list[Glyph]:
    return [glyph for glyph in drawn.glyphs if glyph.kind == kind]


ELEMENT = re.compile(r"<(title|text|list_item|otsl)>((?:<loc_\d+>){4})(.*?)</\1>", re.S)


def parsed(tags: str) -> list[Tagged]:
    """The elements of DocTags in order; what is not an element has to be well nested."""
    found = []
    for tag, place, inside in ELEMENT.findall(tags):
        x0, y0, x1, y1 = (int(number) for number in re.findall(r"\d+", place))
        rows = [inside.split(" ")]
        if tag == "otsl":
            first, *others = inside.removesuffix("<nl>").split("<nl>")
            rows = [first.removeprefix("<ched>").split("<ched>")]
            rows += [row.removeprefix("<fcel>").split("<fcel>") for row in others]
        found.append(Tagged(tag, (x0, y0, x1, y1), rows))
    return found


def turn_of(drawn: LabeledPicture, rng: np.random.Generator) -> Turn:
    weights = np.array([weight for _, weight in drawn.makers])
    return drawn.makers[int(rng.choice(len(weights), p=weights / weights.sum()))][0](rng)


def samples(count: int, seed: int) -> list[tuple[LabeledPicture, dict[str, Turn]]]:
    """Pages with a turn of every family that asks about them."""
    rng = np.random.default_rng(seed)
    drawn = [pages.sample(rng, pages.sample_size(rng)) for _ in range(count)]
    return [(d, {t.family: t for t in (maker(rng) for maker, _ in d.makers)}) for d in drawn]


def answer(turn: Turn) -> str:
    return str(join_parts(turn.answer))


def test_one_seed_draws_one_page_and_asks_one_question() -> None:
    for seed in range(20):
        first, second = (pages.sample(np.random.default_rng(seed), (150, 200)) for _ in range(2))
        assert first.picture.tobytes() == second.picture.tobytes()
        assert first.glyphs == second.glyphs
        turns = [turn_of(one, np.random.default_rng(seed)) for one in (first, second)]
        assert turns[0] == turns[1]
    other = pages.sample(np.random.default_rng(100), (150, 200))
    assert other.picture.tobytes() != first.picture.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_drawn_inside_the_page(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        drawn = pages.sample(rng, size)
        assert drawn.picture.size == size
        assert drawn.picture.mode == "RGB"
        assert {glyph.kind for glyph in drawn.glyphs} <= set(pages.KINDS)
        boxes = [reader.pixels(drawn.picture, glyph.extent) for glyph in drawn.glyphs]
        assert printed(drawn)
        assert len(set(boxes)) == len(boxes)


def test_pages_are_mostly_upright_with_print_large_enough() -> None:
    rng = np.random.default_rng(2)
    sizes = [pages.sample_size(rng) for _ in range(300)]
    assert 0.75 < np.mean([width <= height for width, height in sizes]) < 0.95
    for size in sizes:
        assert 192 <= max(size) <= 640
        assert min(size) >= 0.69 * max(size)
        drawn = pages.sample(rng, size)
        letters = [g for g in drawn.glyphs if len(g.kind) == 1]
        tall = [(g.extent[3] - g.extent[1]) * size[1] * 192 / max(size) for g in letters]
        assert min(tall) > 13
        assert max(tall) < 40


def test_ink_lies_in_the_boxes_and_fills_them() -> None:
    tables = 0
    for drawn, _ in samples(150, 3):
        marks = reader.ink(drawn.picture, drawn.picture.getpixel((0, 0)))
        tables += bool(of_kind(drawn, "rule"))
        for glyph in reversed(drawn.glyphs):
            left, top, right, bottom = reader.pixels(drawn.picture, glyph.extent)
            cut = marks[top:bottom, left:right] > 0
            for edge in (cut[0], cut[-1], cut[:, 0], cut[:, -1]):
                assert edge.any(), glyph
            marks[top:bottom, left:right] = 0
        assert not marks.any()
    assert tables > 20


def test_the_letters_printed_are_those_of_the_glyphs() -> None:
    wrong = total = 0
    rng = np.random.default_rng(4)
    for _ in range(60):
        drawn = pages.sample(rng, (480, 640))
        marks = reader.ink(drawn.picture, drawn.picture.getpixel((0, 0)))
        for glyph in drawn.glyphs:
            if len(glyph.kind) > 1:
                continue
            left, top, right, bottom = reader.pixels(drawn.picture, glyph.extent)
            cut = marks[top:bottom, left:right]
            among = string.digits if glyph.kind.isdigit() else string.ascii_uppercase
            if cut.shape[1] > cut.shape[0] / 2:  # bold letters are nearly as full as a wide I
                among = among.replace("I", "")
            # The shade of a header is no ink.
            wrong += reader.read(np.clip(cut - 40, 0, None), among) != glyph.kind
            total += 1
    assert total > 300
    assert wrong == 0


def test_ink_is_well_seen() -> None:
    weights = np.array((0.299, 0.587, 0.114))
    for drawn, _ in samples(100, 5):
        ground = np.array(drawn.picture.getpixel((0, 0)))
        assert ground.min() > 225
        pixels = np.asarray(drawn.picture, float)
        for glyph in drawn.glyphs:
            if len(glyph.kind) == 1:
                left, top, right, bottom = reader.pixels(drawn.picture, glyph.extent)
                cut = pixels[top:bottom, left:right] @ weights
                assert ground @ weights - cut.min() > 90


def test_docling_tags_are_nested_and_separated_as_in_the_document_checkpoints() -> None:
    line = r"<{0}>(?:<loc_\d+>){{4}}[A-Z0-9 ]+</{0}>\n"
    items = f"<unordered_list>(?:{line.format('list_item')})+</unordered_list>\n"
    table = r"<otsl>(?:<loc_\d+>){4}(?:<ched>[A-Z0-9]+)+<nl>(?:(?:<fcel>[A-Z0-9]+)+<nl>)+</otsl>"
    head, body = line.format("title"), f"(?:{line.format('text')}|{items}|{table}\n)"
    page = re.compile(f"<doctag>(?:{head})?{body}*</doctag>")
    used = set()
    for _, turns in samples(300, 6):
        said = answer(turns["page"])
        assert page.fullmatch(said), said
        assert join_parts(turns["page"].question) == "Convert this page to docling."
        used |= set(re.findall(r"<[^>]+>", said))
        if "page table" in turns:
            assert re.fullmatch(table, answer(turns["page table"]))
            assert f"<doctag>{answer(turns['page table'])}\n</doctag>" == said
            assert join_parts(turns["page table"].question) == "Convert table to OTSL."
    assert used <= set(pages.TAGS)
    assert len(set(pages.TAGS)) == len(pages.TAGS)
    assert {tag for tag in pages.TAGS if "loc" not in tag} <= used


def test_docling_tags_say_the_printed_words_where_they_are() -> None:
    for drawn, turns in samples(300, 7):
        elements = parsed(answer(turns["page"]))
        words = printed(drawn)
        texts = [word for element in elements for row in element.rows for word in row]
        assert texts == [word.text for word in words]
        for one, other in pairwise(elements):
            apart = 0 if one.tag == other.tag == "list_item" else 25
            assert other.box[1] >= one.box[3] + apart
        kinds = [element.tag for element in elements]
        assert kinds.count("list_item") == len(of_kind(drawn, "bullet"))
        assert kinds.count("otsl") == len(of_kind(drawn, "rule"))
        bullets = iter(of_kind(drawn, "bullet"))
        for element in elements:
            count = sum(len(row) for row in element.rows)
            ink, words = [word.box for word in words[:count]], words[count:]
            if element.tag == "list_item":
                ink.append(next(bullets).extent)
            if element.tag == "otsl":
                ink = [of_kind(drawn, "rule")[0].extent]
            assert_snug(element, around(ink), drawn.picture.size)


def assert_snug(element: Tagged, ink: Box, size: tuple[int, int]) -> None:
    """That the location holds the ink, is of whole units, and is no wider than it need be."""
    box = np.array(element.box) / 500
    exact = np.array(ink)
    pixel = 1.01 / np.tile(size, 2)
    assert all(edge % 25 == 0 for edge in element.box)
    assert (box[:2] <= exact[:2] + pixel[:2]).all()
    assert (box[2:] >= exact[2:] - pixel[2:]).all()
    if element.tag == "otsl":
        assert (np.abs(box - exact) <= pixel).all()
    slack = np.abs(box - exact)
    assert slack[0] < 0.05
    assert slack[2] < 0.11
    assert abs((box[1] + box[3]) - (exact[1] + exact[3])) / 2 < 0.02  # upright in the middle


def test_titles_are_the_large_print_on_top() -> None:
    titled = 0
    for drawn, turns in samples(200, 8):
        first, *others = parsed(answer(turns["page"]))
        high = [word.box[3] - word.box[1] for word in printed(drawn)]
        if first.tag != "title":
            assert max(high) < 1.25 * min(high)
            assert answer(turns["absent"]) == "There is no title."
            continue
        titled += 1
        assert all(element.tag != "title" for element in others)
        assert high[0] > 1.1 * max([0.0, *high[1:]])
        assert answer(turns["page title"]) == printed(drawn)[0].text
        assert "absent" not in turns
    assert 60 < titled < 180


def test_lists_are_told_and_counted_by_their_bullets() -> None:
    lists = 0
    for drawn, turns in samples(200, 9):
        rows = []
        for bullet in of_kind(drawn, "bullet"):
            middle = (bullet.extent[1] + bullet.extent[3]) / 2
            rows += [word.text for word in printed(drawn) if word.box[1] < middle < word.box[3]]
        assert ("page list" in turns) == ("page list count" in turns) == bool(rows)
        if rows:
            lists += 1
            assert answer(turns["page list"]) == ", ".join(rows)
            assert answer(turns["page list count"]) == f"{len(rows)}."
    assert lists > 40


def test_cells_are_told_by_their_row_and_column() -> None:
    rng = np.random.default_rng(10)
    asked = Counter()
    for drawn, turns in samples(300, 10):
        if "page cell" not in turns:
            assert not of_kind(drawn, "rule")
            continue
        left, top, right, bottom = of_kind(drawn, "rule")[0].extent
        words = [word for word in printed(drawn) if word.box[1] > top and word.box[3] < bottom]
        columns = len({round(50 * (word.box[0] - left) / (right - left)) // 8 for word in words})
        across = sorted({round(200 * middle(word)[1]) for word in words})
        rows = 1 + sum(b - a > 6 for a, b in pairwise(across))
        assert len(words) == rows * columns
        maker = next(maker for maker, _ in drawn.makers if maker(rng).family == "page cell")
        for _ in range(4):
            turn = maker(rng)
            row, column = (int(n) for n in re.findall(r"\d", join_parts(turn.question)))
            asked[row, column] += 1
            x = left + (right - left) * (column - 1) / columns
            y = top + (bottom - top) * (row - 1) / rows
            ends = x + (right - left) / columns, y + (bottom - top) / rows
            (there,) = [w for w in words if x < w.box[0] < ends[0] and y < w.box[1] < ends[1]]
            assert there.box[2] < ends[0]
            assert there.box[3] < ends[1]
            assert answer(turn) == there.text
            pointed = [part.boxes[0].extent for part in get_parts(turn.question) if part.boxes]
            held = [[w for w in words if inside(middle(w), box)] for box in pointed]
            assert [len(band) for band in held] == [columns, rows]
            assert [w for w in held[0] if w in held[1]] == [there]
    assert set(asked) == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


def middle(word: Printed) -> tuple[float, float]:
    left, top, right, bottom = word.box
    return (left + right) / 2, (top + bottom) / 2


def inside(point: tuple[float, float], box: Box) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def test_every_letter_of_an_answer_points_to_itself() -> None:
    for drawn, turns in samples(150, 11):
        boxes = {glyph.extent: glyph.kind for glyph in drawn.glyphs if len(glyph.kind) == 1}
        for turn in turns.values():
            spelled = []
            for part in get_parts(turn.answer):
                assert all(min(box.extent) >= 0 and max(box.extent) <= 1 for box in part.boxes)
                if re.fullmatch("[A-Z0-9]", part.text) and turn.family != "page list count":
                    (box,) = part.boxes
                    assert boxes[box.extent] == part.text
                    spelled.append(part.text)
            if turn.family == "page":
                assert len(spelled) == len(boxes)
                tagged = [part for part in get_parts(turn.answer) if "loc_" in part.text]
                places = [np.round(500 * np.array(part.boxes[0].extent)) for part in tagged]
                told = [element.box for element in parsed(answer(turn))]
                assert np.array_equal(places, told)


def test_held_out_words_are_never_printed_and_nothing_looks_like_something_else() -> None:
    texts = Counter(word.text for drawn, _ in samples(1500, 12) for word in printed(drawn))
    assert not set(texts) & set(HELD_OUT)
    assert not set(texts) & {"O", "I"}
    assert all(text.isdigit() or text.isalpha() for text in texts)
    assert all(text[0] != "0" for text in texts)
    assert texts.most_common(1)[0][1] < 0.06 * sum(texts.values())


def test_no_answer_dominates_its_family() -> None:
    rng = np.random.default_rng(13)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(2500):
        turn = turn_of(pages.sample(rng, (144, 192)), rng)
        answers[turn.family][answer(turn)] += 1
    assert set(answers) == FAMILIES
    bounds = {"page list count": 0.7, "page": 0.01, "page table": 0.02}
    for family in FAMILIES - {"absent"}:
        (_, most), *_ = answers[family].most_common()
        total = sum(answers[family].values())
        assert total > 40, family
        assert most / total < bounds.get(family, 0.08), family
    assert sum(answers["absent"].values()) < 0.05 * sum(sum(c.values()) for c in answers.values())
