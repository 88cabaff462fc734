"""Answers and conversations with packed and bounded caches."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo_recipe.examples import make_example
from mlx_smolvlm import (
    CacheOptions,
    Conversation,
    PromptError,
    Sampling,
    SmolVLM,
    SmolVLMWarning,
    load,
)
from mlx_smolvlm.generate.engine import Engine, find_pinned_tokens
from mlx_smolvlm.kv.bounded import RECENT, SINKS, BoundedKVCache
from mlx_smolvlm.kv.cache import PackedStorage
from mlx_smolvlm.reuse.content import Content, Span

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "What is in this picture?"
SHORT = Sampling(max_tokens=6)
LIMIT = 128
END, IMAGE = 639, 638  # of the tiny model


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8)
    return Image.fromarray(pixels)


def transcript(chat: Conversation, pictures: list[Image.Image]) -> list[dict[str, object]]:
    """What was said before the last answer, with the pictures in their items."""
    media, messages = iter(pictures), []
    for message in chat._list_messages(chat._turns):
        content = [
            {**item, "image": next(media)} if item["type"] == "image" else item
            for item in message["content"]
        ]
        messages.append({**message, "content": content})
    return messages


@pytest.fixture(scope="module")
def bounded(tiny_folder: Path) -> SmolVLM:
    return load(tiny_folder, cache=CacheOptions(max_kv_tokens=LIMIT))


@pytest.fixture(scope="module")
def cold(tiny_folder: Path) -> SmolVLM:
    """A bounded model that forgets before each prompt."""
    return load(tiny_folder, cache=CacheOptions(max_kv_tokens=LIMIT, memory_bytes=0))


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_a_bounded_conversation_equals_a_cold_run(bounded: SmolVLM, cold: SmolVLM) -> None:
    few = Sampling(max_tokens=3)
    chat, pictures = bounded.chat(sampling=few), list[Image.Image]()
    dropped = went_on = 0
    for turn in range(12):
        new = [noise(turn)] if turn in (0, 5) else []
        pictures += new
        reply = chat.ask(f"Question {turn}?", images=new)
        expected = cold.ask(transcript(chat, pictures), sampling=few)
        assert expected.cached_tokens == 0
        assert reply.token_ids == expected.token_ids
        if dropped and reply.cached_tokens:  # nothing but the turn itself was run
            assert reply.prompt_tokens - reply.cached_tokens < 30 + 33 * len(new)
            went_on += 1
        chat._finish_answer()
        assert chat._state is not None
        cache = chat._state.cache
        assert isinstance(cache, BoundedKVCache)
        assert cache.positions.size <= LIMIT
        dropped = cache.num_dropped
    images = np.flatnonzero(np.array(chat._state.content.ids) == IMAGE)
    assert images.size == 2 * 5 * bounded.config.image_seq_len  # 5 tiles each
    assert set(images) <= set(cache.positions)  # both pictures are still there
    assert dropped > LIMIT
    # Where an answer's text has other tokens than were said, all is run again.
    assert went_on


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_a_bounded_cache_goes_back_only_while_it_holds_all(tiny_folder: Path) -> None:
    vlm = load(tiny_folder, cache=CacheOptions(max_kv_tokens=LIMIT))
    for words, reuses in ((20, True), (60, False)):
        first = vlm.ask("wool " * words, sampling=SHORT)
        again = vlm.ask("wool " * words, sampling=SHORT)
        assert (again.cached_tokens > 0) is reuses
        assert again.token_ids == first.token_ids
        vlm.engine.memory.clear()


def test_a_bound_that_is_not_reached_changes_nothing(tiny: SmolVLM, bounded: SmolVLM) -> None:
    for images in ([], [noise(4)]):
        asked = {"images": images, "sampling": Sampling(max_tokens=40)}
        assert bounded.ask("What?", **asked).token_ids == tiny.ask("What?", **asked).token_ids  # type: ignore[arg-type]


def test_a_long_answer_still_sees_its_question_and_picture(bounded: SmolVLM) -> None:
    long = Sampling(max_tokens=300)
    stream = bounded.stream(QUESTION, images=[noise(1)], sampling=long)
    reply = stream.finish()
    assert reply.generation_tokens > LIMIT
    assert stream.state is not None
    cache, ids = stream.state.cache, stream._prompt.input_ids
    assert isinstance(cache, BoundedKVCache)
    assert set(range(int(np.flatnonzero(ids == END)[0]) + 1)) <= set(cache.positions.tolist())
    assert (ids == IMAGE).any()
    assert cache.num_dropped > 0


def test_pictures_that_do_not_fit_are_refused(bounded: SmolVLM) -> None:
    pictures = [noise(seed) for seed in range(8)]
    with pytest.raises(PromptError, match=r"max_kv_tokens is 128; set it to \d+ or more") as error:
        bounded.ask(QUESTION, images=pictures)
    wanted = int(str(error.value).split("set it to ")[1].split()[0])
    fits = CacheOptions(max_kv_tokens=wanted)
    wide = SmolVLM(
        Engine(bounded.path, bounded.config, bounded.model, bounded.engine.prompt_builder, fits)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmolVLMWarning)
        assert wide.ask(QUESTION, images=pictures, sampling=SHORT).generation_tokens == 6
    less = CacheOptions(max_kv_tokens=wanted - 1)
    narrow = SmolVLM(
        Engine(bounded.path, bounded.config, bounded.model, bounded.engine.prompt_builder, less)
    )
    with pytest.raises(PromptError, match="max_kv_tokens"):
        narrow.ask(QUESTION, images=pictures)


def test_a_prompt_longer_than_the_cache_says_so(bounded: SmolVLM) -> None:
    with pytest.warns(SmolVLMWarning, match=r"longer than max_kv_tokens, 128: the oldest text"):
        bounded.ask("wool " * 60, sampling=SHORT)
    with pytest.raises(PromptError, match="context is 512"):  # not the cache decides that
        bounded.ask("wool " * 600)


def test_pinned_tokens(tiny: SmolVLM) -> None:
    text, config = [5] * 20, tiny.config

    def pinned(ids: list[int], *spans: tuple[int, int]) -> list[int]:
        content = Content(np.array(ids), tuple(Span(a, b, "") for a, b in spans))
        pins: list[int] = find_pinned_tokens(content, config, 100).tolist()
        return pins

    assert pinned([*text, END, *text]) == [*range(21)]
    assert pinned([*text, *text, *text, END, *text]) == [*range(SINKS)]  # more than half
    assert pinned(text) == [*range(SINKS)]
    # Two tokens open a picture, one closes it.
    assert pinned(text * 3, (30, 40), (50, 60)) == [*range(4), *range(28, 41), *range(48, 60)]
    assert pinned([*text, END, *text * 2], (10, 15), (30, 34)) == [*range(21), *range(28, 35)]
    assert len(pinned(text * 5, (10, 71))) == 100 - RECENT
    with pytest.raises(
        PromptError, match="take 69 tokens, and max_kv_tokens is 100; set it to 101"
    ):
        pinned(text * 5, (10, 72))


# Packed, with the demo, whose heads are as wide as the real ones


@pytest.fixture(scope="module")
def packed() -> SmolVLM:
    return load("demo", cache=CacheOptions(kv_bits=8))


def test_the_demo_says_the_same_with_eight_bits(packed: SmolVLM) -> None:
    full = load("demo")
    picture = EXAMPLES / "three.png"
    for question in (QUESTION, "Where is the square?", "How many shapes are there?"):
        expected = full.ask(question, images=[picture])
        assert packed.ask(question, images=[picture]).token_ids == expected.token_ids


def test_packed_prompts_are_reused(packed: SmolVLM) -> None:
    packed.engine.memory.clear()
    picture = EXAMPLES / "three.png"
    first = packed.ask(QUESTION, images=[picture])
    again = packed.ask(QUESTION, images=[picture])
    assert (first.cached_tokens, again.cached_tokens) == (0, first.prompt_tokens - 1)
    assert again.token_ids == first.token_ids


def test_conversations_are_saved_and_loaded(packed: SmolVLM, tmp_path: Path) -> None:
    chats = [packed.chat(), load("demo").chat()]
    for number, chat in enumerate(chats):
        chat.ask(QUESTION, images=[EXAMPLES / "three.png"])
        chat.save(tmp_path / f"{number}")
        packed.engine.memory.clear()
        loaded = packed.chat()
        loaded.load(tmp_path / f"{number}")
        # A file holds keys and values as they are computed, or none: so all is run again.
        reply = loaded.ask("Where is the square?")
        assert (reply.cached_tokens, reply.encoded_tiles) == (0, 0)
        assert reply.text == make_example("three.png").answer("Where is the square?")
        assert loaded._stream is not None
        assert loaded._stream.state is not None
        assert isinstance(loaded._stream.state.cache.storage, PackedStorage)
