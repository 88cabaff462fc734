"""Independent prompts that are answered together get the answers of single calls."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm import CacheOptions, MediaError, Reply, Sampling, SmolVLM, load
from mlx_smolvlm.generate.batch import AnswerBatch, Update
from mlx_smolvlm.generate.batched_answer import BatchedAnswer
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.memory_plan import Work
from mlx_smolvlm.generate.questions import BatchOptions, Question, read_question
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.media.encode import Picture
from mlx_smolvlm.model.model import Model

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("chart", "four", "objects", "one", "page", "three", "two", "word")
QUESTIONS: list[Question] = [
    ("What is in this picture?", EXAMPLES / "chart.png"),
    ("How many shapes are there?", [EXAMPLES / "four.png"]),
    {"prompt": "Describe this image.", "images": EXAMPLES / "objects.png", "max_tokens": 4},
    ("What color is the cross?", EXAMPLES / "one.png"),
    {"prompt": "Read the text.", "images": EXAMPLES / "page.png", "system": "Be brief."},
    {"prompt": "Where is the star?", "images": EXAMPLES / "three.png", "stop": ["the"]},
    [{"role": "user", "content": [{"type": "image", "image": EXAMPLES / "two.png"}]}],
    "Hello",
]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8))
    for seed in range(4)
]
GREEDY = Sampling(max_tokens=12)
ONE_TILE = BatchOptions(GREEDY, detail="low")


@pytest.fixture(scope="module")
def demo() -> SmolVLM:
    return mlx_smolvlm.load("demo", dtype="float32")


@pytest.fixture(autouse=True)
def _forget(tiny: SmolVLM, demo: SmolVLM) -> None:
    """Clear the memory, so that tests do not reuse the states of other tests."""
    tiny.engine.memory.clear()
    demo.engine.memory.clear()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of answers of each step of a batch."""
    counts: list[int] = []
    head = Model.head

    def counting(self: Model, hidden_states: mx.array) -> mx.array:
        if hidden_states.ndim == 2:
            counts.append(hidden_states.shape[0])
        return head(self, hidden_states)

    monkeypatch.setattr(Model, "head", counting)
    return counts


def ask_alone(vlm: SmolVLM, question: Question, **options: Any) -> Reply:
    """The reply to `question` in a call of its own, without reuse."""
    vlm.engine.memory.clear()
    if isinstance(question, dict):
        return vlm.ask(**{**options, **question})
    if isinstance(question, tuple):
        return vlm.ask(question[0], question[1], **options)
    return vlm.ask(question, **options)


def read(vlm: SmolVLM, question: Question, options: BatchOptions) -> tuple[Prompt, Sampling]:
    return read_question(vlm.engine, question, options)


def run(batch: AnswerBatch, steps: int = 10_000) -> list[Update]:
    """The updates until all answers have ended, or of a number of steps."""
    updates = []
    while batch.num_answers and steps:
        updates += batch.step()
        steps -= 1
    return updates


def make_endless(vlm: SmolVLM, **options: Any) -> SmolVLM:
    """`vlm` without end tokens."""
    config = dataclasses.replace(vlm.config, eos_token_ids=())
    engine = Engine(vlm.path, config, vlm.model, vlm.engine.prompt_builder, CacheOptions(**options))
    return SmolVLM(engine)


def assert_same(one: Reply | Exception, other: Reply) -> None:
    assert isinstance(one, Reply)
    for name in ("token_ids", "text", "finish_reason", "prompt_tokens", "image_tiles", "parsed"):
        assert getattr(one, name) == getattr(other, name), name


def test_the_demo_answers_unlike_prompts_as_in_single_calls(
    demo: SmolVLM, sizes: list[int]
) -> None:
    replies = demo.ask_batch(QUESTIONS)
    assert max(sizes) == len(QUESTIONS) == 8
    steps, sizes[:] = len(sizes), []
    for reply, question in zip(replies, QUESTIONS, strict=True):
        assert_same(reply, ask_alone(demo, question))
    assert len({reply.text for reply in replies}) >= 7
    assert steps <= max(len(reply.token_ids) for reply in replies)  # one step for all


