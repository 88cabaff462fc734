"""Conversations do new work only, and answer as a cold run of their transcript does."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mlx_smolvlm.generate.stream
from mlx_smolvlm import (
    CacheOptions,
    CheckpointError,
    ContextError,
    Conversation,
    MediaError,
    PromptError,
    Sampling,
    SmolVLM,
    SmolVLMWarning,
    Video,
    load,
)
from mlx_smolvlm.generate.sampling import make_sampler
from mlx_smolvlm.media.encode import Picture
from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.tiles import Grid, compute_grid
from mlx_smolvlm.reuse.content import Content, Span
from mlx_smolvlm.reuse.memory import Memory

SHORT = Sampling(max_tokens=5)
EXAMPLES = Path(__file__).parents[1] / "examples"


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture of noise; those of one size differ in their pixels alone."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def clip(seed: int, frames: int = 3) -> Video:
    """A video of noise, a frame a second."""
    shape = (frames, 24, 32, 3)
    pixels = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    return Video(pixels, source_fps=1.0)


PICTURES = [noise(1), noise(2), noise(3, (30, 30))]
CLIPS = [clip(4), clip(5), clip(6, 1)]


@pytest.fixture(scope="module")
def warm(tiny_folder: Path) -> SmolVLM:
    """A model that remembers."""
    vlm = load(tiny_folder)
    vlm.engine._has_warned_of_videos = True
    return vlm


@pytest.fixture(scope="module")
def cold(tiny_folder: Path) -> SmolVLM:
    """A model to compare with, which forgets before each prompt."""
    vlm = load(tiny_folder, cache=CacheOptions(memory_bytes=0))
    vlm.engine._has_warned_of_videos = True
    return vlm


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The logits of every token that is chosen from now on."""
    seen: list[np.ndarray] = []

    def recording(sampling: Sampling) -> Callable[[mx.array], mx.array]:
        sampler = make_sampler(sampling)

        def sample(values: mx.array) -> mx.array:
            seen.append(np.array(values))
            return sampler(values)

        return sample

    monkeypatch.setattr(mlx_smolvlm.generate.stream, "make_sampler", recording)
    return seen


def with_sources(chat: Conversation) -> list[dict[str, Any]]:
    """The transcript up to the last question, with the media that its items stand for."""
    media = iter([one for turn in chat._turns for one in turn.media])
    messages = []
    for message in chat._list_messages(chat._turns):
        content = []
        for item in message["content"]:
            if item["type"] in ("image", "video"):
                medium: Any = next(media)
                item = {**item, item["type"]: SOURCES[medium.digest]}
            content.append(item)
        messages.append({**message, "content": content})
    return messages


SOURCES: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def sources(cold: SmolVLM) -> None:
    """The source of each picture and clip by its digest, since saved ones have none."""
    for kind, media in (("image", PICTURES), ("video", CLIPS)):
        for source in media:
            content = [{"type": kind, kind: source}, {"type": "text", "text": "?"}]
            stream = cold.stream([{"role": "user", "content": content}])
            SOURCES[stream._prompt.media[0].digest] = source
    assert len(SOURCES) == 6


