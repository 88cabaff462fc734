"""What docs/threads.md says of threads, asyncio and forked processes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import CacheOptions, Sampling, SmolVLM, SmolVLMError, load, runtime
from mlx_smolvlm.generate.stream import Answer
from mlx_smolvlm.kv.cache import NO_PINS
from mlx_smolvlm.media.picture import ignore_warnings
from mlx_smolvlm.model.model import compile_encoder
from mlx_smolvlm.reuse.content import CachedState, Content
from mlx_smolvlm.reuse.memory import Memory

SHORT = Sampling(max_tokens=4)
PICTURES = [
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (48, 32 * (1 + seed), 3), np.uint8)
    )
    for seed in range(3)
]
QUESTIONS = ("What?", "Where is it?", "How many are there?")


def pause_first_token(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Events: the first answer has its first token; it may go on, which it does after 0.3 s."""
    reached, resume, add = threading.Event(), threading.Event(), Answer.add

    def add_slowly(self: Answer, token_id: int) -> str:
        if not reached.is_set():
            reached.set()
            resume.wait(0.3)
        return add(self, token_id)

    monkeypatch.setattr(Answer, "add", add_slowly)
    return reached, resume


def test_threads_that_ask_one_conversation_wait_for_each_other(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, resume = pause_first_token(monkeypatch)
    chat = tiny.chat(sampling=SHORT)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(chat.ask, QUESTIONS[0])
        assert reached.wait(10)
        second = pool.submit(chat.ask, QUESTIONS[1])
        second.add_done_callback(lambda _: resume.set())
        replies = [first.result(20), second.result(20)]
    alone = tiny.chat(sampling=SHORT)
    assert [one.token_ids for one in replies] == [
        alone.ask(question).token_ids for question in QUESTIONS[:2]
    ]
    assert chat.messages == alone.messages


def test_one_answer_is_not_generated_by_two_threads_at_once(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, resume = pause_first_token(monkeypatch)
    chat = tiny.chat(sampling=SHORT)
    stream = chat.stream(QUESTIONS[0])
    actions: list[Callable[[], object]] = [
        *(lambda: next(stream), lambda: next(stream.prepare(), None), lambda: list(stream)),
        *(stream.close, stream.finish),
        *(chat.undo, chat.fork, chat.reset, lambda: chat.stream(QUESTIONS[1])),
    ]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream.finish)
        assert reached.wait(10)
        for action in actions:
            with pytest.raises(SmolVLMError, match="being generated in another thread"):
                action()
        resume.set()
        assert answer.result(20).generation_tokens == 4
    assert chat.undo() == QUESTIONS[0]


def test_a_conversation_does_not_change_while_another_thread_asks(
    tiny: SmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, resume, open_media = threading.Event(), threading.Event(), tiny.engine.open_media
    chat = tiny.chat(sampling=SHORT)
    chat.ask(QUESTIONS[0])
    chat.save(tmp_path / "saved")

    def open_slowly(*arguments: Any) -> Any:
        reached.set()
        resume.wait(10)
        return open_media(*arguments)

    monkeypatch.setattr(tiny.engine, "open_media", open_slowly)
    actions: list[Callable[[], object]] = [
        *(chat.undo, chat.fork, chat.reset, chat.retry),
        *(lambda: chat.save(tmp_path / "other"), lambda: chat.load(tmp_path / "saved")),
    ]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat.ask, QUESTIONS[1])
        assert reached.wait(10)
        for action in actions:
            with pytest.raises(SmolVLMError, match="being answered in another thread"):
                action()
        resume.set()
        assert answer.result(20).generation_tokens == 4
    assert len(chat.messages) == 4
    assert chat.undo() == QUESTIONS[1]


def test_the_context_is_counted_while_another_thread_ends_the_answer(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, count_tokens = tiny.chat(sampling=SHORT), tiny.engine.count_tokens
    next(chat.stream(QUESTIONS[0]), None)
    before = chat.context_used

    def count_slowly(*arguments: Any) -> int:
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(chat.undo).result(20)
        return count_tokens(*arguments)

    monkeypatch.setattr(tiny.engine, "count_tokens", count_slowly)
    assert chat.context_used == before
    assert chat.context_used == 0


def test_threads_may_take_turns_at_one_stream(tiny: SmolVLM) -> None:
    stream = tiny.stream(QUESTIONS[0], PICTURES[0], sampling=SHORT)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: list(stream.prepare())).result(20)
        while pool.submit(next, stream, None).result(20) is not None:
            next(stream, None)
    assert stream.reply.token_ids == tiny.ask(QUESTIONS[0], PICTURES[0], sampling=SHORT).token_ids


def test_interleaved_streams_do_not_mix(tiny: SmolVLM) -> None:
    asked = list(zip(QUESTIONS, PICTURES, strict=True))
    streams = [tiny.stream(*one, sampling=SHORT) for one in asked]
    open_ = list(streams)
    while open_:
        open_ = [stream for stream in open_ if next(stream, None) is not None]
    replies = [tiny.ask(*one, sampling=SHORT) for one in asked]
    assert [one.reply.token_ids for one in streams] == [one.token_ids for one in replies]


def test_tasks_of_asyncio_share_a_model(tiny_folder: Path, tiny: SmolVLM) -> None:
    vlm = load(tiny_folder)  # whose encoder is compiled by the tasks
    asked = [(question, picture) for question in QUESTIONS for picture in PICTURES]

    async def ask_all() -> list[list[int]]:
        tasks = [asyncio.to_thread(vlm.ask, *one, sampling=SHORT) for one in asked]
        return [reply.token_ids for reply in await asyncio.gather(*tasks)]

    assert asyncio.run(ask_all()) == [tiny.ask(*one, sampling=SHORT).token_ids for one in asked]


def test_one_thread_at_a_time_compiles_the_encoder(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing, done, model, encode = (
        threading.Event(),
        threading.Event(),
        tiny.model,
        tiny.model.encode,
    )

    def trace(pixel_values: mx.array) -> mx.array:
        if not tracing.is_set():
            tracing.set()
            done.wait(0.3)  # while the weights are placeholders
        return encode(pixel_values)

    monkeypatch.setattr(type(model), "encode", lambda self, pixel_values: trace(pixel_values))
    encoder = compile_encoder(model)

    def run() -> np.ndarray:
        return np.array(encoder(mx.ones((1, 64, 64, 3))))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run)
        assert tracing.wait(10)
        second = pool.submit(run)
        second.add_done_callback(lambda _: done.set())
        np.testing.assert_array_equal(first.result(20), second.result(20))


def test_one_thread_at_a_time_changes_the_memory(tiny: SmolVLM) -> None:
    class SlowStore:
        def __init__(self) -> None:
            self.reached, self.done, self.is_busy = threading.Event(), threading.Event(), False

        def find(self, content: Content, most: int, above: int) -> None:
            self.is_busy = True
            self.reached.set()
            self.done.wait(0.3)
            self.is_busy = False

        def save(self, state: CachedState, prompt: Content) -> None:
            assert not self.is_busy

    store, content = SlowStore(), Content(np.arange(4, dtype=np.int32))
    memory = Memory(CacheOptions(), store)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(memory.find_state, content, NO_PINS, None)
        assert store.reached.wait(10)
        second = pool.submit(
            memory.keep_state, CachedState(content, tiny.engine.make_cache()), content, False
        )
        second.add_done_callback(lambda _: store.done.set())
        second.result(20)
        first.result(20)


def test_threads_that_ignore_warnings_restore_the_filters() -> None:
    entered, resume, filters = threading.Event(), threading.Event(), list(warnings.filters)

    def ignore() -> None:
        with ignore_warnings():
            entered.set()
            resume.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with ignore_warnings():
            second = pool.submit(ignore)
            entered.wait(0.3)  # it must not enter yet
        resume.set()
        second.result(20)
    assert warnings.filters == filters


def test_a_forked_process_says_that_it_cannot_compute(tiny: SmolVLM, tiny_folder: Path) -> None:
    tiny.ask(QUESTIONS[0], sampling=SHORT)
    chat = tiny.chat()
    actions: list[Callable[[], object]] = [
        *(lambda: tiny.ask(QUESTIONS[1]), lambda: chat.ask(QUESTIONS[1])),
        *(lambda: tiny.ask_many(None, list(QUESTIONS)), lambda: tiny.choose("?", ["a", "b"])),
        *(lambda: tiny.encode_images(PICTURES), lambda: load(tiny_folder)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of Python warn of the fork itself
        child = os.fork()
    if child == 0:
        signal.alarm(10)  # without the check it would hang
        refused = 0
        for action in actions:
            try:
                action()
            except SmolVLMError as error:
                refused += "use the 'spawn' start method" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(actions)


def test_the_end_of_the_program_waits_for_threads(
    tiny: SmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[int] = set()
    monkeypatch.setattr(runtime, "_threads", used)
    monkeypatch.setattr(runtime, "_TASKS", tmp_path)
    tiny.ask(QUESTIONS[0], sampling=SHORT)
    assert not used  # the main thread ends last
    thread = threading.Thread(target=tiny.ask, args=(QUESTIONS[0],), kwargs={"sampling": SHORT})
    thread.start()
    thread.join()
    assert used == {thread.native_id}
    task = tmp_path / str(thread.native_id)
    task.touch()  # it still releases what it holds
    threading.Timer(0.05, task.unlink).start()
    runtime._wait_for_threads()
    assert not task.exists()


def test_a_thread_goes_on_when_the_main_thread_has_ended() -> None:
    code = """if True:
        import threading, time
        import numpy as np
        from mlx_smolvlm.model import products
        products.THREADED_SIZE = 1
        products.count_blas_threads = lambda: 2
        def multiply():
            threading.main_thread().join()
            time.sleep(0.1)  # until the pools are shut down
            rows = np.ones((2, 64), np.float32)
            print(products.multiply(np.ones((64, 64), np.float32), None, rows).sum())
        threading.Thread(target=multiply).start()
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("8192.0\n", "")


def test_a_program_that_forks_before_it_loads_and_asks_in_threads(tiny_folder: Path) -> None:
    code = f"""if True:
        import os, threading, mlx_smolvlm, PIL.Image
        child = os.fork()
        vlm = mlx_smolvlm.load({str(tiny_folder)!r})
        if child == 0:
            os._exit(vlm.ask("What?", max_tokens=2).generation_tokens)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        def ask():
            vlm.ask("What?", PIL.Image.new("RGB", (64, 64)), max_tokens=2)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    # Without the wait it aborts in most runs, but not in all.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
