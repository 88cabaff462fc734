"""Every kind of thing that the demo's pictures show."""

from __future__ import annotations

from mlx_smolvlm.train.recipe import charts, objects, pages, words
from mlx_smolvlm.train.recipe.draw import SHAPES

GLYPHS: tuple[str, ...] = tuple(
    dict.fromkeys((*SHAPES, *words.KINDS, *charts.KINDS, *objects.KINDS, *pages.KINDS))
)
