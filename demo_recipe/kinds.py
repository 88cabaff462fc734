"""Every kind of thing that the demo's pictures show."""

from __future__ import annotations

from demo_recipe import charts, objects, pages, prints, words
from demo_recipe.draw import SHAPES

GLYPHS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (*SHAPES, *words.KINDS, *charts.KINDS, *objects.KINDS, *pages.KINDS, *prints.KINDS)
    )
)
