"""Where answers end, and their text at the end, in every method that generates answers."""

import copy
import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm.generate.many
import mlx_smolvlm.generate.stream
from mlx_smolvlm import PromptError, Reply, Sampling, SmolVLM, load
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.generate.stream import Answer, AnswerStream, Chunk
from mlx_smolvlm.model.connector import Connector
from mlx_smolvlm.model.lora import adapt
from mlx_smolvlm.smolvlm import load_in_mlx

LONG = Sampling(max_tokens=12)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


def ask(vlm: SmolVLM, sampling: Sampling) -> Reply:
    return vlm.ask("Hi", sampling=sampling)


def stream(vlm: SmolVLM, sampling: Sampling) -> Reply:
    answer = vlm.stream("Hi", sampling=sampling)
    text = "".join(chunk.text for chunk in answer)
    assert text == answer.reply.text
    return answer.reply


def ask_many(vlm: SmolVLM, sampling: Sampling) -> Reply:
    return vlm.ask_many(None, ["Hi", "What?"], sampling=sampling)[0]


def chat(vlm: SmolVLM, sampling: Sampling) -> Reply:
    return vlm.chat(sampling=sampling).ask("Hi")


WAYS = [ask, stream, ask_many, chat]
Way = Callable[[SmolVLM, Sampling], Reply]


def ending_with(vlm: SmolVLM, *token_ids: int) -> SmolVLM:
    """`vlm` with a configuration whose end tokens are `token_ids`, in this order."""
    config = dataclasses.replace(vlm.config, eos_token_ids=token_ids)
    builder = copy.copy(vlm.engine.prompt_builder)
    builder.config = config
    return SmolVLM(Engine(vlm.path, config, vlm.model, builder))


@pytest.fixture(scope="module")
def endless(tiny: SmolVLM) -> SmolVLM:
    """A model without end tokens, whose answers end only at `max_tokens`."""
    return ending_with(tiny)


@pytest.fixture(scope="module")
def greedy(endless: SmolVLM) -> list[int]:
    """Return the tokens of a greedy answer without an end token."""
    return endless.ask("Hi", sampling=LONG).token_ids


@pytest.mark.parametrize("way", WAYS)
def test_each_end_token_ends_an_answer(endless: SmolVLM, greedy: list[int], way: Way) -> None:
    places = sorted({token_id: greedy.index(token_id) for token_id in greedy}.values())[1:4]
    ends = [greedy[place] for place in places]
    whole = way(endless, LONG)
    assert (whole.token_ids, whole.finish_reason) == (greedy, "length")
    for order in (ends, ends[::-1]):
        for number in range(3):  # with ever fewer of them, so that each is the first one once
            left = [end for end in order if end in ends[number:]]
            reply = way(ending_with(endless, *left), LONG)
            assert reply.token_ids == greedy[: places[number] + 1]
            assert reply.generation_tokens == places[number] + 1
            assert reply.finish_reason == "stop"
            shown = endless.engine.prompt_builder.tokenizer.decode(greedy[: places[number]], False)
            assert reply.text == shown.lstrip()


def test_a_turn_goes_on_after_each_end_token(endless: SmolVLM, greedy: list[int]) -> None:
    ends = sorted(set(greedy[1:4]), key=greedy.index)
    vlm = ending_with(endless, *ends[::-1])
    conversation = vlm.chat(sampling=LONG)
    first, second = conversation.ask("Hi"), conversation.ask("And?")
    assert first.token_ids == greedy[: greedy.index(ends[0]) + 1]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And?"},
    ]
    whole = endless.ask(messages, sampling=LONG).token_ids
    places = [place for place, token_id in enumerate(whole) if token_id in ends]
    assert second.token_ids == (whole[: places[0] + 1] if places else whole)


@pytest.mark.parametrize("order", [(639, 2), (2, 639)], ids=str)
def test_constrained_answers_heed_each_end_token(tiny: SmolVLM, order: tuple[int, ...]) -> None:
    vlm = ending_with(tiny, *order)
    space = vlm.engine.prompt_builder.tokenizer.encode(" ").ids[0]
    free = vlm.engine.constrainer(Sampling(regex="a*"))
    free.take(space)  # every answer begins with it
    allowed = np.flatnonzero(np.array(free.compute_mask()))
    assert {2, 639} <= set(allowed.tolist())
    one = vlm.engine.constrainer(Sampling(regex="[ab]a"))
    one.take(space)
    assert {2, 639}.isdisjoint(np.flatnonzero(np.array(one.compute_mask())).tolist())
    ends = set()
    for seed in range(30):
        sampling = Sampling(regex="a*", temperature=3.0, seed=seed, max_tokens=40)
        reply = ask_many(vlm, sampling) if seed % 2 else stream(vlm, sampling)
        assert set(reply.text) <= {"a"}
        if reply.finish_reason == "stop":
            assert set(reply.token_ids[:-1]).isdisjoint(order)
            ends.add(reply.token_ids[-1])
    assert ends == {2, 639}


