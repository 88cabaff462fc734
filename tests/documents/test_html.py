"""HTML of documents: valid, escaped, with every word and the spans of tables."""

import random
import re
from html.parser import HTMLParser

from mlx_smolvlm.documents.doctags import read_text
from mlx_smolvlm.documents.document import Document
from mlx_smolvlm.documents.html import write_element
from tests.helpers.doctags_cases import make_pieces

EMPTY = {"br", "input"}


class Balanced(HTMLParser):
    """Collects the text, and fails where a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def convert(tags: str) -> str:
    """The HTML of the one element of a page."""
    ((element,),) = (page.elements for page in read_text(tags))
    return write_element(element)


def test_elements_of_html() -> None:
    assert convert("<title>A & B</title>") == "<h1>A &amp; B</h1>"
    assert convert("<section_header_level_2>A</section_header_level_2>") == "<h3>A</h3>"
    assert convert("<text>a<b\nc</text>") == "<p>a&lt;b<br>c</p>"
    assert convert("<code><_Python_>x<1</code>") == (
        '<pre><code class="language-python">x&lt;1</code></pre>'
    )
    assert convert("<formula>a<b</formula>") == "<p>\\[a&lt;b\\]</p>"
    assert convert("<checkbox_selected>On</checkbox_selected>") == (
        '<p><input type="checkbox" disabled checked> On</p>'
    )
    assert convert("<ordered_list><list_item>a</list_item></ordered_list>") == (
        "<ol>\n<li>a</li>\n</ol>"
    )
    assert convert("<inline><text>See</text><code>x</code></inline>") == "<p>See <code>x</code></p>"


def test_tables_span() -> None:
    tags = "<otsl><ched>A<lcel><nl><rhed>b<fcel>1<nl><ucel><fcel>2<nl><caption>T</caption></otsl>"
    assert convert(tags) == (
        '<table>\n<caption>T</caption>\n<tr><th scope="col" colspan="2">A</th></tr>\n'
        '<tr><th scope="row" rowspan="2">b</th><td>1</td></tr>\n<tr><td>2</td></tr>\n</table>'
    )


def test_furniture_is_written_where_it_is_wanted() -> None:
    document = Document.from_doctags("<page_header>H</page_header><text>B</text>")
    assert document.to_html() == "<article>\n<section>\n<p>B</p>\n</section>\n</article>\n"
    assert "<header>H</header>" in document.to_html(furniture=True)


def test_no_word_is_lost_and_tags_are_balanced() -> None:
    rng = random.Random(3)
    for _ in range(1200):
        pieces, words = make_pieces(rng)
        parser = Balanced()
        parser.feed(Document.from_doctags("".join(pieces)).to_html(furniture=True))
        parser.close()
        assert not parser.open
        for word in words:
            assert re.search(rf"\b{word}", parser.text), (word, "".join(pieces))
