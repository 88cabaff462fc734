"""Markdown of documents: what each element looks like, and every word of it."""

import random
import re

import pytest

from mlx_smolvlm.documents.document import Document
from tests.helpers.doctags_cases import make_pieces


def convert(text: str, furniture: bool = False) -> str:
    """The Markdown of DocTags."""
    return Document.from_doctags(text).to_markdown(furniture)


@pytest.mark.parametrize(
    ("tags", "written"),
    [
        ("<title>A\nB</title>", "# A B"),
        ("<section_header_level_0>A</section_header_level_0>", "# A"),
        ("<section_header_level_1>A</section_header_level_1>", "## A"),
        ("<section_header_level_6>A</section_header_level_6>", "###### A"),
        ("<text>a_b < c & d</text>", r"a\_b &lt; c &amp; d"),
        ("<text>one\ntwo\n\nthree</text>", "one  \ntwo\n\nthree"),
        ("<formula>a<b_1</formula>", "$$a<b_1$$"),
        ("<code><_Python_>a_b = 1</code>", "```\na_b = 1\n```"),
        ("<checkbox_selected>On</checkbox_selected>", "- [x] On"),
        ("<checkbox_unselected>Off</checkbox_unselected>", "- [ ] Off"),
        (
            "<picture><pie_chart><caption>Fig. 1</caption></picture>",
            "Fig. 1\n\n<!-- image -->\n\nPie chart",
        ),
        ("<inline><text>See</text><code>x_1</code><formula>y</formula></inline>", "See `x_1` $y$"),
        ("<page_header>Head</page_header><text>Body</text>", "Body"),
        ("<list_item>alone</list_item>", "- alone"),
    ],
)  # fmt: skip
def test_elements(tags: str, written: str) -> None:
    assert convert(tags) == written


def test_lists_are_numbered_and_indented() -> None:
    tags = (
        "<ordered_list><list_item>a</list_item><list_item>b<unordered_list><list_item>c"
        "</list_item></unordered_list></list_item><list_item>d</list_item></ordered_list>"
    )
    assert convert(tags) == "1. a\n2. b\n    - c\n3. d"
    alone = tags.replace("b<unordered", "</list_item><list_item><unordered").replace(
        "<list_item></list_item>", ""
    )
    assert convert(alone) == "1. a\n    - c\n2. d"


def test_tables_repeat_what_spans_and_put_numbers_on_the_right() -> None:
    tags = (
        "<otsl><ched>Name<ched>Year<lcel><nl><fcel>a|b<fcel>1<fcel>2.5<nl><fcel>c<fcel>10<ecel><nl>"
        "</otsl>"
    )
    assert convert(tags) == (
        "| Name     |   Year |   Year |\n"
        "|----------|--------|--------|\n"
        "| a&#124;b |      1 |    2.5 |\n"
        "| c        |     10 |        |"
    )
    assert convert("<otsl><fcel>x<nl></otsl>") == "| x   |\n|-----|"


def test_keys_and_values_are_lines() -> None:
    tags = (
        "<key_value_region><key_0>Name:<link_2></key_0><value_2>Ann</value_2>"
        "<value_3>loose</value_3></key_value_region>"
    )
    assert convert(tags) == "Name: Ann  \nloose"


def test_captions_of_tables_are_above_and_of_code_below() -> None:
    assert convert("<otsl><fcel>x<nl><caption>T</caption></otsl>").startswith("T\n\n|")
    assert convert("<code>x<caption>L</caption></code>") == "```\nx\n```\n\nL"


def test_furniture_is_written_where_it_is_wanted() -> None:
    tags = "<page_header>Head</page_header><text>Body</text><page_footer>7</page_footer>"
    assert convert(tags, furniture=True) == "Head\n\nBody\n\n7"


def test_no_word_is_lost() -> None:
    rng = random.Random(3)
    for _ in range(1500):
        pieces, words = make_pieces(rng)
        written = convert("".join(pieces), furniture=True)
        for word in words:
            assert re.search(rf"\b{word}", written), (word, "".join(pieces), written)
