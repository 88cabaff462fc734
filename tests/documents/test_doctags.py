"""The reader of DocTags: every element, and nothing lost where a model forgets or breaks off."""

import random

import pytest

from mlx_smolvlm.documents.doctags import (
    FIGURES,
    make_table,
    read_text,
    read_token_ids,
    split_tags,
)
from mlx_smolvlm.documents.elements import Cell, Element, Location, Page, Table
from tests.helpers.doctags_cases import make_pieces

LOC = "<loc_1><loc_20><loc_300><loc_500>"
PLACE = Location(1, 20, 300, 500)


def measure_depth(element: Element) -> int:
    """How many elements are within each other."""
    return 1 + max(map(measure_depth, element.children), default=0)


def read_one(text: str) -> Element:
    """The only element of the only page of `text`."""
    (page,) = read_text(f"<doctag>{text}</doctag>")
    (element,) = page.elements
    assert page.is_closed
    return element


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("title", "title"), ("text", "text"), ("paragraph", "text"), ("caption", "caption"),
        ("footnote", "footnote"), ("page_header", "page header"), ("formula", "formula"),
        ("page_footer", "page footer"), ("code", "code"), ("reference", "reference"),
        ("smiles", "formula"), ("document_index", "index"), ("form", "form"),
    ],
)  # fmt: skip
def test_elements_have_their_kind_text_and_location(tag: str, kind: str) -> None:
    element = read_one(f"<{tag}>{LOC}Some words</{tag}>")
    assert (element.kind, element.text, element.location) == (kind, "Some words", PLACE)
    assert element.is_closed


@pytest.mark.parametrize("level", range(7))
def test_headings_have_their_level(level: int) -> None:
    tag = f"section_header_level_{level}"
    element = read_one(f"<{tag}>{LOC}1 Method</{tag}>")
    assert (element.kind, element.level, element.text) == ("heading", level, "1 Method")


def test_a_location_lies_within_the_page_and_needs_four_numbers() -> None:
    assert read_one("<text><loc_1><loc_2><loc_3>a</text>").location is None
    crossed = read_one("<text><loc_900><loc_30><loc_2><loc_7><loc_5>a</text>").location
    assert crossed == Location(2, 7, 500, 30)


def test_checkboxes_code_and_figures_have_labels() -> None:
    assert read_one("<checkbox_selected>Yes</checkbox_selected>").label == "selected"
    assert read_one("<checkbox_unselected>No</checkbox_unselected>").label == "unselected"
    code = read_one(f"<code>{LOC}<_C++_>if (a < b)\n  x<_Y_>();</code>")
    assert (code.label, code.text) == ("C++", "if (a < b)\n  x<_Y_>();")
    assert read_one("<code>  indented\n</code>").text == "  indented\n"
    chart = read_one(f"<chart>{LOC}<bar_chart><ched>a<nl><fcel>1<nl></chart>")
    assert (chart.kind, chart.label) == ("chart", "bar_chart")
    assert chart.table == Table((Cell("a", 0, 0, kind="column header"), Cell("1", 1, 0)), 2, 1)
    assert read_one("<picture><logo><caption>It</caption></picture>").caption == Element(
        "caption", "It"
    )


def test_names_of_figures_are_text_elsewhere() -> None:
    assert read_one("<text>the <map> and the <line></text>").text == "the <map> and the <line>"
    assert {"map", "line", "logo"} <= FIGURES


def test_lists_hold_their_items_and_lists_in_them() -> None:
    found = read_one(
        "<ordered_list><list_item>a</list_item>\n<list_item>b<unordered_list><list_item>c"
        "</list_item></unordered_list></list_item></ordered_list>"
    )
    inner = Element("list", children=(Element("list item", "c"),))
    assert found == Element(
        "list",
        is_ordered=True,
        children=(Element("list item", "a"), Element("list item", "b", children=(inner,))),
    )


def test_keys_are_linked_to_their_values() -> None:
    found = read_one(
        "<key_value_region><key_0>Name:<link_7></key_0>"
        f"<value_7>{LOC}Ann</value_7></key_value_region>"
    )
    assert found.children == (
        Element("key", "Name:", label="0", links=(7,)),
        Element("value", "Ann", PLACE, label="7"),
    )


def test_inline_groups_hold_their_parts() -> None:
    found = read_one("<inline><text>See</text><code>x</code><formula>y</formula></inline>")
    assert [child.kind for child in found.children] == ["text", "code", "formula"]


def test_tables_hold_cells_that_span() -> None:
    found = read_one(
        f"<otsl>{LOC}<ched>A<ched>B<lcel><nl><ucel><ched>b<ched>c<nl><rhed>r<fcel>1<ecel><nl>"
        "<srow>S<lcel><lcel><nl><fcel>x<fcel>X<lcel><nl><fcel>y<ucel><xcel><nl>"
        "<caption>Table 1</caption></otsl>"
    )
    assert found.caption == Element("caption", "Table 1")
    assert found.table is not None
    assert (found.table.num_rows, found.table.num_columns) == (6, 3)
    assert found.table.cells == (
        Cell("A", 0, 0, 2, 1, "column header"), Cell("B", 0, 1, 1, 2, "column header"),
        Cell("b", 1, 1, kind="column header"), Cell("c", 1, 2, kind="column header"),
        Cell("r", 2, 0, kind="row header"), Cell("1", 2, 1), Cell("", 2, 2),
        Cell("S", 3, 0, 1, 3, "section"), Cell("x", 4, 0), Cell("X", 4, 1, 2, 2), Cell("y", 5, 0),
    )  # fmt: skip
    assert found.table.make_grid()[5] == ["y", "X", "X"]


