"""DocTags at random: tags in any order around numbered words."""

from __future__ import annotations

import random

TAGS = (
    "<doctag>", "</doctag>", "<text>", "</text>", "<title>", "</title>", "<otsl>", "</otsl>",
    "<fcel>", "<ched>", "<lcel>", "<ucel>", "<xcel>", "<ecel>", "<nl>", "<list_item>",
    "</list_item>", "<unordered_list>", "</unordered_list>", "<ordered_list>", "<picture>",
    "</picture>", "<chart>", "<bar_chart>", "</chart>", "<caption>", "</caption>",
    "<key_value_region>", "<key_1>", "</key_1>", "<value_2>", "</value_2>", "<link_2>", "<inline>",
    "</inline>", "<code>", "</code>", "<_Python_>", "<formula>", "</formula>", "<loc_7>",
    "<checkbox_selected>", "<footnote>", "<page_header>", "<page_break>", "<document_index>",
    "<form>", "</form>", "<smiles>", "<", ">", "</", "<b>", "&", "<loc_99999999999>", "\n",
)  # fmt: skip


def make_pieces(rng: random.Random) -> tuple[list[str], list[str]]:
    """Up to 60 words and tags, and the words among them."""
    pieces = [
        f"word{i}." if rng.random() < 0.35 else rng.choice(TAGS) for i in range(rng.randrange(60))
    ]
    return pieces, [piece for piece in pieces if piece.startswith("word")]
