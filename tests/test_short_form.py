"""Pictures and sampling options as plain arguments, and the names that `dir` shows."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm import MediaError, Sampling, SamplingOptions, SmolVLM
from mlx_smolvlm.media.picture import open_image

PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
VARIED = {"max_tokens": 5, "temperature": 0.8, "seed": 3}


class Figure:
    """As much of a matplotlib figure as is asked for."""

    def savefig(self, file: Any, *, format: str) -> None:
        PICTURE.save(file, format)


def test_options_are_the_attributes_of_sampling() -> None:
    names = [field.name for field in dataclasses.fields(Sampling)]
    assert list(SamplingOptions.__annotations__) == names


def test_the_short_form_answers_as_the_long_one(tiny: SmolVLM) -> None:
    sampling = Sampling(**VARIED)  # type: ignore[arg-type]
    long = tiny.ask("What?", images=[PICTURE], sampling=sampling).token_ids
    assert tiny.ask("What?", PICTURE, **VARIED).token_ids == long
    assert tiny.stream("What?", [PICTURE], **VARIED).finish().token_ids == long
    assert tiny.ask_many(PICTURE, ["What?"], **VARIED)[0].token_ids == long
    assert tiny.chat(**VARIED).ask("What?", PICTURE).token_ids == long
    assert tiny.chat().ask("What?", PICTURE, **VARIED).token_ids == long
    assert tiny.chat().stream("What?", PICTURE, sampling=sampling).finish().token_ids == long


def test_a_turns_options_change_those_of_the_conversation_once(tiny: SmolVLM) -> None:
    chat = tiny.chat(max_tokens=4)
    counts = [
        chat.ask("What?", **options).generation_tokens for options in ({}, {"max_tokens": 2}, {})
    ]
    assert counts == [4, 2, 4]


def test_both_forms_together_and_unknown_names_are_refused(tiny: SmolVLM) -> None:
    short = Sampling(max_tokens=2)
    calls: list[Any] = [
        tiny.ask,
        tiny.stream,
        tiny.chat().ask,
        tiny.chat().stream,
        lambda *prompt, **options: tiny.ask_many(None, list(prompt), **options),
        lambda *_, **options: tiny.chat(**options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="sampling and top_p, seed are both given"):
            call("What?", sampling=short, top_p=0.5, seed=1)
        with pytest.raises(TypeError, match="no argument 'max_token'; sampling options are temp"):
            call("What?", max_token=3)
        with pytest.raises(ValueError, match="top_p is 2"):
            call("What?", top_p=2)


def test_one_picture_or_any_iterable_of_them(tiny: SmolVLM) -> None:
    for images in (PICTURE, PIXELS, (PICTURE,), {1: PICTURE}.values(), iter([PICTURE])):
        assert tiny.ask("What?", images, max_tokens=1).image_tiles == 5
    assert tiny.ask("What?", None, max_tokens=1).image_tiles == 0


def test_figures_are_pictures(tiny: SmolVLM) -> None:
    assert np.array_equal(open_image(Figure()), PIXELS)  # type: ignore[arg-type]
    assert tiny.ask("What?", Figure(), max_tokens=1).image_tiles == 5

    class Broken:
        def savefig(self, *_args: object, **_options: object) -> None:
            raise RuntimeError("no renderer")

    with pytest.raises(MediaError, match=r"the figure cannot be decoded.*no renderer"):
        open_image(Broken())  # type: ignore[arg-type]


def test_dir_shows_the_public_surface(tiny: SmolVLM) -> None:
    assert set(dir(mlx_smolvlm)) == {*mlx_smolvlm.__all__, "__version__"}
    names = dir(tiny)
    assert {"ask", "stream", "ask_many", "choose", "chat", "stream_parts"} <= set(names)
    assert all(hasattr(tiny, name) and not name.startswith("_") for name in names)
    assert not {"make_prompt", "make_content", "opened", "answer", "memory"} & set(names)
