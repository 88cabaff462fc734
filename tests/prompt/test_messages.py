"""All common forms of messages are accepted, and malformed ones are refused in one line."""

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import PromptError, Sampling, SmolVLM
from mlx_smolvlm.prompt.messages import read_request

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
SHORT = Sampling(max_tokens=3)


def user(*items: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(items)}]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "the prompt is None; give a question or a list of messages"),
        (7, "the prompt is 7"),
        ({"role": "user", "content": "hi"}, "give a question or a list of messages"),
        (b"hi", "the prompt is b'hi'"),
        (["hi"], "message 1 must be an object with 'role' and 'content', not 'hi'"),
        ([None], "message 1 must be an object"),
        ([{"role": "user"}], "message 1 must be an object"),
        ([{"content": "hi"}], "message 1 must be an object"),
        ([{"role": "user", "content": None}], "message 1 has the content None"),
        ([{"role": "user", "content": {"type": "text"}}], "message 1 has the content"),
        ([{"role": "user", "content": []}], "message 1 has the content []"),
        (user("hi"), "message 1 has the item 'hi'"),
        (user({"text": "hi"}), "give an object with a 'type'"),
        (user({"type": "audio"}), "message 1 has content of type 'audio'"),
        (user({"type": ["text"]}), "message 1 has content of type ['text']"),
        (user({"type": "text"}), "text item whose text is None"),
        (user({"type": "image_url", "image_url": {}}), "image_url without a 'url'"),
        (user({"type": "image_url", "image_url": {"url": 3}}), "image_url without a 'url'"),
        (user({"type": "image_url"}), "more image items than there are pictures"),
    ],
)
def test_what_is_malformed_is_a_prompt_error(tiny: SmolVLM, prompt: Any, words: str) -> None:
    with pytest.raises(PromptError, match=re.escape(words)) as error:
        tiny.ask(prompt)
    assert "\n" not in str(error.value)
    with pytest.raises(PromptError):
        tiny.chat().stream(prompt)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "form",
    [
        lambda kind: {"type": kind, kind: "a.b"},
        lambda kind: {"type": kind, "url": "a.b"},
        lambda kind: {"type": f"{kind}_url", f"{kind}_url": {"url": "a.b", "detail": "low"}},
        lambda kind: {"type": f"{kind}_url", f"{kind}_url": "a.b"},
        lambda kind: {"type": f"input_{kind}", f"{kind}_url": "a.b"},
    ],
)
def test_items_carry_their_source_in_every_common_form(kind: str, form: Any) -> None:
    for text in ("text", "input_text"):
        prompt = user(form(kind), {"type": text, "text": "What?"})
        request = read_request(prompt, (), (), None)
        assert request.messages == user({"type": kind}, {"type": "text", "text": "What?"})
        assert (request.images, request.videos) == (
            (["a.b"], []) if kind == "image" else ([], ["a.b"])
        )


def test_openai_messages_are_answered_as_ours(tiny: SmolVLM, tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    ours = tiny.ask("What?", images=[PICTURE], sampling=SHORT)
    url = {"type": "image_url", "image_url": {"url": str(path)}}
    theirs = tiny.ask(user(url, {"type": "input_text", "text": "What?"}), sampling=SHORT)
    assert theirs.token_ids == ours.token_ids
    assert theirs.prompt_tokens == ours.prompt_tokens
