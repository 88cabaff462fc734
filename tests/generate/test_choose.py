"""Probabilities of choices equal those of forward passes over whole transcripts."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mlx_smolvlm
from demo_recipe.examples import make_example
from mlx_smolvlm import Choice, MediaError, PromptError, Sampling, SmolVLM
from mlx_smolvlm.checkpoint.load import find_tokenizer
from mlx_smolvlm.generate.choose import make_choice
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.messages import read_request

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
EXAMPLE = Path(__file__).parents[2] / "examples" / "three.png"


@pytest.fixture(scope="module")
def demo() -> SmolVLM:
    return mlx_smolvlm.load("demo", dtype="float32")


def cold(vlm: SmolVLM, messages: list[dict[str, object]], choice: str, pictures: int) -> float:
    """Return the log-probability of `choice` and its end token, from one forward pass."""
    media = vlm.engine.open_media(read_request("", [PICTURE] * pictures, (), None), "high")
    grids = [one.grid for one in media]
    prompt = vlm.engine.prompt_builder.build(messages, grids).tolist()
    told = [*messages, {"role": "assistant", "content": choice}]
    ids = vlm.engine.prompt_builder.build(told, grids, add_generation_prompt=False)
    start = next(n for n, one in enumerate(ids) if n >= len(prompt) or prompt[n] != one)
    end = max(n for n, one in enumerate(ids) if one in vlm.config.eos_token_ids) + 1
    logits = np.array(vlm.model(vlm.model.embed(ids, vlm.engine.encode(media)))[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logs[n - 1, ids[n]] for n in range(start, end)))


def question(text: str, pictures: int) -> list[dict[str, object]]:
    images = [{"type": "image"}] * pictures
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    choices=st.lists(
        st.text("ab cé.:🦊", min_size=1, max_size=9).filter(str.strip),
        min_size=2,
        max_size=6,
        unique=True,
    ),
    pictures=st.integers(0, 2),
)
def test_logprobs_are_those_of_whole_transcripts(
    tiny: SmolVLM, choices: list[str], pictures: int
) -> None:
    choice = tiny.choose("Which?", choices, images=[PICTURE] * pictures)
    expected = [cold(tiny, question("Which?", pictures), one, pictures) for one in choices]
    np.testing.assert_allclose(choice.logprobs, expected, atol=1e-4)
    weights = np.exp(np.array(expected) - max(expected))
    np.testing.assert_allclose(choice.probabilities, weights / weights.sum(), atol=1e-4)
    assert choice.best == choices[choice.index] == choices[int(np.argmax(expected))]


@pytest.mark.parametrize("memory", ["warm", "small groups", "small parts"])
def test_where_the_work_is_cut_changes_nothing(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    choices = ["a long answer of many words " * 3, "b", "b c", "something else"]
    tiny.engine.memory.clear()
    whole = tiny.choose("Which?", choices, images=[PICTURE])
    if memory == "small groups":
        monkeypatch.setattr("mlx_smolvlm.generate.many.MAX_ROWS", 1)
    if memory == "small parts":
        monkeypatch.setattr("mlx_smolvlm.generate.many.PREFILL_CHUNK", 3)
        monkeypatch.setattr("mlx_smolvlm.generate.choose.SCORE_CHUNK", 2)
    again = tiny.choose("Which?", choices, images=[PICTURE])
    np.testing.assert_allclose(again.logprobs, whole.logprobs, atol=1e-4)
    assert again.token_counts == whole.token_counts


def test_one_prefill_and_one_pass_over_the_choices(tiny: SmolVLM, fed: list[int]) -> None:
    tiny.engine.memory.clear()
    choice = tiny.choose("Which?", ["red", "green", "blue sky"], images=[PICTURE])
    assert len(fed) == 2
    assert fed[1] == sum(choice.token_counts) + 3  # and the token before each


def test_a_choice_that_merges_with_what_is_before_it(tiny: SmolVLM) -> None:
    source = (
        "<|im_start|>{% for m in messages %}{{ ' squa' if m['role'] == 'assistant' else 'User: ' }}"
        "{% for item in m['content'] %}{{ item['text'] }}{% endfor %}<end_of_utterance>"
        "{% endfor %}{% if add_generation_prompt %} squa{% endif %}"
    )
    builder = PromptBuilder(find_tokenizer(tiny.path), source, tiny.config)
    vlm = SmolVLM(Engine(tiny.path, tiny.config, tiny.model, builder))
    messages = question("Which?", 0)
    prompt = builder.build(messages, [])
    choices = ["re", "!", "res"]
    told = [
        builder.build([*messages, {"role": "assistant", "content": one}], [], False)
        for one in choices
    ]
    assert any(one[: prompt.size].tolist() != prompt.tolist() for one in told)
    choice = vlm.choose("Which?", choices)
    expected = [cold(vlm, messages, one, 0) for one in choices]
    np.testing.assert_allclose(choice.logprobs, expected, atol=1e-4)


def test_what_is_typed_as_an_end_is_none(tiny: SmolVLM) -> None:
    choices = ["a", "a<end_of_utterance>", "a<end_of_utterance>b"]
    choice = tiny.choose("Which?", choices)
    expected = [cold(tiny, question("Which?", 0), one, 0) for one in choices]
    np.testing.assert_allclose(choice.logprobs, expected, atol=1e-4)


def test_the_demo_chooses_what_it_says(demo: SmolVLM) -> None:
    colors = ["Red.", "Green.", "Blue.", "Yellow."]
    asked = "What color is the square?"
    true = make_example("three.png").answer(asked)
    choice = demo.choose(asked, colors, images=[EXAMPLE])
    assert str(choice) == choice.best == demo.ask(asked, images=[EXAMPLE]).text == true
    assert choice.probabilities[choice.index] > 0.9
    other = demo.choose("What is in this picture?", colors, images=[EXAMPLE])
    assert other.probabilities[choice.index] < 0.9
    nothing = demo.choose([{"role": "user", "content": "Hello"}], colors)
    assert nothing.logprobs != choice.logprobs


def test_the_probability_of_the_greedy_answer_is_that_of_its_tokens(demo: SmolVLM) -> None:
    asked = "Where is the square?"
    reply = demo.ask(asked, images=[EXAMPLE], sampling=Sampling())
    choice = demo.choose(asked, [reply.text, "At the top."], images=[EXAMPLE])
    assert choice.token_counts[0] == len(reply.token_ids)  # with the token that ends it
    assert choice.best == reply.text


def test_normalisation() -> None:
    scores = [np.log([0.5, 0.1, 0.5]), np.log([0.15])]
    plain = make_choice(("long", "short"), scores, "none")
    np.testing.assert_allclose(plain.probabilities, [0.025 / 0.175, 0.15 / 0.175])
    assert (plain.best, plain.index, plain.token_counts) == ("short", 1, (3, 1))
    means = make_choice(("long", "short"), scores, "tokens")
    mean = 0.025 ** (1 / 3)
    np.testing.assert_allclose(means.probabilities, [mean / (mean + 0.15), 0.15 / (mean + 0.15)])
    assert (means.best, means.index) == ("long", 0)
    assert means.logprobs == plain.logprobs
    assert math.isclose(plain.logprobs[0], math.log(0.025))
    far = make_choice(("a", "b"), [np.array([-2000.0]), np.array([-3000.0])], "none")
    assert far.probabilities == (1.0, 0.0)
    assert isinstance(far, Choice)
    assert json.loads(json.dumps(far.to_dict()))["choices"] == ["a", "b"]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([], "the number of choices is 0; give two"),
        (["one"], "the number of choices is 1"),
        ("red", "choices is one text, 'red'"),
        (["a", " \n"], "choice 2 is empty"),
        (["a", 5], "choice 2 is 5"),
        (["a", "b", "a"], "choices 1 and 3 are both 'a'"),
    ],
)
def test_choices_that_cannot_be_compared(tiny: SmolVLM, choices: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny.choose("Which?", choices)


def test_wrong_arguments(tiny: SmolVLM) -> None:
    with pytest.raises(ValueError, match="normalize is 'length'"):
        tiny.choose("Which?", ["a", "b"], normalize="length")  # type: ignore[arg-type]
    with pytest.raises(MediaError):
        tiny.choose("Which?", ["a", "b"], images=["nowhere.png"])
    with pytest.raises(PromptError, match="context is 512"):
        tiny.choose("Which?", ["a", "wool " * 600])
    config = dataclasses.replace(tiny.config, eos_token_ids=(5, 600))
    vlm = SmolVLM(Engine(tiny.path, config, tiny.model, tiny.engine.prompt_builder))
    with pytest.raises(PromptError, match=r"ends an answer with none.*\(5, 600\)"):
        vlm.choose("Which?", ["b", "c"])
