r"""Render Markdown for a terminal without losing a word.

CommonMark hides text that belongs to an answer: HTML, link targets, the backslashes of formulas,
the underscores of __init__. Markup that hides text is therefore shown as it is, and a block is
shown unrendered if one of its words would still be missing.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Delimiter
from markdown_it.token import Token
from rich import box
from rich.color import ColorSystem
from rich.console import COLOR_SYSTEMS, Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListElement, Markdown, TableElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

_THEME = Theme(
    {
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.code": "cyan",
        "markdown.block_quote": "none",
        "markdown.item.number": "none",
    }
)
_CODE_THEME = "ansi_dark"  # the terminal's own colors, without a background
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\$(?![\s$])[^$\n]+?(?<!\s)\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL
)
# A line with a bar, if the next one, which may be unfinished, does not say that it is no table.
_TABLE = re.compile(r"^[^\n|]*\|[^\n]*(?:\Z|\n[|: \t>-]*(?:\n|\Z))", re.MULTILINE)
_LAST_MARKER = re.compile(r"(?:^|\n)(?:[ \t]*(?:\d+[.)]|[-*+>#]))+[ \t]*\Z")
_LAST_WORD = re.compile(r"\S+\Z")
_EMPHASIS = re.compile(r"(`+)(?!`).+?\1|(\*\*?|~~)(?=\S).+?(?<=\S)\2")
_OPEN_EMPHASIS = re.compile(r"(?<!\w)(?:\*+|`+|~~)(?=\S)")
_MAX_WORD, _MAX_EMPHASIS = 60, 200  # characters that are waited for
_MAX_LINE = 1000  # characters of a line in which emphasis is looked for, which is quadratic
_MAX_LINES = 40  # of a paragraph that are rendered together
_PLAIN_LINE = re.compile(r"[^\W\d_]|<|\d+(?![\d.)])")  # begins no list, heading or other block
_PIECE = "piece"  # the type of a further part of a paragraph
_DECORATION = re.compile(r"[\s\u2022\u258c\u2500\u2501\u2502]+")  # bullets, quotes, borders


@dataclass(frozen=True)
class Block:
    """A part of an answer that is rendered alone; `is_tight` if no blank line precedes it."""

    text: str
    is_tight: bool


def split_blocks(text: str) -> list[Block]:
    """Split `text` into blocks, a block for each list item; joined, they are `text` again.

    A long paragraph is several blocks, since the last block of an answer is rendered each time
    that something is added to it. A page that was read from a picture may be one paragraph.
    """
    starts: list[tuple[int, str]] = []
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    for token in _PARSER.parse(text):
        is_item = token.type == "list_item_open" and token.level == 1
        is_block = token.level == 0 and token.nesting >= 0 and "list" not in token.type
        if token.map and (is_item or is_block):
            starts.append((token.map[0], token.type))
            if is_block and token.type == "paragraph_open":
                starts += ((start, _PIECE) for start in _cut_paragraph(lines, *token.map))
    if not starts:
        return [Block(text, True)] if text else []
    edges = [0, *(start for start, _ in starts[1:]), len(lines)]
    parts: list[Block] = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        types = [starts[n][1] for n in (number - 1, number)]
        follows_item = number > 0 and types == ["list_item_open"] * 2
        is_tight = (
            number == 0 or types[1] == _PIECE or (follows_item and bool(lines[start - 1].strip()))
        )
        parts.append(Block("".join(lines[start:end]), is_tight))
    return parts


def _cut_paragraph(lines: Sequence[str], start: int, end: int) -> Iterator[int]:
    """Yield lines at which a paragraph is cut; alone, what begins there is a paragraph too."""
    for number in range(start + 1, min(end, len(lines))):  # markdown-it breaks lines at \r, too
        if number - start >= _MAX_LINES and _PLAIN_LINE.match(lines[number]):
            yield number
            start = number


def cut_unsettled(text: str) -> str:
    """Return the beginning of an unfinished block that will look the same when it is finished.

    The rest is an unfinished word, line of code or emphasis, a list marker without its item, or
    a table, whose columns are as wide as their widest cells. A wrong guess only shows markup,
    such as an asterisk.
    """
    if text.lstrip().startswith(("```", "~~~")):
        return text[: text.rfind("\n") + 1]
    if table := _TABLE.search(text):
        text = text[: table.start()]
    last_word = _LAST_WORD.search(text)
    if last_word and len(last_word[0]) < _MAX_WORD:
        text = text[: last_word.start()]
    if marker := _LAST_MARKER.search(text):
        return text[: marker.start()]
    line_start = max(text.rfind("\n") + 1, len(text) - _MAX_LINE)
    line = _EMPHASIS.sub(lambda match: "x" * len(match[0]), text[line_start:])
    start = _OPEN_EMPHASIS.search(line)
    if start and len(line) - start.start() < _MAX_EMPHASIS:
        text = text[: line_start + start.start()]
    return text


class Line:
    """A line of rendered text."""

    def __init__(self, parts: Sequence[Segment] = (), colors: ColorSystem | None = None) -> None:
        self._parts, self._colors = parts, colors
        self.plain = "".join(part.text for part in parts)

    def format(self, start: int = 0) -> str:
        """Return the text from a character on, with escape sequences for its styles."""
        text = ""
        for part in self._parts:
            rest = part.text[max(start, 0) :]
            if rest:
                text += part.style.render(rest, color_system=self._colors) if part.style else rest
            start -= len(part.text)
        return text

    def format_rest(self, start: int) -> str:
        """Return the words from a character on, indented as those of the line are."""
        blanks = len(self.plain) - len(self.plain.lstrip(" \u2022"))
        rest = self.plain[start:]
        return " " * blanks + self.format(start + len(rest) - len(rest.lstrip()))


class Renderer:
    """Renders Markdown for the terminal that is stdout."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, theme=_THEME, highlight=False, emoji=False)

    def render(self, text: str, columns: int) -> list[Line]:
        """Return `text`, free of control characters, as lines of at most `columns` columns."""
        text = text.strip("\n")
        if not text.strip():
            return []
        rendered = self._render_lines(_Answer(text), columns)
        if not _has_words(rendered, text):
            rendered = self._render_lines(Text(text, overflow="fold"), columns)
        while rendered and not any(part.text.strip() for part in rendered[0]):
            rendered = rendered[1:]
        while rendered and not any(part.text.strip() for part in rendered[-1]):
            rendered = rendered[:-1]
        colors = COLOR_SYSTEMS.get(self._console.color_system or "")
        return [Line(line, colors) for line in rendered]

    def _render_lines(self, what: Markdown | Text, columns: int) -> list[list[Segment]]:
        options = self._console.options.update(width=columns, height=None)
        lines = self._console.render_lines(what, options, pad=False)
        return [_trim(line) for line in lines]


