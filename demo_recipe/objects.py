"""Pictures of everyday objects, with what is asked about them.

A scene holds at most one object in each of the nine cells of a 3 x 3 division, as scenes
of shapes do, so that "where" and the reading order have one true answer. The objects come
from one sheet (`object_sheet`).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from demo_recipe.items import Glyph, LabeledPicture
from demo_recipe.object_questions import makers
from demo_recipe.object_scene import ObjectScene, sample_scene
from demo_recipe.object_sheet import KINDS as KINDS
from demo_recipe.object_sheet import load_sprites


def sample(rng: np.random.Generator, size: tuple[int, int]) -> LabeledPicture:
    """A picture of `size` (width, height) pixels with 0 to 4 objects; it follows from `rng`."""
    scene = sample_scene(rng, size)
    glyphs = [
        Glyph(thing.kind, scene.extent(thing), rank=rank, total=scene.count(thing.kind))
        for rank, thing in enumerate(scene.things)
    ]
    return LabeledPicture(render(scene), tuple(glyphs), makers(scene), scene.background)


def render(scene: ObjectScene) -> Image.Image:
    """The picture of `scene`, RGB."""
    picture = Image.new("RGB", scene.size, scene.background_rgb)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        sprite = load_sprites()[thing.kind]
        if thing.flipped:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sprite = sprite.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        picture.paste(sprite, (left, top), sprite)
    return picture