def test_answers_come_as_they_end(demo: SmolVLM) -> None:
    ended = list(demo.stream_batch(QUESTIONS))
    assert sorted(number for number, _ in ended) == list(range(8))
    lengths = [len(reply.token_ids) for _, reply in ended if isinstance(reply, Reply)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_answers_join_and_leave(tiny: SmolVLM, sizes: list[int]) -> None:
    questions: list[Question] = [
        {"prompt": f"What {'is ' * n}it?", "images": PICTURES[n % 4], "max_tokens": 3 + 5 * n}
        for n in range(7)
    ]
    batch = AnswerBatch(tiny.engine, max_rows=4)
    answers = []
    for question in questions:  # some before, some while others are generated
        answers.append(batch.add(*read(tiny, question, ONE_TILE)))
        run(batch, 3)
    run(batch)
    assert set(sizes) >= {1, 2, 3, 4}
    assert max(sizes) == 4
    for answer, question in zip(answers, questions, strict=True):
        assert answer.is_over
        assert_same(answer.reply, ask_alone(tiny, question, detail="low"))


SAMPLINGS = [
    Sampling(temperature=1.0, seed=7, max_tokens=9),
    Sampling(temperature=1.0, seed=8, max_tokens=9),
    Sampling(temperature=0.7, seed=2**40 + 1, top_p=0.9, max_tokens=12),
    Sampling(temperature=1.3, seed=0, top_k=40, min_p=0.01, max_tokens=5),
    Sampling(max_tokens=7),
]


def test_a_seed_draws_each_answer_of_a_batch_as_alone(tiny: SmolVLM) -> None:
    questions: list[Question] = [{"prompt": "Say", "sampling": one} for one in SAMPLINGS]
    replies = tiny.ask_batch(questions)
    for reply, question in zip(replies, questions, strict=True):
        assert_same(reply, ask_alone(tiny, question))
    assert len({tuple(reply.token_ids) for reply in replies}) == len(SAMPLINGS)


def test_without_a_seed_rows_are_drawn_apart(tiny: SmolVLM) -> None:
    again = [tiny.ask_batch(["Say"] * 3, temperature=3.0, max_tokens=8) for _ in range(2)]
    assert len({tuple(reply.token_ids) for replies in again for reply in replies}) == 6


def test_answers_held_to_schemas_beside_others(demo: SmolVLM) -> None:
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["count"],
        "additionalProperties": False,
    }
    questions: list[Question] = [
        {"prompt": "How many shapes?", "images": EXAMPLES / "two.png", "schema": schema},
        ("Describe this image.", EXAMPLES / "four.png"),
        {"prompt": "How many shapes?", "images": EXAMPLES / "four.png", "regex": "[0-9]"},
        {"prompt": "Hello", "regex": "(yes|no), (never|always)", "temperature": 1.0, "seed": 1},
        {"prompt": "Hello", "regex": "abcdef", "max_tokens": 2},
    ]
    replies = demo.ask_batch(questions)
    for reply, question in zip(replies, questions, strict=True):
        assert_same(reply, ask_alone(demo, question))
    assert set(replies[0].parsed) == {"count"}
    assert [reply.finish_reason for reply in replies] == 4 * ["stop"] + ["length"]


def test_text_comes_in_chunks(demo: SmolVLM) -> None:
    batch = AnswerBatch(demo.engine)
    answers = [batch.add(*read(demo, q, BatchOptions(Sampling()))) for q in QUESTIONS[:3]]
    updates = run(batch)
    for answer in answers:
        own = [update for update in updates if update.answer is answer]
        assert "".join(one.chunk.text for one in own if one.chunk) == answer.reply.text
        assert [one.is_over for one in own] == [False] * (len(own) - 1) + [True]
        assert answer.reply.time_to_first_token_s > 0
        assert answer.reply.prompt_tps > 0
        assert answer.reply.generation_tps > 0


