"""Several questions in one call get the answers of single calls, with less work."""

import dataclasses
import warnings
from pathlib import Path

import av
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm import (
    CacheOptions,
    MediaError,
    PromptError,
    Reply,
    Sampling,
    SmolVLM,
    SmolVLMWarning,
    load,
)
from mlx_smolvlm.checkpoint.load import find_tokenizer
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.generate.many import RowDecoder, split_into_groups
from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.tiles import compute_grid
from mlx_smolvlm.prompt.builder import PromptBuilder

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
OTHER = Image.new("RGB", (64, 64), "teal")
EXAMPLE = Path(__file__).parents[2] / "examples" / "three.png"
QUESTIONS = [
    "What is in this picture?",
    "Where is the square?",
    "What color is the square?",
    "How many shapes are there?",
    "Is there a circle?",
    "What color is the background?",
    "Describe this image.",
    "Hello",
]
SHORT = Sampling(max_tokens=6)


@pytest.fixture(autouse=True)
def _forget(tiny: SmolVLM) -> None:
    """Clear the memory, so that tests do not reuse the states of other tests."""
    tiny.engine.memory.clear()


@pytest.fixture
def seen(tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tiles of each call of the encoder of `tiny`."""
    counts: list[int] = []
    encoder = tiny.engine.encoder

    def counting(pixel_values: mx.array) -> mx.array:
        counts.append(pixel_values.shape[0])
        return encoder(pixel_values)

    monkeypatch.setattr(tiny.engine, "encoder", counting)
    return counts


@pytest.fixture(scope="module")
def demo() -> SmolVLM:
    return mlx_smolvlm.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of three seconds, from which three frames are taken."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    random = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            pixels = random.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def ending(vlm: SmolVLM, *token_ids: int) -> SmolVLM:
    """Return `vlm` with `token_ids` as further end tokens."""
    config = dataclasses.replace(vlm.config, eos_token_ids=(*vlm.config.eos_token_ids, *token_ids))
    return SmolVLM(Engine(vlm.path, config, vlm.model, vlm.engine.prompt_builder))


def alone(vlm: SmolVLM, questions: list[str], **options: object) -> list[Reply]:
    """Return replies to `questions` from single calls without reuse."""
    replies = []
    for question in questions:
        vlm.engine.memory.clear()
        replies.append(vlm.ask(question, **options))  # type: ignore[arg-type]
    return replies


def assert_same(many: list[Reply], single: list[Reply]) -> None:
    """Return the fields of the replies that depend neither on time nor on earlier calls."""
    for one, other in zip(many, single, strict=True):
        for name in ("token_ids", "text", "finish_reason", "prompt_tokens", "generation_tokens"):
            assert getattr(one, name) == getattr(other, name), name
        assert (one.image_tiles, one.video_frames) == (other.image_tiles, other.video_frames)


words = st.text("abc dé?\n🦊", max_size=12)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # so that no tie of random logits comes up by chance
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    questions=st.lists(words, min_size=1, max_size=9),
    shown=st.sampled_from(["none", "one", "two", "video", "both"]),
    system=st.sampled_from([None, "Be brief."]),
    max_tokens=st.integers(1, 14),
    ends=st.lists(st.integers(3, 600), max_size=160),
    stop=st.sampled_from([(), ("a",), ("e", "th")]),
)
def test_replies_are_those_of_single_calls(
    tiny: SmolVLM,
    film: Path,
    questions: list[str],
    shown: str,
    system: str | None,
    max_tokens: int,
    ends: list[int],
    stop: tuple[str, ...],
) -> None:
    vlm = ending(tiny, *ends)  # random ends, so that rows end early
    images = {"one": [PICTURE], "two": [OTHER, PICTURE], "both": [OTHER]}.get(shown, [])
    videos = [film] if shown in ("video", "both") else []
    common = {"system": system, "sampling": Sampling(max_tokens=max_tokens, stop=stop)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmolVLMWarning)  # not trained on videos
        many = vlm.ask_many(images, questions, videos=videos, **common)
        single = alone(vlm, questions, images=images, videos=videos, **common)
    assert_same(many, single)


def test_the_demo_answers_as_in_single_calls(demo: SmolVLM) -> None:
    many = demo.ask_many(EXAMPLE, QUESTIONS)
    assert_same(many, alone(demo, QUESTIONS, images=[EXAMPLE]))
    assert len({reply.text for reply in many}) >= 6
    plain = demo.ask_many(None, QUESTIONS)
    assert_same(plain, alone(demo, QUESTIONS))


def test_one_pass_over_the_picture_and_a_quarter_of_the_tokens(
    tiny: SmolVLM, fed: list[int], seen: list[int]
) -> None:
    # The number of tiles of a square picture on the real checkpoints, whose tiles have more tokens.
    image = dataclasses.replace(tiny.config.image, longest_edge=4 * tiny.config.tile_size)
    config = dataclasses.replace(tiny.config, image=image)
    vlm = SmolVLM(Engine(tiny.path, config, tiny.model, tiny.engine.prompt_builder))
    vlm.engine.encoder = tiny.engine.encoder
    sampling = Sampling(max_tokens=1)  # so that nothing is fed but prompts
    many = vlm.ask_many([OTHER], QUESTIONS, sampling=sampling)
    together, tiles = sum(fed), sum(seen)
    assert [reply.encoded_tiles for reply in many] == [17] + 7 * [0]
    assert sum(reply.prompt_tokens - reply.cached_tokens for reply in many) == together
    fed.clear()
    single = alone(vlm, QUESTIONS, images=[OTHER], sampling=sampling)
    assert_same(many, single)
    assert tiles == many[0].image_tiles == 17
    assert sum(fed) == sum(reply.prompt_tokens for reply in many)
    assert 4 * together <= sum(fed)


def test_a_step_feeds_only_answers_that_go_on(tiny: SmolVLM, fed: list[int]) -> None:
    single = alone(tiny, QUESTIONS[:3], sampling=SHORT)
    last = single[0].token_ids[1]
    vlm = ending(tiny, last)
    ends = [reply.token_ids.index(last) if last in reply.token_ids else 5 for reply in single]
    fed.clear()
    vlm.ask_many(None, QUESTIONS[:3], sampling=SHORT)
    steps = fed[2:]
    # The step after an end token has already started when the host reads the token.
    assert steps == [sum(end >= number for end in ends) for number in range(5)]
    assert min(ends) < max(ends)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=7, max_tokens=9),
        Sampling(temperature=0.7, seed=2**40 + 1, top_p=0.9, max_tokens=9),
        Sampling(temperature=1.3, seed=0, top_k=40, min_p=0.01, max_tokens=9),
    ],
    ids=["plain", "top_p", "top_k"],
)
def test_a_seed_draws_each_answer_as_alone(tiny: SmolVLM, sampling: Sampling) -> None:
    many = tiny.ask_many([OTHER], QUESTIONS, sampling=sampling)
    assert_same(many, alone(tiny, QUESTIONS, images=[OTHER], sampling=sampling))
    greedy = tiny.ask_many([OTHER], QUESTIONS, sampling=Sampling(max_tokens=9))
    assert [reply.token_ids for reply in many] != [reply.token_ids for reply in greedy]


def test_without_a_seed_answers_are_drawn_apart(tiny: SmolVLM) -> None:
    sampling = Sampling(temperature=3.0, max_tokens=8)
    many = tiny.ask_many(None, ["Say"] * 6, sampling=sampling)
    assert len({tuple(reply.token_ids) for reply in many}) == 6


@pytest.mark.parametrize("sampling", [SHORT, Sampling(temperature=1.0, seed=3, max_tokens=40)])
def test_groups_and_moves_change_nothing(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, fed: list[int], sampling: Sampling
) -> None:
    whole = tiny.ask_many([OTHER], QUESTIONS, sampling=sampling)
    plain = len(fed)
    largest: list[int] = []
    columns = RowDecoder.columns.fget

    def recording(rows: RowDecoder) -> int:
        largest.append(columns(rows))
        return largest[-1]

    # A cache of a hundred tokens, with three reserved for each answer.
    monkeypatch.setattr("mlx_smolvlm.generate.many.GROWTH", 3)
    monkeypatch.setattr("mlx_smolvlm.generate.many.CONTEXTS", 100 / 512)
    monkeypatch.setattr("mlx_smolvlm.generate.many.CONTEXTS", 100 / 512)
    monkeypatch.setattr(RowDecoder, "columns", property(recording))
    fed.clear()
    assert_same(tiny.ask_many([OTHER], QUESTIONS, sampling=sampling), whole)
    assert len(fed) > plain
    assert max(largest) <= 100


def test_groups() -> None:
    assert list(split_into_groups([], 5, 50)) == []
    assert list(split_into_groups([30, 30, 30, 30], 5, 50)) == [range(3), range(3, 4)]
    assert list(split_into_groups([45, 45], 5, 50)) == [range(2)]
    assert list(split_into_groups([50, 46], 5, 50)) == [range(1), range(1, 2)]
    assert [len(one) for one in split_into_groups([1] * 150, 5, 500)] == [64, 64, 22]


def test_a_long_beginning_and_long_questions(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_smolvlm.generate.many.PREFILL_CHUNK", 7)
    system = "wool " * 40
    questions = ["long " * 30, "x", "longer " * 20]
    many = tiny.ask_many(None, questions, system=system, sampling=SHORT)
    assert_same(many, alone(tiny, questions, system=system, sampling=SHORT))


def test_answers_end_with_the_context(tiny: SmolVLM) -> None:
    endless = dataclasses.replace(tiny.config, eos_token_ids=())
    vlm = SmolVLM(Engine(tiny.path, endless, tiny.model, tiny.engine.prompt_builder))
    questions = ["wool " * 60, "wool " * 3]
    sampling = Sampling(max_tokens=10_000)
    many = vlm.ask_many(None, questions, sampling=sampling)
    assert_same(many, alone(vlm, questions, sampling=sampling))
    assert {reply.prompt_tokens + reply.generation_tokens for reply in many} == {512}


def test_a_template_that_shows_pictures_last(tiny: SmolVLM, seen: list[int]) -> None:
    source = (
        "{% for m in messages %}{{ m['role'] }}: {% for item in m['content'] %}"
        "{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
        "{% for item in m['content'] %}{% if item['type'] == 'image' %}<image>{% endif %}"
        "{% endfor %}{% endfor %} Answer:"
    )
    builder = PromptBuilder(find_tokenizer(tiny.path), source, tiny.config)
    vlm = SmolVLM(Engine(tiny.path, tiny.config, tiny.model, builder))
    vlm.engine.encoder = tiny.engine.encoder
    many = vlm.ask_many(PICTURE, QUESTIONS[:3], sampling=SHORT)
    assert sum(seen) == 5
    single = alone(vlm, QUESTIONS[:3], images=[PICTURE], sampling=SHORT)
    assert_same(many, single)


def test_what_is_known_is_not_done_again(tiny: SmolVLM, fed: list[int], seen: list[int]) -> None:
    cold = tiny.ask_many([PICTURE], QUESTIONS[:4], sampling=SHORT)
    tiles, first = sum(seen), fed[0]
    warm = tiny.ask_many([PICTURE], QUESTIONS[4:], sampling=SHORT)
    assert sum(seen) == tiles
    assert warm[0].encoded_tiles == 0
    assert warm[0].cached_tokens == first - 1 == cold[1].cached_tokens - 1  # one is always left
    then = tiny.ask("And this?", images=[PICTURE], sampling=SHORT)
    assert then.cached_tokens == first
    assert_same([then], alone(tiny, ["And this?"], images=[PICTURE], sampling=SHORT))
    assert_same(warm, alone(tiny, QUESTIONS[4:], images=[PICTURE], sampling=SHORT))


def test_times_count_from_the_call(demo: SmolVLM) -> None:
    many = demo.ask_many(EXAMPLE, QUESTIONS[:3])
    for reply in many:
        assert reply.time_to_first_token_s > 0
        assert reply.prompt_tps > 0
        assert reply.generation_tps > 0
        assert reply.peak_memory_gb > 0


@pytest.mark.parametrize(
    ("prompts", "words"),
    [("What?", "prompts is one text, 'What\\?'"), (["What?", 5], "prompt 2 is 5")],
)
def test_prompts_must_be_texts(tiny: SmolVLM, prompts: list[str], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        tiny.ask_many([PICTURE], prompts)


def test_wrong_arguments(tiny: SmolVLM, seen: list[int]) -> None:
    assert tiny.ask_many([PICTURE], []) == []
    with pytest.raises(MediaError):
        tiny.ask_many("nowhere.png", QUESTIONS)
    with pytest.raises(PromptError, match=r"context is 512.*fewer pictures"):
        tiny.ask_many([PICTURE], ["What?", "wool " * 600])
    assert seen == []


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"max_kv_tokens": 160}])
def test_other_caches_answer_too(tmp_path: Path, options: dict[str, int]) -> None:
    """Packed rows equal packed single calls; rows use a cache that keeps every token."""
    vlm = load("demo", cache=CacheOptions(memory_bytes=0, **options))
    picture = Path(__file__).parents[2] / "examples" / "two.png"
    questions = ["What is in this picture?", "How many shapes are there?", "Where is the triangle?"]
    replies = vlm.ask_many([picture], questions)
    texts = [vlm.ask(question, images=[picture]).text for question in questions]
    assert [reply.text for reply in replies] == texts
    choice = vlm.choose("Where is the triangle?", [texts[2], "In the center."], images=[picture])
    assert choice.best == texts[2]


def test_answers_held_to_a_regex() -> None:
    vlm = load("demo")
    picture = Path(__file__).parents[2] / "examples" / "two.png"
    sampling = Sampling(regex="[0-9]")
    questions = ["How many shapes are there?", "How many triangles are there?"]
    replies = vlm.ask_many([picture], questions, sampling=sampling)
    tiles = compute_grid(open_image(picture).size, vlm.config).num_tiles
    assert [reply.encoded_tiles for reply in replies] == [tiles, 0]
    vlm.engine.memory.clear()
    single = [vlm.ask(one, images=[picture], sampling=sampling).text for one in questions]
    assert [reply.text for reply in replies] == single
    assert all(len(text) == 1 and text.isdigit() for text in single)
