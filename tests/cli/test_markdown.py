"""Markdown on a terminal: no word gets lost, and blocks are the text."""

import io
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_smolvlm.cli.terminal import live, markdown
from mlx_smolvlm.cli.terminal.markdown import Renderer, cut_unsettled, split_blocks
from mlx_smolvlm.errors import escape_controls


def renderer() -> Renderer:
    one = Renderer()
    one._console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    return one


def shown(text: str, columns: int = 60) -> list[str]:
    """The lines that a terminal shows of `text`."""
    lines = [
        line.format()
        for block in split_blocks(text)
        for line in renderer().render(block.text, columns)
    ]
    screen = pyte.Screen(columns + 10, len(lines) + 1)
    pyte.Stream(screen).feed("".join(line + "\r\n" for line in lines))
    return [line.rstrip() for line in screen.display[: len(lines)]]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("[x] and [bold] and [/red]", ["[x] and [bold] and [/red]"]),
        ("[x](http://y.org 'title')", ["[x](http://y.org 'title')"]),
        ("![alt](a.png) <http://z.org>", ["![alt](a.png) <http://z.org>"]),
        ("[x]: http://y.org", ["[x]: http://y.org"]),
        ("<doctag><loc_12>Text</doctag>", ["<doctag><loc_12>Text</doctag>"]),
        ("<div>\nhtml\n</div>", ["<div>", "html", "</div>"]),
        ("<!-- note -->", ["<!-- note -->"]),
        ("a &lt; b &amp; c", ["a &lt; b &amp; c"]),
        (r"\*not\* \[x\] \\ \n", [r"\*not\* \[x\] \\ \n"]),
        ("2*3*4 and __init__ and a_b_c", ["2*3*4 and __init__ and a_b_c"]),
        ("$a_1*b*c$ and $5 or $6", ["$a_1*b*c$ and $5 or $6"]),
        ("$$\na*b*c\n$$", ["$$", "a*b*c", "$$"]),
        (r"\(a*b*c\) \[d*e*f\]", [r"\(a*b*c\) \[d*e*f\]"]),
        ("**bold** *em* ~~gone~~ `code`", ["bold em gone code"]),
        ("one\ntwo", ["one", "two"]),
        ("# Title\ntext", ["Title", "text"]),
        ("- [ ] todo\n- [x] done\n  - inner", [" • [ ] todo", " • [x] done", "    • inner"]),
        ("7. seven\n9. nine", [" 7 seven", " 9 nine"]),
        ("> said\n> more", ["▌ said", "▌ more"]),
        ("```python\nx = [1]\n\n", ["python", "x = [1]"]),
        ("**unclosed [x", ["**unclosed [x"]),
        ("| a |\n|---|\n| 1 | 2 |", ["| a |", "|---|", "| 1 | 2 |"]),
        (":smile: \U0001f600 \u6f22\u5b57", None),
        ("a" * 130, ["a" * 60, "a" * 60, "a" * 10]),
    ],
)
def test_samples(text: str, lines: list[str] | None) -> None:
    if lines is None:  # the emulator gives a wide character two cells
        assert [re.sub(r"\s", "", line) for line in shown(text)] == [re.sub(r"\s", "", text)]
    else:
        assert shown(text) == lines


def test_a_table_is_aligned() -> None:
    header, rule, *rows = shown("| name | n |\n|---|--:|\n| one | 1 |\n| two | 22 |")
    assert header.split() == ["name", "n"]
    assert set(rule.strip()) == {"─"}
    assert [row.split() for row in rows] == [["one", "1"], ["two", "22"]]
    assert {len(row) for row in rows} == {len(rows[0])}


def test_emphasis_is_drawn() -> None:
    bold, em = (line.format() for line in renderer().render("**bold**\n*em*", 60))
    assert bold == "\x1b[1mbold\x1b[0m"
    assert em == "\x1b[3mem\x1b[0m"


PIECES = st.sampled_from(
    [
        *("alpha", "beta", "42", "x", "漢字", "😀", "__init__", "word" * 30),
        *(" ", " ", "\n", "\n\n", "  ", "\t", "- ", "* ", "1. ", "> ", "# ", "    "),
        *(
            "*",
            "**",
            "_",
            "`",
            "```",
            "```py\n",
            "~~",
            "~~~\n",
            "|",
            "\n|---|---|\n",
            "| a | b |\n",
        ),
        *("[", "]", "[x]", "](u)", "[a]: b\n", "!", "<b>", "</b>", "<loc_9>", "<!--", "-->", "<"),
        *("\\", "\\*", "\\[", "\\]", "$", "$$", "&amp;", "&", "---\n", "===\n", "- [ ] ", ":"),
    ]
)