@pytest.mark.parametrize("others", [(), (5,), (5, 600)], ids=str)
def test_choices_end_with_any_end_token(tiny: SmolVLM, others: tuple[int, ...]) -> None:
    expected = tiny.choose("Which?", ["wool", "b"])
    for order in ((*others, 639), (639, *others)):
        choice = ending_with(tiny, *order).choose("Which?", ["wool", "b"])
        assert choice.token_counts == expected.token_counts
        np.testing.assert_allclose(choice.logprobs, expected.logprobs, atol=1e-5)


SAID = "né 日🦊"  # a token a byte in the tokenizer of `tiny`


Script = Callable[..., SmolVLM]


@pytest.fixture
def script(endless: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A function that makes a model that always answers with given token ids."""

    def answering(said: list[int], *ends: int) -> SmolVLM:
        def sampler(_: Sampling) -> Callable[[mx.array], mx.array]:
            left = iter([*said, 3, 3])  # one is drawn before the end before it is seen
            return lambda logits: mx.array([next(left)])

        def row_sampler(_: Sampling) -> Callable[[mx.array, np.ndarray], mx.array]:
            left = [*said, 3, 3]
            return lambda logits, counts: mx.array([left[count] for count in counts.tolist()])

        monkeypatch.setattr(mlx_smolvlm.generate.stream, "make_sampler", sampler)
        monkeypatch.setattr(mlx_smolvlm.generate.many, "make_row_sampler", row_sampler)
        return ending_with(endless, *ends)

    return answering


@pytest.fixture(scope="module")
def said(endless: SmolVLM) -> list[int]:
    """The token ids of `SAID`."""
    ids: list[int] = endless.engine.prompt_builder.tokenizer.encode(SAID).ids
    assert len(ids) == len(SAID.encode())
    return ids


@pytest.mark.parametrize("way", WAYS)
def test_half_a_character_is_shown_as_such(script: Script, said: list[int], way: Way) -> None:
    for count in range(1, len(said) + 1):
        reply = way(script(said), Sampling(max_tokens=count))
        assert reply.text == SAID.encode()[:count].decode(errors="replace")
        assert (reply.token_ids, reply.finish_reason) == (said[:count], "length")


@pytest.mark.parametrize("way", WAYS)
def test_half_a_character_before_an_end(script: Script, said: list[int], way: Way) -> None:
    vlm = script([*said[:2], 639], 639)
    reply = way(vlm, Sampling(max_tokens=9))
    assert (reply.text, reply.finish_reason) == ("n\ufffd", "stop")


@pytest.mark.parametrize("way", WAYS)
def test_half_a_character_and_stop_texts(script: Script, said: list[int], way: Way) -> None:
    begun = way(script(said), Sampling(max_tokens=2, stop=("né",)))  # not to its end
    assert (begun.text, begun.finish_reason) == ("n\ufffd", "length")
    cut = way(script(said), Sampling(max_tokens=9, stop=(" ",)))
    assert (cut.text, cut.finish_reason) == ("né", "stop")
    half = way(script(said), Sampling(max_tokens=2, stop=("\ufffd",)))
    assert (half.text, half.finish_reason) == ("n", "stop")


def test_half_a_character_of_a_constrained_answer(tiny: SmolVLM) -> None:
    texts = []
    for count in (1, 2, 3, 4, 5):  # the first is a space, which is not shown
        reply = tiny.ask("Hi", sampling=Sampling(regex="🦊", max_tokens=count))
        texts.append((reply.text, reply.finish_reason))
    assert texts == [("", "length"), *[("\ufffd", "length")] * 3, ("🦊", "stop")]


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> list[Generator[Any, None, None]]:
    """The generators of tokens and tiles. The references prevent garbage collection of them."""
    made: list[Generator[Any, None, None]] = []

    def recorded(name: str) -> None:
        original = getattr(mlx_smolvlm.generate.stream, name)

        def record(*arguments: Any) -> Generator[Any, None, None]:
            made.append(original(*arguments))
            return made[-1]

        monkeypatch.setattr(mlx_smolvlm.generate.stream, name, record)

    for loop in ("tokens", "constrained_tokens"):
        recorded(f"generate_{loop}")
        recorded(f"generate_drafted_{loop}")
    recorded("encode")
    return made


@pytest.mark.parametrize(
    "how",
    ["length", "end token", "stop text", "close", "error", "schema", "drafted", "drafted schema"],
)
def test_generators_are_closed(
    endless: SmolVLM,
    generators: list[Generator[Any, None, None]],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = endless.ask("Hi", images=[PICTURE], sampling=LONG)
    vlm, sampling = endless, LONG
    if how == "end token":
        vlm = ending_with(endless, whole.token_ids[4])
    if how == "stop text":
        sampling = Sampling(max_tokens=12, stop=(whole.text[3:6],))
    if "schema" in how:
        most: Any = 7 if "drafted" in how else "off"
        vlm = ending_with(endless, 639)
        sampling = Sampling(max_tokens=12, regex="[a-z]{50}", draft=most)
    elif "drafted" in how:
        sampling = dataclasses.replace(LONG, draft=7)
    generators.clear()
    answer = vlm.stream("Hi", images=[PICTURE], sampling=sampling)
    next(answer)
    if how == "error":
        with monkeypatch.context() as patch:
            patch.setattr(Answer, "add", None)
            with pytest.raises(TypeError):
                next(answer)
    elif how == "close" or "schema" in how or "drafted" in how:
        answer.close()
    else:
        cut = answer.finish()
        assert cut.finish_reason == ("length" if how == "length" else "stop")
        assert (len(cut.token_ids) == 12) == (how == "length")
    assert len(generators) == 2
    assert [one.gi_frame for one in generators] == [None] * 2  # type: ignore[attr-defined]
    assert answer.state is not None
    assert list(answer) == []


def test_an_interrupted_answer_is_closed(
    endless: SmolVLM,
    generators: list[Generator[Any, None, None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, following = endless.stream("Hi", sampling=LONG), AnswerStream.__next__

    def interrupt(stream: AnswerStream) -> Chunk:
        """Raise KeyboardInterrupt in the consumer of a chunk, not in the stream."""
        following(stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStream, "__next__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer.finish()
    assert len(generators) == 2
    assert [one.gi_frame for one in generators] == [None] * 2  # type: ignore[attr-defined]


def test_preparations_are_closed(
    endless: SmolVLM, generators: list[Generator[Any, None, None]]
) -> None:
    endless.engine.memory.clear()
    answer = endless.stream("Hi", images=[PICTURE], sampling=LONG)
    next(iter(answer.prepare()))
    answer.close()
    assert [one.gi_frame for one in generators] == [None]  # type: ignore[attr-defined]


def test_an_answer_is_over_after_an_error_in_its_preparation(tiny: SmolVLM) -> None:
    tiny.engine.memory.clear()
    answer = tiny.stream("Hi", images=[PICTURE])
    answer._prompt.media[0].make_tiles = None  # type: ignore[union-attr, assignment, method-assign]
    with pytest.raises(TypeError):
        list(answer.prepare())
    assert list(answer) == []
    assert answer.finish().finish_reason == "interrupted"


@pytest.mark.parametrize("tiles", [None, 0, 1, 2, 4])
def test_embeddings_are_as_many_as_placeholders(tiny: SmolVLM, tiles: int | None) -> None:
    count = 12  # placeholders of three tiles, with four tokens each
    ids = np.array([1, *[tiny.config.image_token_id] * count, 40])
    right = tiny.model.embed(ids, mx.ones((3, 4, 64)))
    assert mx.array_equal(right[0, 1:13], mx.ones((12, 64)))
    given = None if tiles is None else mx.ones((tiles, 4, 64))
    words = f"12 image placeholders, and the pictures have {4 * (tiles or 0)} embeddings"
    with pytest.raises(PromptError, match=words):
        tiny.model.embed(ids, given)
    with pytest.raises(PromptError, match="0 image placeholders, and the pictures have 4"):
        tiny.model.embed(np.array([1, 40]), mx.ones((1, 4, 64)))


def test_changed_weights_change_the_encoding(tiny_folder: Path) -> None:
    vlm = load_in_mlx(tiny_folder)
    before = np.array(vlm.encode_images([PICTURE]))
    layer = vlm.model.vision_model.encoder.layers[0].mlp.fc1
    layer.weight = layer.weight * 2
    changed = np.array(vlm.encode_images([PICTURE]))
    assert abs(changed - before).max() > 0.01
    layer.weight[0] = 1  # in place
    again = np.array(vlm.encode_images([PICTURE]))
    assert abs(again - changed).max() > 1e-4
    linear = vlm.model.connector.modality_projection.proj
    low_rank = adapt(linear, 2, scale=3.0, dropout=0.0)
    low_rank.lora_b = mx.ones_like(low_rank.lora_b)
    vlm.model.connector.modality_projection.proj = low_rank
    adapted = np.array(vlm.encode_images([PICTURE]))
    assert abs(adapted - again).max() > 0.01
    cold = SmolVLM(Engine(vlm.path, vlm.config, vlm.model, vlm.engine.prompt_builder))
    np.testing.assert_allclose(adapted, np.array(cold.encode_images([PICTURE])), atol=1e-5)


def test_an_interrupted_encoder_keeps_its_weights(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(tiny_folder)

    def interrupt(*_: object) -> mx.array:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connector, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vlm.encode_images([PICTURE])
    expected = load(tiny_folder).encode_images([PICTURE])
    np.testing.assert_allclose(vlm.encode_images([PICTURE]), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 0, 5, True, 4.0, "4"])
def test_a_precision_that_no_model_is_converted_to(tiny_folder: Path, bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits is .*; it must be 4, 8 or 16"):
        load(tiny_folder, bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4, 8 or 16"):
        load("demo", bits=bits)  # type: ignore[arg-type]
