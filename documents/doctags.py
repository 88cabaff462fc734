"""Reads DocTags, the markup that document models write, into pages of elements.

    <doctag><title><loc_10><loc_20><loc_490><loc_40>Annual report</title>...</doctag>

A model may stop anywhere and forget any tag, so everything is read: an element that is not closed
keeps its text, text outside of elements becomes one, tags that close nothing are skipped, and rows
of a table may have different lengths. docling-core's reader, a regular expression, drops these.

A tag is one of the names below in angle brackets; anything else in angle brackets is text, as in
`a<b`. `read_token_ids` tells them apart for sure, since there a tag is one token.

Source: https://github.com/docling-project/docling-core, types/doc/tokens.py (2.104.0), and the
SmolDocling paper, arXiv 2503.11576, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_smolvlm.documents.elements import Cell, CellKind, Element, Kind, Location, Page, Table

# Tags that hold text or elements, and the kinds of elements that they become.
_KINDS: dict[str, Kind] = {
    "title": "title", "text": "text", "paragraph": "text", "list_item": "list item",
    "ordered_list": "list", "unordered_list": "list", "list": "list", "otsl": "table",
    "table": "table", "picture": "picture", "chart": "chart", "formula": "formula",
    "smiles": "formula", "code": "code", "caption": "caption", "footnote": "footnote",
    "page_header": "page header",
    "page_footer": "page footer", "checkbox_selected": "checkbox",
    "checkbox_unselected": "checkbox", "key_value_region": "key-value region",
    "inline": "inline", "document_index": "index", "form": "form", "reference": "reference",
    **{f"section_header_level_{level}": "heading" for level in range(7)},
}  # fmt: skip
_CELLS: dict[str, CellKind] = {
    "fcel": "text", "ecel": "text", "ched": "column header", "rhed": "row header",
    "srow": "section",
}  # fmt: skip
_SPANS = {"lcel", "ucel", "xcel"}  # continue the cell to the left, above, or both
_FRAMES = {"doctag", "page_break", "group"}
_DEEPEST = 24  # elements within each other; what is deeper becomes their sibling
_PHRASES: frozenset[Kind] = frozenset({"text", "formula", "code", "checkbox", "reference"})
_HOLD: dict[Kind, frozenset[Kind]] = {  # what may be in what
    "list": frozenset({"list item", "list"}),
    "list item": frozenset({"list", "inline", *_PHRASES}),
    "inline": _PHRASES,
    "key-value region": frozenset({"key", "value", "text", "checkbox"}),
    "form": frozenset({"key-value region", "key", "value", "list", "table", "picture", *_PHRASES}),
    "picture": frozenset({"table", "list", "text"}),
}
_CAPTIONED = {"table", "picture", "chart", "code", "formula", "index", "form"}
# What a picture shows. docling-core knows these names; a new one is text that no picture has.
FIGURES = frozenset({
    "logo", "photograph", "icon", "engineering_drawing", "line_chart", "bar_chart", "other",
    "table", "flow_chart", "screenshot_from_computer", "signature", "screenshot_from_manual",
    "geographical_map", "pie_chart", "page_thumbnail", "stamp", "music", "calendar", "qr_code",
    "bar_code", "full_page_image", "scatter_plot", "chemistry_structure", "topographical_map",
    "crossword_puzzle", "box_plot", "stacked_bar_chart", "scatter_chart", "heatmap",
    "natural_image", "remote_sensing", "screenshot", "molecular_structure", "markush_structure",
    "picture_group", "line", "dot_line", "vbar_categorical", "hbar_categorical",
    "chemistry_molecular_structure", "chemistry_markush_structure", "electrical_diagram",
    "cad_drawing", "map",
})  # fmt: skip
_NAMES = frozenset((*_KINDS, *_CELLS, *_SPANS, "nl", *_FRAMES, *FIGURES))
_TAG = re.compile(
    r"<(/?)(?:(loc|key|value|link)_(\d{1,9})|([a-z][a-z_0-9]*)|_([A-Za-z0-9+#. _-]{1,40})_)>"
)
_OUTER = re.compile(r"^\s*Assistant:(?=\s*<)|<(?:\|[a-z_]+\||end_of_utterance)>")  # of a chat


@dataclass(frozen=True)
class Tag:
    """A tag: `name` without its number, which is -1 if it has none."""

    name: str
    is_end: bool = False
    number: int = -1


Event = Tag | str


def split_tags(text: str) -> Iterator[Event]:
    """Yield the tags of `text`, and the text between them."""
    start = 0
    for found in _TAG.finditer(text):
        tag = _make_tag(found)
        if tag is None:
            continue
        if found.start() > start:
            yield text[start : found.start()]
        yield tag
        start = found.end()
    if start < len(text):
        yield text[start:]


def _make_tag(found: re.Match[str]) -> Tag | None:
    """Return the tag that `_TAG` found, or None if it is text."""
    end, numbered, number, name, language = found.groups()
    if numbered:
        return Tag(numbered, bool(end), int(number))
    if language:
        return None if end else Tag(f"_{language}_")
    return Tag(name, bool(end)) if name in _NAMES else None


def read_text(text: str) -> list[Page]:
    """Read DocTags, and return the pages; a text without any tag is one page with that text."""
    return read_events(split_tags(_OUTER.sub("", text)))


def read_token_ids(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Page]:
    """Read the token ids of DocTags, and return the pages.

    Args:
        decode: Returns the text of token ids, with special tokens.
    """
    return read_events(_split_tokens(token_ids, decode))


def _split_tokens(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[Event]:
    """Yield a tag for each token that is one, and the text of the tokens between them."""
    waiting: list[int] = []
    for token_id in token_ids:
        piece = decode([token_id])
        found = _TAG.fullmatch(piece)
        tag = None if found is None else _make_tag(found)
        if tag is None and not _OUTER.fullmatch(piece):
            waiting.append(token_id)
            continue
        if waiting:
            yield decode(waiting)
            waiting = []
        if tag is not None:
            yield tag
    if waiting:
        yield decode(waiting)


@dataclass
class _Open:
    """An element that is being read."""

    tag: Tag
    kind: Kind
    places: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)
    cells: list[tuple[str, list[str]]] = field(default_factory=list)  # name, pieces of text
    caption: Element | None = None
    label: str = ""
    links: list[int] = field(default_factory=list)

    def close(self, is_closed: bool) -> Element:
        """Return the element."""
        name = self.tag.name
        text = "".join(self.pieces)
        children = tuple(self.children)
        kind = self.kind
        label = self.label
        if kind == "checkbox":
            label = name.removeprefix("checkbox_")
        elif kind in ("key", "value"):
            label = str(self.tag.number)
        return Element(
            kind=kind,
            text=text if kind == "code" else text.strip(),
            location=make_location(self.places),
            level=int(name[-1]) if kind == "heading" else 0,
            label=label,
            is_ordered=name == "ordered_list",
            children=children,
            caption=self.caption,
            table=make_table(self.cells) if self.cells else None,
            links=tuple(self.links),
            is_closed=is_closed,
        )


class _Reader:
    """Elements that are open, from the outermost, and pages that are read."""

    def __init__(self) -> None:
        self.pages: list[Page] = []
        self.elements: list[Element] = []
        self.open: list[_Open] = []
        self.has_begun = False
        self.has_ended = False

    def add_element(self, element: Element) -> None:
        """Add a finished element to the innermost open one, or to the page."""
        if not self.open:
            self.elements.append(element)
        elif element.kind == "caption" and self.open[-1].caption is None:
            self.open[-1].caption = element
        else:
            self.open[-1].children.append(element)

    def close_last(self, is_closed: bool) -> None:
        """Close the innermost element."""
        self.add_element(self.open.pop().close(is_closed))

    def close_all(self) -> None:
        """Close what is still open, as cut off."""
        while self.open:
            self.close_last(False)

    def end_page(self, is_closed: bool) -> None:
        """Close what is open, and begin a new page."""
        self.close_all()
        self.pages.append(Page(tuple(self.elements), is_closed))
        self.elements = []

    def read_tag(self, tag: Tag) -> None:
        """Act on one tag."""
        name = tag.name
        if name == "doctag":
            self._read_frame(tag)
        elif name == "page_break":
            self.end_page(True)
        elif tag.is_end:
            self._end(tag)
        elif name == "loc":
            if self.open:
                self.open[-1].places.append(tag.number)
        elif name == "link":
            if self.open:
                self.open[-1].links.append(tag.number)
        elif name in _CELLS or name in _SPANS or name == "nl":
            self._begin_cell(name)
        elif self.open and self._read_label(name):
            return
        elif name in ("key", "value"):
            self._begin(tag, "key" if name == "key" else "value")
        elif name in _KINDS:
            self._begin(tag, _KINDS[name])
        else:
            self.read_words(f"<{name}>")

    def _read_frame(self, tag: Tag) -> None:
        """Begin or end a document."""
        if tag.is_end:
            self.end_page(True)
        elif self.elements or self.open:
            self.end_page(False)

    def _read_label(self, name: str) -> bool:
        """Take `name` as what the open picture shows, or as the language of code."""
        last = self.open[-1]
        if last.kind in ("picture", "chart") and name in FIGURES and not last.label:
            last.label = name
            return True
        if name.startswith("_"):
            if last.kind == "code" and not last.label and not "".join(last.pieces).strip():
                last.label = name.strip("_")
            else:
                last.pieces.append(f"<{name}>")
            return True
        return False

    def _begin(self, tag: Tag, kind: Kind) -> None:
        """Open an element, after those are closed that cannot hold it."""
        while self.open and (not _can_hold(self.open[-1], kind) or len(self.open) >= _DEEPEST):
            self.close_last(False)
        self.open.append(_Open(tag, kind))

    def _begin_cell(self, name: str) -> None:
        """Add a cell, or the end of a row, to the innermost table; begin one if there is none."""
        for one in reversed(self.open):
            if one.kind in ("table", "chart", "index", "picture"):
                while self.open[-1] is not one:
                    self.close_last(False)
                one.cells.append((name, []))
                return
        self._begin(Tag("otsl"), "table")
        self.open[-1].cells.append((name, []))

    def _end(self, tag: Tag) -> None:
        """Close the innermost element of that tag, and what is open within it."""
        for depth in range(len(self.open) - 1, -1, -1):
            one = self.open[depth].tag
            if (one.name, one.number) == (tag.name, tag.number):
                while len(self.open) > depth + 1:
                    self.close_last(False)
                self.close_last(True)
                return

    def read_words(self, text: str) -> None:
        """Add text to the innermost element, or to a text of its own."""
        if not self.open:
            if text.strip():
                self.elements.append(Element("text", text.strip()))
        elif self.open[-1].cells and self.open[-1].cells[-1][0] in _CELLS:
            self.open[-1].cells[-1][1].append(text)
        elif self.open[-1].kind in ("list", "inline", "key-value region") or self.open[-1].cells:
            if text.strip():
                self.add_element(Element("text", text.strip()))
        else:
            self.open[-1].pieces.append(text)


def _can_hold(outer: _Open, inner: Kind) -> bool:
    """Whether an open element may have one of the kind `inner` in it."""
    if inner == "caption":
        return outer.kind in _CAPTIONED and outer.caption is None
    if inner == "text" and outer.kind == "list item":
        return not "".join(outer.pieces).strip()
    return inner in _HOLD.get(outer.kind, ())


def read_events(events: Iterable[Event]) -> list[Page]:
    """Read tags and the text between them, and return the pages."""
    reader = _Reader()
    for event in events:
        if isinstance(event, Tag):
            reader.read_tag(event)
        else:
            reader.read_words(event)
    if reader.open or reader.elements or not reader.pages:
        reader.end_page(False)
    return reader.pages


def make_location(places: Sequence[int]) -> Location | None:
    """Return the location of the first four `places`, within the page; None of fewer."""
    if len(places) < 4:
        return None
    x0, y0, x1, y1 = (min(place, 500) for place in places[:4])
    return Location(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def make_table(cells: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Return the table of OTSL cells in their order.

    A row that is too short ends with gaps. A cell spans to the right over "lcel" and "xcel", and
    down over "ucel" and "xcel", as far as no other cell is in the way.

    Args:
        cells: The tag ("nl" ends a row) and the pieces of text of each.
    """
    rows: list[list[tuple[str, str]]] = [[]]
    for name, pieces in cells:
        if name == "nl":
            rows.append([])
        else:
            rows[-1].append((name, "".join(pieces).strip()))
    rows = [row for row in rows if row]
    columns = max((len(row) for row in rows), default=0)
    taken: set[tuple[int, int]] = set()
    found = []
    for y, row in enumerate(rows):
        for x, (name, text) in enumerate(row):
            if name in _SPANS and ((y, x) in taken or not text):
                continue
            wide = _count_right(row, x)
            high = _count_down(rows, y, x, wide)
            taken.update((y + i, x + j) for i in range(high) for j in range(wide))
            kind = _CELLS.get(name, "text")
            found.append(Cell(text, y, x, high, wide, kind))
    return Table(tuple(found), len(rows), columns)


def _count_right(row: Sequence[tuple[str, str]], x: int) -> int:
    """How many columns the cell at `x` covers."""
    wide = 1
    while x + wide < len(row) and row[x + wide][0] in ("lcel", "xcel"):
        wide += 1
    return wide


def _count_down(rows: Sequence[Sequence[tuple[str, str]]], y: int, x: int, wide: int) -> int:
    """How many rows the cell at `y` and `x` covers, all of them `wide` columns."""
    high = 1
    while y + high < len(rows):
        below = rows[y + high][x : x + wide]
        if len(below) < wide or any(name not in ("ucel", "xcel") for name, _ in below):
            break
        high += 1
    return high
