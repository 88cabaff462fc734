"""Pages of elements: what kind each element is, what it says, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "title", "heading", "text", "list", "list item", "table", "picture", "chart", "formula",
    "code", "caption", "footnote", "page header", "page footer", "checkbox", "key-value region",
    "key", "value", "inline", "index", "form", "reference",
]  # fmt: skip
CellKind = Literal["text", "column header", "row header", "section"]

# What belongs to the page and not to the text that runs through it.
FURNITURE: frozenset[Kind] = frozenset({"page header", "page footer"})


@dataclass(frozen=True)
class Location:
    """A rectangle on a page, in 1/500 of its width and height, from the top left."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Cell:
    """A cell of a table, which covers `row_span` rows and `column_span` columns."""

    text: str
    row: int
    column: int
    row_span: int = 1
    column_span: int = 1
    kind: CellKind = "text"


@dataclass(frozen=True)
class Table:
    """A table of `num_rows` by `num_columns`; no two cells overlap, and gaps are empty."""

    cells: tuple[Cell, ...]
    num_rows: int
    num_columns: int

    def make_grid(self) -> list[list[str]]:
        """Return the text of each place, row by row; a cell is repeated where it spans."""
        grid = [[""] * self.num_columns for _ in range(self.num_rows)]
        for cell in self.cells:
            for row in range(cell.row, cell.row + cell.row_span):
                for column in range(cell.column, cell.column + cell.column_span):
                    grid[row][column] = cell.text
        return grid


@dataclass(frozen=True)
class Element:
    """A part of a page.

    Attributes:
        text: What it says; LaTeX for a formula, the program for code, "" where `children`,
            `table` or `caption` hold what there is.
        location: Where it is; None if that is not said.
        level: Of a heading, 1 to 6; 0 if it has none. Of other kinds 0.
        label: What a picture or chart shows ("bar_chart"), the language of code ("Python"), whether
            a checkbox is "selected" or "unselected", and the number of a key or a value.
        is_ordered: Whether the items of a list are numbered.
        children: Items of a list, parts of an inline group, keys and values of a region.
        links: The numbers of the values that belong to a key.
        is_closed: Whether its end was read; False marks where a page was cut off.
    """

    kind: Kind
    text: str = ""
    location: Location | None = None
    level: int = 0
    label: str = ""
    is_ordered: bool = False
    children: tuple[Element, ...] = ()
    caption: Element | None = None
    table: Table | None = None
    links: tuple[int, ...] = ()
    is_closed: bool = True

    def walk(self) -> Iterator[Element]:
        """Yield this element and all within it, each before those within it."""
        yield self
        if self.caption is not None:
            yield from self.caption.walk()
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Page:
    """The elements of a page, in reading order.

    Attributes:
        is_closed: Whether the end of the page was read.
    """

    elements: tuple[Element, ...] = ()
    is_closed: bool = True

    def walk(self) -> Iterator[Element]:
        """Yield all elements, each before those within it."""
        for element in self.elements:
            yield from element.walk()