def test_others_wait_for_one_batch_of_tiles_or_chunk_at_most(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = dataclasses.replace(tiny.config.image, longest_edge=4 * tiny.config.tile_size)
    config = dataclasses.replace(tiny.config, image=image, eos_token_ids=())
    vlm = SmolVLM(Engine(tiny.path, config, tiny.model, tiny.engine.prompt_builder))
    monkeypatch.setattr(tiny.model, "prefill_chunk", 40)
    options = BatchOptions(Sampling(max_tokens=100))
    batch = AnswerBatch(vlm.engine)
    first = batch.add(*read(vlm, "Hello", options))
    run(batch, 2)
    before = first.reply.generation_tokens
    second = batch.add(*read(vlm, ("What?", Image.new("RGB", (64, 64))), options))
    run(batch, 1)  # 17 tiles of 4 tokens: 5 batches, and then 3 chunks and more
    assert second.reply.encoded_tiles == 4
    while not second.reply.token_ids:
        batch.step()
    assert second.reply.encoded_tiles == 17
    assert first.reply.generation_tokens - before > 5 + second.reply.prompt_tokens // 40
    batch.close()


def test_an_error_ends_one_answer(demo: SmolVLM) -> None:
    questions: list[Any] = [
        QUESTIONS[0],
        ("What?", "nowhere.png"),
        {"prompt": "What?", "temprature": 1},
        {"prompt": "What?", "temperature": -1.0},
        5,
        "wool " * 3000,
        QUESTIONS[1],
    ]
    results = demo.ask_batch(questions, return_errors=True, max_rows=2)
    names = [type(one).__name__ for one in results]
    assert names == [
        *("Reply", "MediaError", "TypeError", "ValueError", "PromptError", "ContextError", "Reply")
    ]
    for number in (0, 6):
        assert_same(results[number], ask_alone(demo, questions[number]))
    with pytest.raises(MediaError, match=r"nowhere\.png") as caught:
        demo.ask_batch(questions)
    assert caught.value.__notes__ == ["in question 1 of the batch, counted from 0"]


@pytest.mark.parametrize("where", ["prepare", "draw", "take"])
def test_a_fault_in_the_middle_ends_one_answer(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original, calls = getattr(BatchedAnswer, where), 0

    def fail_third(self: BatchedAnswer, *arguments: Any) -> Any:
        nonlocal calls
        calls += self is answers[1]
        if self is answers[1] and calls == 3:
            raise RuntimeError("out of memory")
        return original(self, *arguments)

    def fail_prepare(self: BatchedAnswer) -> Any:
        if self is answers[1]:
            raise RuntimeError("out of memory")
        return (yield from original(self))

    batch = AnswerBatch(tiny.engine)
    options = BatchOptions(dataclasses.replace(GREEDY, temperature=1.0, seed=1))
    answers = [batch.add(*read(tiny, f"What {n}?", options)) for n in range(3)]
    failing = fail_prepare if where == "prepare" else fail_third
    monkeypatch.setattr(BatchedAnswer, where, failing)
    updates = run(batch)
    assert [str(answer.error) for answer in answers] == ["None", "out of memory", "None"]
    assert [update.is_over for update in updates if update.answer is answers[1]][-1]
    monkeypatch.undo()
    for number in (0, 2):
        alone = ask_alone(tiny, f"What {number}?", sampling=options.sampling)
        assert_same(answers[number].reply, alone)


def test_cancelled_answers_leave(tiny: SmolVLM) -> None:
    vlm = make_endless(tiny)
    batch = AnswerBatch(vlm.engine, max_rows=3)
    answers = [batch.add(*read(vlm, f"What {n}?", ONE_TILE)) for n in range(5)]
    run(batch, 5)
    for number in (0, 4):  # one that is generated, and one that waits
        batch.cancel(answers[number])
    updates = run(batch)
    assert [update.is_over for update in updates if update.answer is answers[0]] == [True]
    assert answers[0].reply.finish_reason == answers[4].reply.finish_reason == "interrupted"
    assert 0 < answers[0].reply.generation_tokens < 12
    assert answers[4].reply.token_ids == []
    for number in (1, 2, 3):
        assert_same(answers[number].reply, ask_alone(vlm, f"What {number}?", sampling=GREEDY))


def test_an_answer_cancelled_while_it_is_prepared(tiny: SmolVLM) -> None:
    batch = AnswerBatch(tiny.engine)
    answer = batch.add(*read(tiny, ("What?", PICTURES[0]), BatchOptions(GREEDY)))
    batch.step()
    batch.cancel(answer)
    assert [update.is_over for update in batch.step()] == [True]
    assert batch.num_answers == 0
    assert answer.reply.token_ids == []


def test_closing_ends_all(tiny: SmolVLM) -> None:
    batch = AnswerBatch(make_endless(tiny).engine, max_rows=2)
    answers = [batch.add(*read(tiny, "Hello", ONE_TILE)) for _ in range(4)]
    run(batch, 4)
    batch.close()
    assert batch.num_answers == 0
    assert all(answer.is_over for answer in answers)
    assert {answer.reply.finish_reason for answer in answers} == {"interrupted"}
    batch.add(*read(tiny, "Hello", ONE_TILE))
    run(batch, 4)  # a batch can be used again
    assert batch.num_answers == 1
    batch.close()


def test_a_turn_that_is_closed_leaves_the_conversation_as_it_was(tiny: SmolVLM) -> None:
    prompt, sampling = read(tiny, "Hello", ONE_TILE)
    batch = AnswerBatch(tiny.engine)
    first = batch.add(dataclasses.replace(prompt, is_turn=True), sampling)
    run(batch)
    state = first.state
    assert state is not None
    other, _ = read(tiny, "Something else, and longer", ONE_TILE)
    batch.add(dataclasses.replace(other, state=state, is_turn=True), sampling)
    run(batch, 2)
    batch.close()
    tiny.engine.memory.clear()
    ids = np.concatenate([prompt.input_ids, first.reply.token_ids, [5, 6]]).astype(np.int32)
    turn = AnswerStream(tiny.engine, Prompt(ids, (), state), sampling).finish()
    tiny.engine.memory.clear()
    cold = AnswerStream(tiny.engine, Prompt(ids, ()), sampling).finish()
    assert turn.cached_tokens > prompt.input_ids.size // 2
    assert turn.token_ids == cold.token_ids


def test_an_error_in_preparation_is_told_before_more_questions_are_taken(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixel_values: mx.array) -> mx.array:
        raise MediaError("it cannot be encoded")

    monkeypatch.setattr(tiny.engine, "encoder", fail)
    questions = iter([("What?", Image.new("RGB", (64, 64), (n, 0, 0))) for n in range(9)])
    number, error = next(tiny.stream_batch(questions, detail="low"))
    assert number == 0
    assert isinstance(error, MediaError)
    assert len(list(questions)) == 8


def test_the_cache_stays_within_its_limit(
    tiny: SmolVLM, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five short rows fit, and four of more than 64 tokens; the fifth goes on with its tokens."""
    monkeypatch.setattr("mlx_smolvlm.kv.cache.STEP", 64)
    monkeypatch.setattr("mlx_smolvlm.generate.batched_answer.GROWTH", 20)
    vlm = make_endless(tiny, memory_bytes=0)  # so that it is computed again
    batch = AnswerBatch(vlm.engine, max_tokens=512)
    last = {"prompt": "Say 4", "temperature": 0.7, "seed": 3, "regex": "[a-z ]{900}"}
    questions: list[Any] = [*(f"Say {n}" for n in range(4)), last]
    options = BatchOptions(Sampling(max_tokens=70))
    answers = []
    for question in questions:
        answers.append(batch.add(*read(vlm, question, options)))
    largest = 0
    while batch.num_answers:
        batch.step()
        largest = max(largest, batch._cache.capacity)
    assert largest == 512
    assert max(sizes) == 5
    assert sizes[-1] == 1
    for answer, question in zip(answers, questions, strict=True):
        assert_same(answer.reply, ask_alone(vlm, question, max_tokens=70))
        assert answer.reply.generation_tokens == 70
        assert answer.reply.cached_tokens == 0


def test_no_more_answers_than_fit(tiny: SmolVLM, sizes: list[int]) -> None:
    batch = AnswerBatch(make_endless(tiny).engine, max_tokens=2 * 512)
    options = BatchOptions(Sampling(max_tokens=250))  # with a prompt, more than 256 tokens each
    for _ in range(3):
        batch.add(*read(tiny, "wool " * 20, options))
    run(batch, 9)
    assert max(sizes) == 2
    batch.close()


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"max_rows": 0}, "max_rows is 0"), ({"max_tokens": 511}, r"max_tokens is 511.*512 or above")],
)
def test_wrong_limits(tiny: SmolVLM, limits: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AnswerBatch(tiny.engine, **limits)


def test_what_a_batch_knows_is_not_done_again(tiny: SmolVLM) -> None:
    questions: list[Question] = [("What?", PICTURES[0]), ("Why so?", PICTURES[0])]
    first, second = tiny.ask_batch(questions, sampling=GREEDY)
    assert (first.encoded_tiles, second.encoded_tiles) == (5, 0)
    assert 0 < second.cached_tokens < second.prompt_tokens  # the picture
    text = tiny.ask("And?", PICTURES[0], sampling=GREEDY)
    assert text.encoded_tiles == 0
    assert text.cached_tokens == second.cached_tokens
    [again] = tiny.ask_batch([questions[0]], sampling=GREEDY)
    assert again.cached_tokens == again.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_the_answer_is_remembered_too(tiny: SmolVLM) -> None:
    for vlm in (tiny, make_endless(tiny, memory_bytes=0)):
        batch = AnswerBatch(vlm.engine)
        answers = [batch.add(*read(vlm, question, ONE_TILE)) for question in ("Hello", "Why?")]
        run(batch)
        for answer in answers:
            has_state = vlm is tiny
            assert (answer.state is not None) == has_state
            if has_state:
                assert answer.state is not None
                assert answer.state.num_tokens >= len(answer.state.content.ids) - 1
                prompt = Prompt(np.append(answer.state.content.ids, np.int32(5)), ())
                known, length = vlm.engine.memory.find_state(
                    vlm.engine.describe_content(prompt), prompt.pins, None
                )
                assert known is not None
                assert length >= prompt.input_ids.size - 2


def test_turns_of_conversations_keep_their_own_state(tiny: SmolVLM) -> None:
    batch = AnswerBatch(tiny.engine)
    prompt, sampling = read(tiny, ("What?", PICTURES[0]), ONE_TILE)
    first = batch.add(dataclasses.replace(prompt, is_turn=True), sampling)
    other = batch.add(*read(tiny, "Hello", ONE_TILE))
    run(batch)
    assert first.state is not None
    [picture] = prompt.media
    assert isinstance(picture, Picture)
    assert picture.image is not None  # the conversation may need it
    tiny.engine.memory.clear()
    ids = np.concatenate([prompt.input_ids, first.reply.token_ids, [5, 6]]).astype(np.int32)
    second = batch.add(Prompt(ids, prompt.media, first.state, is_turn=True), sampling)
    again = batch.add(*read(tiny, "Hello", ONE_TILE))
    run(batch)
    assert second.reply.cached_tokens >= ids.size - 3
    assert second.reply.encoded_tiles == 0
    assert again.reply.token_ids == other.reply.token_ids
    tiny.engine.memory.clear()
    cold = batch.add(Prompt(ids, prompt.media), sampling)
    run(batch)
    assert second.reply.token_ids == cold.reply.token_ids


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"max_kv_tokens": 160}])
def test_other_caches_answer_batches_too(options: dict[str, int]) -> None:
    """Packed rows equal packed single calls; rows keep every token."""
    vlm = load("demo", cache=CacheOptions(memory_bytes=0, **options))
    questions = QUESTIONS[2:4]
    for reply, question in zip(vlm.ask_batch(questions), questions, strict=True):
        assert reply.text == ask_alone(vlm, question).text


def test_questions_are_taken_when_there_is_room(tiny: SmolVLM) -> None:
    taken = 0

    def ask() -> Iterator[Question]:
        nonlocal taken
        for number in range(9):
            taken += 1
            yield f"What {number}?"

    stream = tiny.stream_batch(ask(), max_rows=3, max_tokens=5)
    next(stream)
    assert taken == 3
    assert len(list(stream)) == 8
    assert tiny.ask_batch([]) == []


def test_pictures_are_freed_when_they_are_encoded(tiny: SmolVLM) -> None:
    batch = AnswerBatch(make_endless(tiny).engine)
    answer = batch.add(*read(tiny, ("What?", PICTURES[0]), ONE_TILE))
    [picture] = answer.prompt.media
    assert isinstance(picture, Picture)
    assert picture.image is not None
    digest = Picture(picture.image, picture.grid, "low").digest
    batch.fill()
    assert picture.image is None
    assert picture.digest == digest
    batch.close()


def test_answers_wait_for_memory(
    tiny: SmolVLM, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit allows 700 tokens: two short rows; their growth leaves one."""
    vlm = make_endless(tiny)

    def count_spare(work: Work) -> int:
        return 700 - work.max_tokens

    monkeypatch.setattr("mlx_smolvlm.generate.batched_answer.GROWTH", 100)
    guard = SimpleNamespace(
        count_spare=count_spare,
        check_answer=lambda *_: None,
        setup=SimpleNamespace(tile_batch=4, prefill_chunk=512),
    )
    monkeypatch.setattr(vlm.engine, "guard", guard)
    monkeypatch.setattr(Engine, "tile_batch", 4)
    replies = vlm.ask_batch(["Say 0", "Say 1", "Say 2"], max_tokens=260)
    assert max(sizes) == 2
    assert sizes[-1] == 1
    for number, reply in enumerate(replies):
        monkeypatch.setattr(vlm.engine, "guard", None)
        assert_same(reply, ask_alone(vlm, f"Say {number}", max_tokens=260))


def test_threads_add_and_cancel_during_steps(tiny: SmolVLM) -> None:
    batch = AnswerBatch(tiny.engine, max_rows=2)
    answers: list[BatchedAnswer] = []

    def add() -> None:
        for number in range(40):
            answers.append(batch.add(*read(tiny, f"What {number}?", ONE_TILE)))
            if number % 4 == 0:
                batch.cancel(answers[-1])

    thread = threading.Thread(target=add)
    thread.start()
    over = list[BatchedAnswer]()
    while thread.is_alive() or batch.num_answers:
        over += [update.answer for update in batch.step() if update.is_over]
    thread.join()
    assert len(over) == len(set(over)) == 40
    assert set(over) == set(answers)
    assert all(answer.error is None for answer in answers)


def test_two_threads_cannot_step_at_once(tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = AnswerBatch(tiny.engine)
    batch.add(*read(tiny, "Hello", ONE_TILE))
    errors: list[Exception] = []

    def step_in_the_middle(self: AnswerBatch) -> None:
        def step() -> None:
            try:
                batch.step()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    monkeypatch.setattr(AnswerBatch, "_decode", step_in_the_middle)
    run(batch, 1)
    assert [str(error) for error in errors] == ["another thread runs a step of this batch"]
