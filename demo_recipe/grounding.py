"""Which words of the text stand for shapes and colors."""

from __future__ import annotations

from tokenizers import Tokenizer

from demo_recipe.draw import COLOR_NAMES, SHAPES
from demo_recipe.questions import make_plural

ANY = "any"  # the kind that "shape" and "object" mean

Words = dict[int, tuple[str, str]]


def make_word_table(tokenizer: Tokenizer) -> Words:
    """Attribute and value that the tokens for kinds and colors stand for."""
    spelled = [(kind, "kind", kind) for kind in SHAPES]
    spelled += [(make_plural(kind), "kind", kind) for kind in SHAPES]
    spelled += [(color, "color", color) for color in COLOR_NAMES]
    spelled += [(noun, "kind", ANY) for noun in ("shape", "object", "shapes", "objects", "things")]
    table: Words = {}
    for text, attribute, value in spelled:
        token = tokenizer.token_to_id(f"Ġ{text}")
        if token is not None:
            table[token] = (attribute, value)
    return table