# What docling-core 2.104.0 loses.
def test_an_angle_bracket_in_a_formula_is_text() -> None:
    assert read_one("<formula>a<b</formula>").text == "a<b"
    assert read_one("<text>if a<text_x and b></text>").text == "if a<text_x and b>"
    assert read_one("<text>a <b> c</text>").text == "a <b> c"


def test_an_element_that_is_cut_off_keeps_its_text_and_is_marked() -> None:
    (page,) = read_text(f"<doctag><title>All</title>\n<text>{LOC}and then the")
    assert page.elements[1] == Element("text", "and then the", PLACE, is_closed=False)
    assert page.elements[0].is_closed
    assert not page.is_closed


def test_an_element_that_is_not_closed_ends_where_the_next_begins() -> None:
    (page,) = read_text("<text>one<text>two</text><list_item>three<title>four</title>")
    assert [(one.kind, one.text, one.is_closed) for one in page.elements] == [
        ("text", "one", False), ("text", "two", True), ("list item", "three", False),
        ("title", "four", True),
    ]  # fmt: skip


def test_items_without_a_list_and_text_without_an_element_are_kept() -> None:
    (page,) = read_text("Before<list_item>a</list_item>between</text><list_item>b</list_item>after")
    assert [one.text for one in page.elements] == ["Before", "a", "between", "b", "after"]


def test_rows_of_different_lengths_are_a_table() -> None:
    table = read_one(
        "<otsl><fcel>a<fcel>b<nl><fcel>c<nl><ucel><ucel><lcel><fcel>d<nl></otsl>"
    ).table
    assert table is not None
    assert (table.num_rows, table.num_columns) == (3, 4)
    assert table.make_grid() == [["a", "b", "", ""], ["c", "", "", ""], ["c", "", "", "d"]]


def test_text_in_a_cell_that_only_continues_another_is_kept() -> None:
    element = read_one("<otsl><fcel>a<lcel>b<nl></otsl>")
    assert "b" in {one.text for one in element.walk()}


def test_cells_without_a_table_become_one() -> None:
    assert read_one("<fcel>a<fcel>b<nl>").table == Table((Cell("a", 0, 0), Cell("b", 0, 1)), 1, 2)


def test_pages_end_at_breaks_and_documents() -> None:
    pages = read_text("<doctag><text>a</text><page_break><text>b</text></doctag><doctag><text>c")
    assert [[one.text for one in page.elements] for page in pages] == [["a"], ["b"], ["c"]]
    assert [page.is_closed for page in pages] == [True, True, False]


def test_tokens_of_the_chat_are_left_out() -> None:
    (page,) = read_text("Assistant: <doctag><text>a</text></doctag><end_of_utterance><|im_end|>")
    assert page == Page((Element("text", "a"),))


def test_token_ids_tell_a_tag_from_its_letters() -> None:
    names = {
        1: "<doctag>",
        2: "<text>",
        3: "</text>",
        4: "</doctag>",
        5: "<loc_3>",
        6: "<",
        7: "text",
        8: ">",
        9: "é",
        10: "<end_of_utterance>",
    }
    pages = read_token_ids(
        [1, 2, 5, 5, 5, 5, 6, 7, 8, 9, 3, 4, 10], lambda ids: "".join(names[i] for i in ids)
    )
    assert pages == [Page((Element("text", "<text>é", Location(3, 3, 3, 3)),))]


def test_any_text_is_read_and_no_word_is_lost() -> None:
    """Random tags around numbered words: each word is found once, and the depth is bounded."""
    rng = random.Random(0)
    for _ in range(1500):
        pieces, words = make_pieces(rng)
        text = "".join(pieces)
        said = []
        for page in read_text(text):
            for element in page.walk():
                said.append(element.text)
                said += [cell.text for cell in element.table.cells] if element.table else []
        for word in words:
            assert sum(one.count(word) for one in said) == 1, (word, text)
    (page,) = read_text("<unordered_list><list_item>" * 3000 + "deep")
    assert max(map(measure_depth, page.elements)) < 30


def test_bytes_of_any_kind_are_read() -> None:
    rng = random.Random(1)
    for _ in range(500):
        read_text(rng.randbytes(80).decode("latin-1"))
        read_text("".join(rng.choice("<>/_textloc0123[]doc ") for _ in range(120)))


def test_events_join_to_the_text_again() -> None:
    text = f"a<doctag>{LOC}b<x>c</text></_y_><_z_>"
    events = list(split_tags(text))
    assert [event for event in events if isinstance(event, str)] == ["a", "b<x>c", "</_y_>"]


def test_a_table_of_nothing_is_empty() -> None:
    assert make_table([]) == make_table([("nl", []), ("nl", [])]) == Table((), 0, 0)