@given(pieces=st.lists(PIECES, max_size=40), columns=st.integers(2, 90))
@settings(max_examples=400, deadline=None)
def test_every_word_is_shown(pieces: list[str], columns: int) -> None:
    text = escape_controls("".join(pieces))
    parts = split_blocks(text)
    assert "".join(block.text for block in parts) == text
    place, seen = 0, "".join("".join(shown(text, columns)).split())
    seen = re.sub("[▌•─]", "", seen)
    for word in re.findall(r"\w+", text):
        place = seen.find(word, place) + len(word)
        assert place >= len(word), (word, text, seen)


def show_growing(pieces: Iterable[str], columns: Callable[[], int]) -> str:
    """What is written to the terminal while an answer arrives in pieces, without styles."""
    from mlx_smolvlm import Reply

    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "write_raw", written.append)
        patch.setattr(live, "columns_and_rows", lambda: (columns(), 12))
        patch.setattr(live, "hide_typing", live.contextlib.nullcontext)
        patch.setattr(live.LiveScreen, "_show_status", lambda *_: None)
        screen = live.LiveScreen(renderer())
        screen.begin("", Reply())
        text = ""
        for piece in pieces:
            screen._next_at = 0.0
            screen.add(piece)
            text += piece
        screen.finish(text)
        screen.close()
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(written))


def letters(text: str) -> str:
    return "".join(re.findall(r"\w", text))


@given(pieces=st.lists(PIECES, max_size=30), cut=st.data())
@settings(max_examples=200, deadline=None)
def test_every_word_of_a_growing_answer_is_printed_once(
    pieces: list[str], cut: st.DataObject
) -> None:
    """However the answer arrives, and however wide the terminal is meanwhile."""
    text, parts = "".join(pieces), []
    while text:
        size = cut.draw(st.integers(1, 20))
        parts.append(text[:size])
        text = text[size:]
    widths = st.one_of(st.just(60), st.integers(2, 90))
    output = show_growing(parts, lambda: cut.draw(widths))
    assert "\x1b" not in output
    assert letters(output) == letters(escape_controls("".join(parts)))


@pytest.mark.parametrize(
    "text",
    [
        "Plain words that go on until the line breaks, and on, and on, wordswithoutanend.",
        "# A **bold** heading\n\n- an *item*, `code`, and ~~more~~\n- 2 * 3 = 6 and 4*5\n",
        "1. one\n2. two\n\n- a\n  1. b\n  2. c\n\n> A **quote** that\n> goes on\n\n---\n\nText",
        "```python\ndef name(word):\n    return 1\n\n\nx = 2\n```\n\nText",
        "Before\n| a | b |\n|---|--:|\n| 1 | wide cell |\n| 22 | 3 |\n\nAfter, which is text",
        "Costs | of 5\nand more",
        "*unclosed, but the line\nhas ended",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_look_of_what_is_printed_does_not_change(text: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert show_growing(pieces, lambda: 40) == show_growing([text], lambda: 40)


def test_a_page_is_not_rendered_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def render(self: Renderer, text: str, columns: int, real: Any = Renderer.render) -> Any:
        sizes.append(len(text))
        return real(self, text, columns)

    monkeypatch.setattr(Renderer, "render", render)
    lines = [f"Line {n} of *a page*" if n % 7 else f"<loc_{n}>{n}. (" for n in range(300)]
    pieces = [line + "\n" for line in lines]
    output = show_growing(pieces, lambda: 40)
    assert output.split("\n")[:-1] == [line.replace("*", "") for line in lines]
    assert max(sizes) < 50 * 25  # 6000 if it is one block
    sizes.clear()
    assert show_growing(["".join(pieces)], lambda: 40) == output


def test_a_carriage_return_does_not_count_as_a_line_of_a_long_paragraph() -> None:
    text = "word\r" * 90
    assert "".join(block.text for block in split_blocks(text)) == text


def test_a_row_of_number_signs_is_no_work() -> None:
    text = "#" * 26 + " word word"
    start = time.process_time()
    assert cut_unsettled(text) == text[:-4]
    assert time.process_time() - start < 1  # it took 8 s, and twice as long for each more


def test_a_block_that_would_lose_a_word_is_shown_as_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lossy(markdown.Text):
        def __init__(self, text: str) -> None:
            super().__init__(text.replace("two", ""))

    monkeypatch.setattr(markdown, "_Answer", Lossy)
    assert shown("one **two** three") == ["one **two** three"]