def _trim(line: list[Segment]) -> list[Segment]:
    """Return `line` without trailing blanks."""
    line = list(line)
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    return line


def _has_words(lines: list[list[Segment]], text: str) -> bool:
    """Return whether `lines` show every word of `text` in order; a line may break inside a word."""
    shown = _DECORATION.sub("", "".join(part.text for line in lines for part in line))
    place = 0
    for word in re.findall(r"\w+", text):
        place = shown.find(word, place) + len(word)
        if place < len(word):
            return False
    return True


class _Code(CodeBlock):
    """A code block below the name of its language."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.lexer_name != "text":
            yield Text(self.lexer_name, style="dim")
        code = str(self.text).rstrip("\n")
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, tab_size=4)


class _Heading(Heading):
    """A heading that is not centered."""

    LEVEL_ALIGN = {}  # noqa: RUF012 (as in the parent class)


class _Numbers(ListElement):
    """A numbered list whose numbers take no more columns than they need."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first = self.list_start or 0
        for number, item in enumerate(self.items, first):
            yield from item.render_number(console, options, number, first + len(self.items) - 1)


class _Table(TableElement):
    """A table that wraps wide cells instead of cutting them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        rows = [row.cells for row in self.body.rows] if self.body else []
        for cell in self.header.row.cells if self.header and self.header.row else ():
            heading = cell.content.copy()
            heading.stylize("bold")
            table.add_column(heading, overflow="fold", justify=cell.justify)
        for cells in rows:
            table.add_row(*(cell.content for cell in cells))
        yield table


class _Answer(Markdown):
    """An answer, parsed and rendered by the rules of this module."""

    elements = {  # noqa: RUF012 (as in the parent class)
        **Markdown.elements,
        "heading_open": _Heading,
        "ordered_list_open": _Numbers,
        "fence": _Code,
        "code_block": _Code,
        "table_open": _Table,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=_CODE_THEME)
        self.parsed = _PARSER.parse(text)
        _keep_line_breaks(self.parsed)


def _keep_line_breaks(tokens: list[Token]) -> None:
    """Show every line break, as in text that was read from a picture."""
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_line_breaks(token.children or [])


def _formula(state: StateInline, silent: bool) -> bool:
    """Leave $...$, $$...$$, \\(...\\) and \\[...\\] as they are."""
    match = _FORMULA.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        state.push("text", "", 0).content = match[0]
    state.pos = match.end()
    return True


def _escape(state: StateInline, silent: bool) -> bool:
    """Leave a backslash and the sign that it escapes as they are."""
    pair = state.src[state.pos : min(state.pos + 2, state.posMax)]
    if len(pair) < 2 or pair[0] != "\\" or pair[1].isalnum() or pair[1].isspace():
        return False
    if not silent:
        state.push("text", "", 0).content = pair
    state.pos += 2
    return True


def _stars(state: StateInline, silent: bool) -> bool:
    """Read stars around words as emphasis; a star inside a word is a product, as in 2*3*4."""
    marker = state.src[state.pos]
    if silent or marker not in "*_":
        return False
    scanned = state.scanDelims(state.pos, False)
    for _ in range(scanned.length):
        state.push("text", "", 0).content = marker
        if marker == "*":
            last = len(state.tokens) - 1
            state.delimiters.append(
                Delimiter(42, scanned.length, last, -1, scanned.can_open, scanned.can_close)
            )
    state.pos += scanned.length
    return True


def _make_parser() -> MarkdownIt:
    """Return a CommonMark parser without the rules that hide text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.disable(["reference", "entity", "autolink", "link", "image", "html_block"])
    parser.disable("html_inline")
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.inline.ruler.at("escape", _escape)
    parser.inline.ruler.at("emphasis", _stars)
    return parser


_PARSER = _make_parser()
