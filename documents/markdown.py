"""Writes pages as Markdown, laid out as docling-core lays it out.

Where docling-core's own export drops something that was read, it is written here: items of nested
lists are indented below their item, keys and values are lines, captions of code stand below it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from mlx_smolvlm.documents.elements import FURNITURE, Element, Page, Table

IMAGE = "<!-- image -->"
_INDENT = 4 * " "
_IMAGE_LINK = re.compile(r"(!\[.*?\]\(.*?\))")
_NUMBER = re.compile(r"[+-]?(\d+(,\d{3})*|\d*)(\.\d*)?([eE][+-]?\d+)?")


def write_page(page: Page, furniture: bool = False) -> str:
    """Return a page as Markdown, a blank line between elements.

    Args:
        furniture: Write its header and footer too.
    """
    shown = (one for one in page.elements if furniture or one.kind not in FURNITURE)
    return _join_blocks(write_element(element) for element in shown)


def write_element(element: Element) -> str:
    """Return an element as Markdown: one or several blocks, or "" if it says nothing."""
    kind = element.kind
    text = escape(element.text)
    if kind == "title":
        return f"# {_join_lines(text)}"
    if kind == "heading":
        return f"{'#' * min(element.level + 1, 6)} {_join_lines(text)}"
    if kind == "list":
        return "\n".join(_write_list(element, 0))
    if kind == "list item":
        return "\n".join(_write_item(element, "-", 0))
    if kind in ("picture", "chart"):
        return _write_picture(element)
    if kind in ("table", "index") and element.table is not None:
        return _join_blocks(
            (
                *_write_captions(element),
                write_table(element.table),
                _break_lines(text),
                _rest(element),
            )
        )
    if kind == "code":
        return _join_blocks((f"```\n{element.text}\n```", *_write_captions(element)))
    if kind == "formula":
        return _join_blocks(
            (f"$${element.text}$$" if element.text else "", *_write_captions(element))
        )
    if kind == "inline":
        return " ".join(filter(None, map(_write_inline, element.children)))
    if kind == "checkbox":
        text = f"- [{'x' if element.label == 'selected' else ' '}] {text}"
    if kind == "key-value region":
        return _write_region(element)
    return _join_blocks((_break_lines(text), *_write_captions(element), _rest(element)))


def escape(text: str) -> str:
    """Return `text` with underscores, ampersands and angle brackets as plain characters."""
    pieces = _IMAGE_LINK.split(text)
    pieces[::2] = [re.sub(r"(?<!\\)_", r"\_", piece) for piece in pieces[::2]]
    return html.escape("".join(pieces), quote=False)


def write_table(table: Table) -> str:
    """Return a table of GitHub's Markdown; the first row is the header, numbers are right."""
    rows = [[_write_cell(text) for text in row] for row in table.make_grid()]
    if not rows:
        return ""
    header, *body = rows
    widths = [
        max([len(header[i]) + 2, *(len(row[i]) for row in body)]) for i in range(table.num_columns)
    ]
    right = [
        bool(body) and all(map(_is_number, (row[i] for row in body))) for i in range(len(widths))
    ]
    right = [is_right and any(row[i] for row in body) for i, is_right in enumerate(right)]

    def write_row(row: list[str]) -> str:
        cells = (
            cell.rjust(wide) if is_right else cell.ljust(wide)
            for cell, wide, is_right in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(cells)} |"

    line = "|".join("-" * (wide + 2) for wide in widths)
    return "\n".join((write_row(header), f"|{line}|", *map(write_row, body)))


def _write_cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "&#124;").strip()


def _is_number(text: str) -> bool:
    """Whether a cell counts as a number; an empty one does."""
    return not text or (any(c.isdigit() for c in text) and _NUMBER.fullmatch(text) is not None)


def _write_list(element: Element, depth: int) -> list[str]:
    """The lines of a list, `depth` lists deep."""
    lines: list[str] = []
    number = 0
    for child in element.children:
        if child.kind == "list":
            lines += _write_list(child, depth + 1)
            continue
        number += bool(child.text or (child.children and child.children[0].kind != "list"))
        marker = f"{number}." if element.is_ordered else "-"
        lines += _write_item(child, marker, depth, not lines)
    return lines


def _write_item(item: Element, marker: str, depth: int, is_first: bool = True) -> list[str]:
    """The lines of an item of a list, and of what is in it.

    A list in an item that says nothing else belongs to the item before, unless it is the first.
    """
    said = _break_lines(escape(item.text))
    is_nested = bool(said) or not is_first
    nested: list[str] = []
    for child in item.children:
        if child.kind == "list":
            nested += _write_list(child, depth + is_nested)
        else:
            block = write_element(child)
            said = f"{said} {block}".strip()
    lines = [f"{depth * _INDENT}{marker} {said}"] if said else []
    return [*lines, *nested]


def _write_picture(element: Element) -> str:
    """A picture's caption, its place, what it shows, and its table."""
    label = element.label.replace("_", " ").capitalize()
    table = "" if element.table is None else write_table(element.table)
    captions = _write_captions(element)
    return _join_blocks(
        (*captions, IMAGE, label, table, _break_lines(escape(element.text)), _rest(element))
    )


def _write_region(element: Element) -> str:
    """Keys with their values, a line each, then what belongs to none of them."""
    values = {child.label: child for child in element.children if child.kind == "value"}
    lines, said = [], set[str]()
    for child in element.children:
        if child.kind != "key":
            continue
        linked = [values[str(link)] for link in child.links if str(link) in values]
        said.update(one.label for one in linked)
        lines.append(
            f"{escape(child.text)} {', '.join(escape(one.text) for one in linked)}".strip()
        )
    for child in element.children:
        if child.kind not in ("key", "value"):
            lines.append(write_element(child))
        elif child.kind == "value" and child.label not in said:
            lines.append(escape(child.text))
    if element.text:
        lines.insert(0, escape(element.text))
    return "  \n".join(line for line in lines if line)


def _write_inline(element: Element) -> str:
    """A part of a line."""
    if element.kind == "code":
        return f"`{element.text}`"
    if element.kind == "formula":
        return f"${element.text}$"
    return write_element(element)


def _write_captions(element: Element) -> tuple[str, ...]:
    return () if element.caption is None else (write_element(element.caption),)


def _rest(element: Element) -> str:
    """What is within an element that is not made of others."""
    return _join_blocks(map(write_element, element.children))


def _join_blocks(blocks: Iterable[str]) -> str:
    return "\n\n".join(block for block in blocks if block)


def _join_lines(text: str) -> str:
    return text.replace("\n", " ")


def _break_lines(text: str) -> str:
    """Line breaks that Markdown keeps; blank lines stay between paragraphs."""
    return "\n\n".join(part.replace("\n", "  \n") for part in text.split("\n\n"))
