"""Writes pages as HTML sections, without styles and scripts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from mlx_smolvlm.documents.elements import FURNITURE, Element, Page, Table

_TAGS = {
    "title": "h1", "text": "p", "caption": "p", "footnote": "aside", "page header": "header",
    "page footer": "footer", "list item": "li", "key": "dt", "value": "dd", "reference": "p",
}  # fmt: skip
_SCOPES = {"column header": ' scope="col"', "row header": ' scope="row"'}


def write_page(page: Page, furniture: bool = False) -> str:
    """Return a page as an HTML section.

    Args:
        furniture: Write its header and footer too.
    """
    shown = [one for one in page.elements if furniture or one.kind not in FURNITURE]
    return f"<section>\n{_write_all(shown)}\n</section>"


def _write_all(elements: Iterable[Element]) -> str:
    return "\n".join(filter(None, map(write_element, elements)))


def write_element(element: Element) -> str:
    """Return an element as HTML; everything that it says is escaped."""
    kind, text = element.kind, _break_lines(element.text)
    inner = _write_all(element.children)
    caption = "" if element.caption is None else _break_lines(element.caption.text)
    if kind == "heading":
        level = max(1, min(element.level + 1, 6))
        return f"<h{level}>{text}</h{level}>"
    if kind == "list":
        name = "ol" if element.is_ordered else "ul"
        return f"<{name}>\n{inner}\n</{name}>"
    if element.table is not None and kind in ("table", "index"):
        rest = "\n".join(filter(None, (f"<p>{text}</p>" if text else "", inner)))
        return "\n".join(filter(None, (write_table(element.table, caption), rest)))
    if kind in ("picture", "chart"):
        return _write_figure(element, caption)
    if kind == "code":
        name = f' class="language-{escape(element.label.lower())}"' if element.label else ""
        text = f"<pre><code{name}>{escape(element.text, quote=False)}</code></pre>"
        return (
            f"<figure>\n{text}\n<figcaption>{caption}</figcaption>\n</figure>" if caption else text
        )
    if kind == "formula":
        return _wrap("p", f"\\[{escape(element.text, quote=False)}\\]", caption, inner)
    if kind == "checkbox":
        checked = " checked" if element.label == "selected" else ""
        return f'<p><input type="checkbox" disabled{checked}> {text}</p>'
    if kind == "inline":
        return f"<p>{' '.join(map(_write_inline, element.children))}</p>"
    if kind == "key-value region":
        return _wrap("dl", text, caption, inner)
    return _wrap(_TAGS.get(kind, "div"), text, caption, inner)


def _wrap(name: str, *parts: str) -> str:
    """The parts that say something in an element; "" if none does."""
    said = "\n".join(filter(None, parts))
    return f"<{name}>{said}</{name}>" if said else ""


def _write_figure(element: Element, caption: str) -> str:
    """A picture, of which the page has the place and not the pixels, with what is read of it."""
    table = "" if element.table is None else write_table(element.table, "")
    label = element.label.replace("_", " ").capitalize()
    parts = (
        f"<p>{escape(label)}</p>" if label else "",
        table,
        f"<p>{_break_lines(element.text)}</p>" if element.text else "",
        _write_all(element.children),
        f"<figcaption>{caption}</figcaption>" if caption else "",
    )
    return "\n".join(("<figure>", *filter(None, parts), "</figure>"))


def write_table(table: Table, caption: str = "") -> str:
    """Return a table as HTML, with spans and header cells; `caption` is HTML already."""
    rows: list[list[str]] = [[] for _ in range(table.num_rows)]
    for cell in sorted(table.cells, key=lambda one: (one.row, one.column)):
        name = "td" if cell.kind == "text" else "th"
        spans = f' rowspan="{cell.row_span}"' if cell.row_span > 1 else ""
        spans += f' colspan="{cell.column_span}"' if cell.column_span > 1 else ""
        said = f"<{name}{_SCOPES.get(cell.kind, '')}{spans}>{_break_lines(cell.text)}</{name}>"
        rows[cell.row].append(said)
    head = [f"<caption>{caption}</caption>"] if caption else []
    body = [f"<tr>{''.join(row)}</tr>" for row in rows]
    return "\n".join(("<table>", *head, *body, "</table>"))


def _write_inline(element: Element) -> str:
    """A part of a line."""
    if element.kind == "code":
        return f"<code>{escape(element.text, quote=False)}</code>"
    if element.kind == "formula":
        return f"\\({escape(element.text, quote=False)}\\)"
    return _break_lines(element.text)


def _break_lines(text: str) -> str:
    return escape(text, quote=False).replace("\n", "<br>")
