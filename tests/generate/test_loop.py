"""The loop, stop texts and samplers."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_smolvlm.generate.loop import StopText, generate_tokens, prefill
from mlx_smolvlm.generate.sampling import Sampling, make_sampler
from mlx_smolvlm.model.model import PREFILL_CHUNK, Model
from mlx_smolvlm.smolvlm import SmolVLM


def greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, keepdims=True)


def random_embeds(length: int) -> mx.array:
    return mx.random.normal((1, length, 64), key=mx.random.key(length))


@pytest.mark.parametrize("length", [1, 2, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 7])
def test_prefill_in_chunks_equals_one_pass(network: Model, length: int) -> None:
    embeds = random_embeds(length)
    whole = network(embeds)[0, -1]
    cache = network.make_cache()
    chunked = prefill(network, embeds, cache)
    assert cache.offset == length
    assert mx.abs(whole - chunked).max().item() < 1e-4


def test_tokens_equal_full_passes(network: Model) -> None:
    embeds = random_embeds(9)
    got = list(generate_tokens(network, embeds, network.make_cache(), greedy, 12))
    expected: list[int] = []
    for _ in range(12):
        token_id = int(np.argmax(np.array(network(embeds)[0, -1])))
        expected.append(token_id)
        embed = network.text_model.embed_tokens(mx.array([[token_id]]))
        embeds = mx.concatenate([embeds, embed], axis=1)
    assert got == expected
    assert len(set(got)) > 3  # else any loop would do


def test_cache_grows_past_its_first_buffer(network: Model) -> None:
    embeds = random_embeds(250)
    long = list(generate_tokens(network, embeds, network.make_cache(), greedy, 20))
    cache = network.make_cache()
    prefill(network, embeds, cache)
    assert cache.arrays[0].shape[2] == 256
    cache.trim(0)
    assert list(generate_tokens(network, embeds, cache, greedy, 20)) == long
    assert cache.arrays[0].shape[2] == 512


def test_trim_refuses_what_it_does_not_hold(tiny: SmolVLM) -> None:
    with pytest.raises(ValueError, match=r"0\.\.0"):
        tiny.model.make_cache().trim(1)


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_text_cuts_at_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    stop_text, shown = StopText(stops), ""
    for piece in pieces:
        shown += stop_text.feed(piece)
        if stop_text.is_stopped:
            break
    else:
        shown += stop_text.flush()
    # The stop text that is complete first ends the text, even if another one begins earlier.
    text = "".join(pieces)
    seen = ""
    for piece in pieces:
        seen += piece
        places = [seen.find(stop) for stop in stops if stop in seen]
        if places:
            text = seen[: min(places)]
            break
    assert shown == text


def test_stop_text_shows_what_cannot_be_a_stop() -> None:
    stop_text = StopText(["</doc>"])
    assert stop_text.feed("hello <") == "hello "
    assert stop_text.feed("b> <") == "<b> "
    assert stop_text.feed("/doc> rest") == ""
    assert stop_text.is_stopped
    stop_text = StopText(["aab"])
    assert stop_text.feed("xaa") == "x"  # not "xa": both may begin it
    assert stop_text.feed("b") == ""
    assert stop_text.is_stopped


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": "text"},
        {"stop": ("",)},
    ],
)
def test_sampling_refuses_values_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_samplers_keep_to_their_options() -> None:
    logits = mx.array([0.0, 3.0, 2.0, 1.0, -9.0])
    assert make_sampler(Sampling())(logits).tolist() == [1]

    def drawn(sampling: Sampling) -> set[int]:
        sampler = make_sampler(sampling)
        return {sampler(logits).tolist()[0] for _ in range(200)}

    assert drawn(Sampling(temperature=1.0, seed=0)) >= {1, 2, 3}
    assert drawn(Sampling(temperature=1.0, top_k=2, seed=0)) == {1, 2}
    assert drawn(Sampling(temperature=1.0, top_p=0.5, seed=0)) == {1}
    assert drawn(Sampling(temperature=1.0, min_p=0.2, seed=0)) == {1, 2}


def test_seed_repeats_a_draw() -> None:
    logits = mx.zeros((1000,))

    def draw(seed: int) -> list[int]:
        sampler = make_sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(logits).tolist()[0] for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(0) == draw(0)
