"""Questions about a page and their answers, among them the page in DocTags.

The prompts and the tags are those of the document checkpoints; a location is of 0 to 500.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from demo_recipe.items import Box, Part, Turn, TurnMaker, fill
from demo_recipe.page_layout import UNITS, Element, Page, Word
from demo_recipe.questions import pick

_STEP = 500 // UNITS
_NAMES = ("doctag", "title", "text", "unordered_list", "list_item", "otsl")
TAGS: tuple[str, ...] = (
    *(f"<{name}>" for name in _NAMES),
    *(f"</{name}>" for name in _NAMES),
    *(f"<{name}>" for name in ("ched", "fcel", "nl")),
    *(f"<loc_{_STEP * i}>" for i in range(UNITS + 1)),
)

PAGE = "Convert this page to docling."
TABLE = "Convert table to OTSL."
TITLE = (
    "What is the title?", "Read the title.", "What is the title of this page?",
    "What does the title say?", "Which title does the page have?", "What is the headline?",
    "What's the title?", "Tell me the title.",
)  # fmt: skip
ITEMS = (
    "List the items.", "Read the list.", "What is on the list?", "Which items are on the list?",
    "What does the list say?", "Which items does the list have?", "What items are listed?",
)  # fmt: skip
ITEM_COUNT = (
    "How many list items are there?", "How many items are on the list?", "Count the list items.",
    "How many items does the list have?", "How long is the list?", "How many items are listed?",
)  # fmt: skip
AT_CELL = (
    "What is in row {}, column {}?", "What does row {}, column {} say?", "Read row {}, column {}.",
    "What stands in row {}, column {}?", "Read the cell in row {}, column {}.",
    "Which value is in row {}, column {}?", "What is the value in row {}, column {}?",
)  # fmt: skip


def makers(page: Page) -> tuple[tuple[TurnMaker, float], ...]:
    """Who asks about `page`, with weights."""
    asking: list[tuple[TurnMaker, float]] = [(partial(ask_page, page), 0.5)]
    asking.append((partial(ask_title, page), 0.12 if page.of("title") else 0.02))
    if page.of("list_item"):
        asking += [(partial(ask_items, page), 0.12), (partial(ask_item_count, page), 0.06)]
    if page.of("table"):
        asking.append((partial(ask_cell, page), 0.18))
    if len(page.elements) == 1 and page.of("table"):
        asking.append((partial(ask_table, page), 0.4))
    return tuple(asking)


def ask_page(page: Page, rng: np.random.Generator) -> Turn:
    """The whole page in DocTags; list items that follow each other are one list."""
    parts = [Part("<doctag>")]
    listed = False
    for element in page.elements:
        item = element.kind == "list_item"
        if listed and not item:
            parts.append(Part("</unordered_list>\n"))
        if item and not listed:
            parts.append(Part("<unordered_list>", _make_box(element)))
        listed = item
        parts += [*_tag_element(page, element), Part("\n")]
    if listed:
        parts.append(Part("</unordered_list>\n"))
    return Turn("page", PAGE, (*parts, Part("</doctag>")))


def ask_table(page: Page, rng: np.random.Generator) -> Turn:
    """The one table of a page, without the page around it."""
    return Turn("page table", TABLE, _tag_element(page, page.of("table")[0]))


def ask_title(page: Page, rng: np.random.Generator) -> Turn:
    """The title as printed; where there is none, that there is none."""
    titles = page.of("title")
    if not titles:
        return Turn("absent", pick(rng, TITLE), "There is no title.", "title")
    return Turn("page title", pick(rng, TITLE), tuple(_spell_words(page, titles[0].words)))


def ask_items(page: Page, rng: np.random.Generator) -> Turn:
    """The list's items as printed, with commas between them."""
    parts: list[Part] = []
    for item in page.of("list_item"):
        parts += [Part(", ")] if parts else []
        parts += _spell_words(page, item.words)
    return Turn("page list", pick(rng, ITEMS), tuple(parts))


def ask_item_count(page: Page, rng: np.random.Generator) -> Turn:
    """How many items the list has."""
    items = page.of("list_item")
    boxes = tuple(Box(page.extent(item.bullet)) for item in items if item.bullet)
    return Turn("page list count", pick(rng, ITEM_COUNT), (Part(str(len(items)), boxes), Part(".")))


def ask_cell(page: Page, rng: np.random.Generator) -> Turn:
    """One cell of the table as printed; the header is row 1."""
    table = page.of("table")[0]
    row, column = int(rng.integers(len(table.rows))), int(rng.integers(len(table.rows[0])))
    left, top, right, bottom = table.extent
    high, wide = (bottom - top) / len(table.rows), (right - left) / len(table.rows[0])
    across = Box((left, top + row * high, right, top + (row + 1) * high))
    down = Box((left + column * wide, top, left + (column + 1) * wide, bottom))
    numbers = (Part(str(row + 1), (across,)), Part(str(column + 1), (down,)))
    question = fill(pick(rng, AT_CELL), *numbers)
    return Turn("page cell", question, tuple(_spell_words(page, (table.rows[row][column],))))


def _tag_element(page: Page, element: Element) -> tuple[Part, ...]:
    """One element in DocTags: its tag, its location, its words."""
    tag = "otsl" if element.kind == "table" else element.kind
    box = _make_box(element)
    place = "".join(f"<loc_{_STEP * edge}>" for edge in element.box)
    parts = [Part(f"<{tag}>{place}", box)]
    if element.kind == "table":
        for i, row in enumerate(element.rows):
            for word in row:
                cell = "<fcel>" if i else "<ched>"
                parts += [Part(cell, _make_word_box(page, word)), *_spell_words(page, (word,))]
            parts.append(Part("<nl>", _make_word_box(page, row[-1])))
    else:
        parts += _spell_words(page, element.words)
    return (*parts, Part(f"</{tag}>", box))


def _spell_words(page: Page, words: tuple[Word, ...]) -> list[Part]:
    """Words with spaces between them, a part for each letter with its box."""
    parts: list[Part] = []
    for word in words:
        parts += [Part(" ")] if parts else []
        for character, box in zip(word.text, word.letters, strict=True):
            parts.append(Part(character, (Box(page.extent(box)),)))
    return parts


def _make_box(element: Element) -> tuple[Box, ...]:
    return (Box(element.extent),)


def _make_word_box(page: Page, word: Word) -> tuple[Box, ...]:
    """The box around all letters of `word`."""
    lefts, tops, rights, bottoms = zip(*word.letters, strict=True)
    return (Box(page.extent((min(lefts), min(tops), max(rights), max(bottoms)))),)
