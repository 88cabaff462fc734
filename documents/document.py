"""`Document`: pages that were read, and the formats that they are written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_smolvlm.documents import doctags, html, markdown
from mlx_smolvlm.documents.elements import Page


@dataclass(frozen=True)
class Document:
    """Pages of elements, in their order.

    reply = vlm.ask("Convert this page to docling.", "page.png", max_tokens=4096)
    print(Document.from_doctags(reply.text).to_markdown())
    """

    pages: tuple[Page, ...] = ()

    @classmethod
    def from_doctags(cls, text: str) -> Document:
        """Read DocTags, as SmolDocling and granite-docling write them; any text can be read."""
        return cls(tuple(doctags.read_text(text)))

    @classmethod
    def from_token_ids(
        cls, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
    ) -> Document:
        """Read the token ids of DocTags, where a tag that was printed on the page is no tag.

        Args:
            decode: Returns the text of token ids, with special tokens.
        """
        return cls(tuple(doctags.read_token_ids(token_ids, decode)))

    def to_markdown(self, furniture: bool = False) -> str:
        """Return the document as Markdown, laid out as docling-core lays it out.

        Args:
            furniture: Write the headers and footers of pages too.
        """
        pages = (markdown.write_page(page, furniture) for page in self.pages)
        return "\n\n".join(page for page in pages if page)

    def to_html(self, furniture: bool = False) -> str:
        """Return the document as an HTML article, with a section for each page.

        Args:
            furniture: Write the headers and footers of pages too.
        """
        sections = "\n".join(html.write_page(page, furniture) for page in self.pages)
        return f"<article>\n{sections}\n</article>\n"