def check_turn(
    chat: Conversation, cold: SmolVLM, logits: list[np.ndarray], question: Any, **media: Any
) -> None:
    """Ask, and compare ids and logits with a cold run of the whole transcript."""
    logits.clear()
    reply = chat.ask(question, **media)
    ours = list(logits)
    logits.clear()
    cold.engine.memory.clear()
    theirs = cold.ask(with_sources(chat), sampling=SHORT)
    assert theirs.cached_tokens == 0
    assert reply.token_ids == theirs.token_ids
    assert reply.prompt_tokens == theirs.prompt_tokens
    for a, b in zip(ours, logits, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


TEXTS = st.sampled_from(["What?", "And now?", "Count the shapes.", "é 12", "What? What?"])
STEPS = st.one_of(
    st.tuples(st.just("ask"), TEXTS, st.lists(st.integers(0, 2), max_size=2)),
    st.tuples(st.just("ask"), TEXTS, st.lists(st.integers(0, 2), max_size=2)),
    st.tuples(st.just("film"), TEXTS, st.lists(st.integers(0, 2), min_size=1, max_size=1)),
    st.tuples(st.just("mixed"), TEXTS, st.lists(st.integers(0, 2), min_size=1, max_size=1)),
    st.tuples(st.just("stopped"), TEXTS, st.lists(st.integers(0, 2), max_size=1)),
    st.tuples(st.sampled_from(["undo", "fork", "switch", "save", "load", "reset", "single"])),
)


def test_any_script_equals_cold_runs(
    warm: SmolVLM, cold: SmolVLM, logits: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "chat.safetensors"

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(steps=st.lists(STEPS, min_size=2, max_size=8), system=st.sampled_from([None, "Brief."]))
    def run(steps: list[tuple[Any, ...]], system: str | None) -> None:
        warm.engine.memory.clear()
        path.unlink(missing_ok=True)
        chats = [warm.chat(system=system, sampling=SHORT)]
        for step in steps:
            act(step, chats)

    def act(step: tuple[Any, ...], chats: list[Conversation]) -> None:
        chat = chats[0]
        try:
            if step[0] == "ask":
                images = [PICTURES[i] for i in step[2]]
                check_turn(chat, cold, logits, step[1], images=images)
            elif step[0] == "film":
                check_turn(chat, cold, logits, step[1], videos=[CLIPS[i] for i in step[2]])
            elif step[0] == "mixed":
                first, second = {"type": "video"}, {"type": "image"}
                content = [{"type": "text", "text": "See "}, first, second]
                content.append({"type": "text", "text": step[1]})
                number = step[2][0]
                check_turn(
                    chat,
                    cold,
                    logits,
                    [{"role": "user", "content": content}],
                    images=[PICTURES[number]],
                    videos=[CLIPS[number]],
                )
            elif step[0] == "stopped":
                stream = chat.stream(step[1], images=[PICTURES[i] for i in step[2]])
                next(stream, None)
                stream.close()
        except ContextError:
            chat.reset()
        if step[0] == "single":
            warm.ask("What?", images=[PICTURES[0]], sampling=SHORT)
        elif step[0] == "undo":
            chat.undo()
        elif step[0] == "fork":
            chats.append(chat.fork())
        elif step[0] == "switch":
            chats.reverse()
        elif step[0] == "save":
            chat.save(path)
        elif step[0] == "load" and path.exists():
            chat.load(path)
        elif step[0] == "reset":
            chat.reset()

    run()


def encoded(vlm: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through the encoder from now on."""
    sizes: list[int] = []
    encoder = vlm.engine.encoder

    def counting(pixel_values: mx.array) -> mx.array:
        sizes.append(len(pixel_values))
        return encoder(pixel_values)

    monkeypatch.setattr(vlm.engine, "encoder", counting)
    return sizes


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that go through the decoder from now on."""
    lengths: list[int] = []

    def count(name: str) -> None:
        original = getattr(mlx_smolvlm.generate.stream, name)

        def counting(model: Any, inputs_embeds: mx.array, *rest: Any) -> Iterator[int]:
            lengths.append(inputs_embeds.shape[1])
            tokens: Iterator[int] = original(model, inputs_embeds, *rest)
            return tokens

        monkeypatch.setattr(mlx_smolvlm.generate.stream, name, counting)

    for name in ("generate_tokens", "generate_drafted_tokens"):
        count(name)
    return lengths


def test_a_turn_does_new_work_only(monkeypatch: pytest.MonkeyPatch, prefilled: list[int]) -> None:
    """With the demo, whose answers are spelled as the tokenizer spells them."""
    demo = load("demo")
    sizes = encoded(demo, monkeypatch)
    paths = [EXAMPLES / name for name in ("three.png", "two.png", "one.png")]
    grids = [compute_grid(open_image(path).size, demo.config) for path in paths]
    one, *others = (grid.num_tiles for grid in grids)
    chat = demo.chat()
    first = chat.ask("What is in this picture?", images=paths[:1])
    assert (first.encoded_tiles, first.cached_tokens) == (one, 0)
    second = chat.ask("How many shapes are there?")
    assert (second.encoded_tiles, second.image_tiles) == (0, one)
    assert second.cached_tokens == first.prompt_tokens + first.generation_tokens
    third = chat.ask("And here?", images=paths[1:])
    assert (third.encoded_tiles, third.image_tiles) == (sum(others), one + sum(others))
    assert third.cached_tokens == second.prompt_tokens + second.generation_tokens
    assert sum(sizes) == one + sum(others)
    replies = (first, second, third)
    assert prefilled == [one.prompt_tokens - one.cached_tokens for one in replies]


def test_media_are_encoded_once(warm: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    warm.engine.memory.clear()
    sizes = encoded(warm, monkeypatch)
    chat = warm.chat(sampling=SHORT)
    assert chat.ask("What?", images=[PICTURES[0]]).encoded_tiles == 5
    assert chat.ask("And now?").encoded_tiles == 0
    third = chat.ask("Both?", images=[PICTURES[1]], videos=[CLIPS[0]])
    assert (third.encoded_tiles, third.image_tiles, third.video_frames) == (5 + 3, 10, 3)
    assert third.cached_tokens > 40
    assert chat.ask("Again?", images=[PICTURES[0].copy()]).encoded_tiles == 0
    assert sum(sizes) == 13


def test_the_answer_follows_the_picture(warm: SmolVLM, logits: list[np.ndarray]) -> None:
    """The ids of two prompts with pictures of one size are equal, and what is reused is not."""
    warm.engine.memory.clear()
    first = warm.ask("What?", images=[PICTURES[0]], sampling=SHORT)
    before = logits[0]
    logits.clear()
    second = warm.ask("What?", images=[PICTURES[1]], sampling=SHORT)
    assert first.prompt_tokens == second.prompt_tokens
    assert second.encoded_tiles == 5
    assert 0 < second.cached_tokens < 10  # up to the first placeholder
    assert np.abs(before - logits[0]).max() > 0.01
    again = warm.ask("What?", images=[PICTURES[0].copy()], sampling=SHORT)
    assert (again.encoded_tiles, again.token_ids) == (0, first.token_ids)
    assert again.cached_tokens == again.prompt_tokens - 1


def test_one_picture_of_two_that_changes_is_seen(warm: SmolVLM) -> None:
    warm.engine.memory.clear()
    ask = {"sampling": SHORT}
    warm.ask("What?", images=[PICTURES[0], PICTURES[1]], **ask)  # type: ignore[arg-type]
    other = warm.ask("What?", images=[PICTURES[0], PICTURES[2]], **ask)  # type: ignore[arg-type]
    assert other.encoded_tiles == 5
    assert other.cached_tokens > 5 * 4
    swapped = warm.ask("What?", images=[PICTURES[1], PICTURES[0]], **ask)  # type: ignore[arg-type]
    assert swapped.encoded_tiles == 0  # their features are known
    assert swapped.cached_tokens < 10


def test_detail_is_part_of_the_content(warm: SmolVLM) -> None:
    warm.engine.memory.clear()
    low = warm.ask("What?", images=[PICTURES[0]], sampling=SHORT, detail="low")
    high = warm.ask("What?", images=[PICTURES[0]], sampling=SHORT)
    assert (low.encoded_tiles, high.encoded_tiles) == (1, 5)
    one = warm.ask("What?", images=[PICTURES[0]], sampling=SHORT, detail=1)
    assert one.encoded_tiles == 1  # one tile as well, and resized in one step instead of two


def test_a_part_of_a_picture_is_never_common() -> None:
    content = Content(np.arange(12), (Span(2, 5, "a"), Span(6, 10, "b")))
    lengths = {most: content.count_common(content, most) for most in (1, 2, 3, 5, 6, 7, 9, 10, 12)}
    assert lengths == {1: 1, 2: 2, 3: 2, 5: 5, 6: 6, 7: 6, 9: 6, 10: 10, 12: 12}


def test_a_shared_beginning_is_run_once(warm: SmolVLM) -> None:
    warm.engine.memory.clear()
    one = warm.chat(system="Be brief, and say what you see.", sampling=SHORT)
    one.ask("What?", images=[PICTURES[0]])
    warm.ask(
        "Where?", images=[PICTURES[0]], system="Be brief, and say what you see.", sampling=SHORT
    )
    two = warm.chat(system="Be brief, and say what you see.", sampling=SHORT)
    reply = two.ask("Why?", images=[PICTURES[0]])
    assert reply.encoded_tiles == 0
    assert reply.cached_tokens > 20


def test_undo(warm: SmolVLM) -> None:
    chat = warm.chat(sampling=SHORT)
    assert chat.undo() is None
    chat.ask("One")
    chat.ask("Two", images=[PICTURES[0]])
    assert chat.undo() == "Two"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    reply = chat.ask("Three")
    assert reply.image_tiles == 0
    assert reply.cached_tokens > 5


def test_retry_answers_the_last_question_anew(warm: SmolVLM, cold: SmolVLM) -> None:
    chat = warm.chat(sampling=SHORT)
    with pytest.raises(PromptError, match="no question"):
        chat.retry()
    chat.ask("What?", images=[noise(1)])
    first = chat.ask("And?")
    assert chat.retry().finish().text == first.text
    varied = Sampling(max_tokens=9, temperature=5.0, seed=3)
    again = chat.retry(varied).finish()
    assert again.encoded_tiles == 0
    assert again.text != first.text
    said = [message["content"][-1]["text"] for message in chat.messages]
    assert said[2:] == ["And?", again.text]
    transcript = chat.messages[:-1]
    transcript[0] = {**transcript[0], "content": [{"type": "image"}, transcript[0]["content"][-1]]}
    alone = cold.ask(transcript, images=[noise(1)], sampling=varied)
    assert alone.text == again.text


def test_fork_goes_on_by_itself(warm: SmolVLM, cold: SmolVLM, logits: list[np.ndarray]) -> None:
    chat = warm.chat(sampling=SHORT)
    chat.ask("What?", images=[PICTURES[0]])
    twin = chat.fork()
    check_turn(twin, cold, logits, "Is it red?")
    check_turn(chat, cold, logits, "Is it blue, and is it large?")
    check_turn(twin, cold, logits, "Why?")
    assert len(chat.messages) == 4
    assert len(twin.messages) == 6
    last = chat.fork()
    assert last.undo() == "Is it blue, and is it large?"
    assert (len(last.messages), len(chat.messages)) == (2, 4)


def test_another_system_message(
    warm: SmolVLM, cold: SmolVLM, logits: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = warm.chat(system="Be brief.", sampling=SHORT)
    check_turn(chat, cold, logits, "What?", images=[PICTURES[0]])
    chat.system = "Answer at length."
    assert (chat.system, len(chat.messages)) == ("Answer at length.", 3)
    check_turn(chat, cold, logits, "And now?")
    chat.system = None
    check_turn(chat, cold, logits, "Why?")

    def refuse(*_: object) -> int:
        raise PromptError("no system message, please")

    monkeypatch.setattr(type(warm.engine), "count_tokens", refuse)
    with pytest.raises(PromptError):
        chat.system = "Another."
    assert chat.system is None


def test_save_and_load(
    tiny_folder: Path, cold: SmolVLM, logits: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "chat.safetensors"
    vlm = load(tiny_folder)
    vlm.engine._has_warned_of_videos = True
    chat = vlm.chat(system="Brief.", sampling=SHORT)
    chat.ask("What?", images=[PICTURES[0]], videos=[CLIPS[0]])
    chat.save(path)
    other = load(tiny_folder).chat(sampling=SHORT)
    other.ask("Something else")
    other.load(path)
    assert other.system == "Brief."
    assert other.messages == chat.messages
    assert other.context_used == chat.context_used
    logits.clear()
    reply = other.ask("And now?")
    assert reply.encoded_tiles == 0
    assert reply.prompt_tokens - reply.cached_tokens < 30
    mine = chat.ask("And now?")
    assert mine.token_ids == reply.token_ids
    for a, b in zip(logits[:5], logits[5:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_empty_conversation_can_be_saved(warm: SmolVLM, tmp_path: Path) -> None:
    warm.chat(system="Brief.").save(tmp_path / "chat")
    chat = warm.chat()
    chat.load(tmp_path / "chat")
    assert [message["role"] for message in chat.messages] == ["system"]


def test_files_that_cannot_be_loaded(warm: SmolVLM, tmp_path: Path) -> None:
    path = tmp_path / "chat.safetensors"
    chat = warm.chat(sampling=SHORT)
    chat.ask("What?", images=[PICTURES[0]])
    chat.save(path)
    data = path.read_bytes()
    before = chat.messages
    damaged = bytearray(data)
    damaged[-100] ^= 1
    cases = {
        "missing": (None, "cannot be read"),
        "empty": (b"", "no conversation file of mlx-smolvlm, or damaged"),
        "cut": (data[:-50], "cut off"),
        "text": (b"hello, this is no conversation at all\n" * 30, "no conversation file"),
        "damaged": (bytes(damaged), "is damaged"),
        "kind": (data.replace(b'\\"conversation\\"', b'\\"conversatioN\\"'), "no conversation"),
        "version": (data.replace(b'\\"version\\": 1', b'\\"version\\": 9'), "another version"),
        "checkpoint": (
            data.replace(warm.engine.checkpoint_digest.encode(), b"0" * 64),
            "another checkpoint",
        ),
        "grid": (data.replace(b'\\"grid\\": [2, 2]', b'\\"grid\\": [3, 2]'), "is damaged"),
    }
    for name, (contents, message) in cases.items():
        bad = tmp_path / name
        if contents is not None:
            assert contents != data, name
            bad.write_bytes(contents)
        with pytest.raises(CheckpointError, match=message):
            chat.load(bad)
        assert chat.messages == before
    with pytest.raises(OSError, match="No such file"):
        chat.save(tmp_path / "none" / "chat")
    assert not list(tmp_path.glob(".*"))


def test_a_full_context_is_an_error_that_leaves_the_conversation(warm: SmolVLM) -> None:
    chat = warm.chat(sampling=SHORT)
    chat.ask("wool " * 90)
    with pytest.raises(ContextError, match="context is 512"):
        chat.ask("wool " * 500)
    assert chat.ask("And now?").cached_tokens > 90


def test_drop_oldest_forgets_openly(warm: SmolVLM, cold: SmolVLM, logits: list[np.ndarray]) -> None:
    chat = warm.chat(system="Brief.", sampling=SHORT, on_full="drop-oldest")
    for number in range(3):
        check_turn(chat, cold, logits, f"{number} " + "wool " * 22, images=[PICTURES[number]])
    assert chat.context_used <= chat.context_size == 512
    with pytest.warns(SmolVLMWarning, match="oldest 2 of 3 questions are forgotten"):
        check_turn(chat, cold, logits, "3 " + "wool " * 60)
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["content"][1]["text"].startswith("2 ")
    with pytest.raises(ContextError):
        chat.ask("wool " * 600)
    assert len(chat.messages) == 5


def test_a_full_context_is_run_again_once_in_several_turns(warm: SmolVLM) -> None:
    system = "Brief. " + "wool " * 20
    chat = warm.chat(system=system, sampling=Sampling(max_tokens=2), on_full="drop-oldest")
    first = chat.ask("0 What?").prompt_tokens
    new, after_a_drop, turns = [], [], 1
    for number in range(1, 60):
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            reply = chat.ask(f"{number} What?")
        new.append(reply.prompt_tokens - reply.cached_tokens)
        dropped = turns + 1 - len(chat._turns)
        if messages:
            assert f"oldest {dropped} of {turns} questions" in str(messages[0].message)
            assert 512 - 2 - 512 // 4 - first < reply.prompt_tokens <= 512 - 2 - 512 // 4
            assert reply.cached_tokens > 40  # the system message
            after_a_drop.append(number)
        assert len(messages) == (dropped > 0)
        turns = len(chat._turns)
    assert len(after_a_drop) > 3
    assert min(np.diff(after_a_drop)) > 5  # turns in between
    assert sum(new) < 4_000  # 14,461 if every turn drops as little as it can


def test_a_retry_that_forgets_says_so(warm: SmolVLM) -> None:
    chat = warm.chat(sampling=SHORT, on_full="drop-oldest")
    while chat.context_used < 512 - 50:  # so that there is room for 5 tokens, and none for 64
        chat.ask("wool " * 5)
    longer = Sampling(max_tokens=64)
    with pytest.warns(SmolVLMWarning, match=r"oldest \d+ of \d+ questions are forgotten"):
        chat.retry(longer)
    before = warm.chat(sampling=SHORT, on_full="drop-oldest")
    before.ask("What?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before.retry(longer).finish()


def test_wrong_arguments(warm: SmolVLM) -> None:
    with pytest.raises(ValueError, match="on_full is 'drop'"):
        warm.chat(on_full="drop")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="one message of the user"):
        warm.chat().ask([{"role": "assistant", "content": "x"}])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_bytes is -1"):
        CacheOptions(memory_bytes=-1)
    with pytest.raises(MediaError):
        warm.chat().ask("What?", videos=["nowhere.mp4"])


def test_context_used_counts_the_answer_that_is_given(warm: SmolVLM) -> None:
    chat = warm.chat(sampling=SHORT)
    assert chat.context_used == 0
    stream = chat.stream("What?")
    assert chat.context_used == stream.reply.prompt_tokens
    stream.finish()
    assert chat.context_used == stream.reply.prompt_tokens + 5


def test_memory_is_bounded(tiny_folder: Path) -> None:
    vlm = load(tiny_folder)
    vlm.ask("What?", sampling=SHORT)
    each = vlm.engine.memory._states[0].cache.nbytes
    small = load(tiny_folder, cache=CacheOptions(memory_bytes=int(2.5 * each)))
    for word in ("One", "Two", "Three"):
        small.ask(word, sampling=SHORT)
    assert len(small.engine.memory._states) == 2
    assert small.ask("One", sampling=SHORT).cached_tokens < 7  # the beginning of another
    repeated = small.ask("Three", sampling=SHORT)
    assert repeated.cached_tokens == repeated.prompt_tokens - 1
    none = load(tiny_folder, cache=CacheOptions(memory_bytes=0))
    none.ask("What?", sampling=SHORT)
    assert none.ask("What?", sampling=SHORT).cached_tokens == 0


def test_encoded_pictures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Picture(None, Grid(0, 0), "high", name) for name in "abc"]
    for picture in pictures:
        picture.image_embeds = mx.zeros((1, 4, 64))
    monkeypatch.setattr("mlx_smolvlm.reuse.memory.FEATURE_BYTES", int(2.5 * 4 * 4 * 64))
    memory = Memory(CacheOptions())
    memory.keep_features(pictures[:2])
    memory.fill_features([Picture(None, pictures[0].grid, "high", "a")])  # so it goes later
    memory.keep_features(pictures[2:])
    again = [Picture(None, one.grid, "high", one.digest) for one in pictures]
    memory.fill_features(again)
    assert [one.image_embeds is not None for one in again] == [True, False, True]


def test_longer_states_replace_what_they_hold(tiny_folder: Path) -> None:
    vlm = load(tiny_folder)
    reply = vlm.ask("What?", sampling=SHORT)
    follow_up = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": "And?"},
    ]
    vlm.ask(follow_up, sampling=SHORT)
    assert len(vlm.engine.memory._states) <= 2
