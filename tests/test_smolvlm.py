"""The Python API on a model with random weights."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlx_smolvlm
from mlx_smolvlm import MediaError, PromptError, Sampling, SmolVLM
from mlx_smolvlm.generate.engine import Prompt
from mlx_smolvlm.generate.stream import Answer
from mlx_smolvlm.smolvlm import _choose_dtype

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
SHORT = Sampling(max_tokens=6)


def test_stream_and_ask_agree(tiny: SmolVLM) -> None:
    stream = tiny.stream("What?", images=[PICTURE], sampling=SHORT)
    text = "".join(chunk.text for chunk in stream)
    reply = tiny.ask("What?", images=PICTURE, sampling=SHORT)
    assert stream.reply.token_ids == reply.token_ids
    assert text == reply.text == str(reply) == stream.reply.text
    assert reply.generation_tokens == len(reply.token_ids) == 6
    assert reply.finish_reason == "length"
    assert reply.image_tiles == 5  # 2 x 2 and the global tile
    assert (
        reply.prompt_tokens
        == tiny.engine.prompt_builder.build(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            [tiny_grid(tiny)],
        ).size
    )
    assert reply.time_to_first_token_s > 0
    assert reply.peak_memory_gb > 0
    assert json.loads(json.dumps(reply.to_dict()))["text"] == text


def tiny_grid(vlm: SmolVLM) -> object:
    from mlx_smolvlm.media.tiles import compute_grid

    return compute_grid(PICTURE.size, vlm.config)


def test_the_picture_changes_the_answer(tiny: SmolVLM) -> None:
    other = Image.new("RGB", PICTURE.size, "red")
    first, second = (tiny.ask("What?", images=[p], sampling=SHORT) for p in (PICTURE, other))
    assert first.token_ids != second.token_ids


def test_messages_with_pictures_inside_equal_pictures_beside(tiny: SmolVLM) -> None:
    beside = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "One "}, {"type": "image"}, {"type": "image"}],
        }
    ]
    inside = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "One "},
                {"type": "image", "image": PICTURE},
                {"type": "image"},
            ],
        }
    ]
    other = Image.new("RGB", (20, 90), "blue")
    a = tiny.ask(beside, images=[PICTURE, other], sampling=SHORT)
    b = tiny.ask(inside, images=[other], sampling=SHORT)
    assert a.token_ids == b.token_ids


@pytest.mark.parametrize("count", [0, 3])
def test_pictures_and_image_items_must_match(tiny: SmolVLM, count: int) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(PromptError, match="image item"):
        tiny.ask(messages, images=[PICTURE] * count)


def test_context_guard_comes_before_any_work(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_smolvlm.generate.stream.encode", None)
    with pytest.raises(PromptError, match=r"context is 512.*fewer pictures"):
        tiny.stream("What?", images=[PICTURE] * 20)
    with pytest.raises(PromptError, match="shorten the text"):
        tiny.stream("wool " * 600)


def test_answer_ends_with_the_context(tiny: SmolVLM) -> None:
    prompt = "wool " * 20
    length = tiny.ask(prompt, sampling=Sampling(max_tokens=1)).prompt_tokens
    reply = tiny.ask(prompt, sampling=Sampling(max_tokens=10_000))
    assert reply.finish_reason in ("length", "stop")
    assert reply.prompt_tokens + reply.generation_tokens <= 512
    if reply.finish_reason == "length":
        assert length + reply.generation_tokens == 512


def test_stop_text_is_left_out(tiny: SmolVLM) -> None:
    sampling = Sampling(max_tokens=40)
    whole = tiny.ask("Tell me", sampling=sampling)
    middle = whole.text[len(whole.text) // 2 :][:3]
    cut = tiny.ask("Tell me", sampling=Sampling(max_tokens=40, stop=(middle,)))
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop"
    assert cut.generation_tokens < whole.generation_tokens


def test_what_only_begins_a_stop_text_is_shown(tiny: SmolVLM) -> None:
    whole = tiny.ask("Tell me", sampling=SHORT)
    begun = Sampling(max_tokens=6, stop=(whole.text[-1] + "never",))
    stream = tiny.stream("Tell me", sampling=begun)
    assert "".join(chunk.text for chunk in stream) == stream.reply.text == whole.text
    assert stream.reply.finish_reason == "length"


def test_tokens_that_frame_pictures_are_no_text(tiny: SmolVLM) -> None:
    answer = Answer(tiny.engine, Prompt(np.array([1]), ()), ())
    letter = tiny.engine.prompt_builder.tokenizer.token_to_id("a")
    framing = tiny.engine.prompt_builder.tokenizer.token_to_id("<fake_token_around_image>")
    shown = [answer.add(one) for one in (letter, tiny.config.image_token_id, framing, letter)]
    assert shown == ["a", "", "", "a"]
    assert answer.reply.text == "aa"
    assert answer.reply.generation_tokens == 4


def test_an_early_end_keeps_what_was_said(tiny: SmolVLM) -> None:
    stream = tiny.stream("Tell me", sampling=Sampling(max_tokens=40))
    said = next(stream).text + next(stream).text
    stream.close()
    assert stream.reply.text == said
    assert stream.reply.finish_reason == "interrupted"
    assert list(stream) == []


def test_conversation_equals_its_transcript(tiny: SmolVLM) -> None:
    chat = tiny.chat(system="Be brief.", sampling=SHORT)
    first = chat.ask("What?", images=[PICTURE])
    second = chat.ask("And now?")
    transcript = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And now?"},
    ]
    assert tiny.ask(transcript, images=[PICTURE], sampling=SHORT).token_ids == second.token_ids
    chat.reset()
    alone = chat.ask("And now?")
    assert (
        alone.token_ids
        == tiny.ask("And now?", system="Be brief.", sampling=SHORT).token_ids
        != second.token_ids
    )


def test_a_failed_turn_leaves_no_trace(tiny: SmolVLM) -> None:
    chat = tiny.chat(sampling=SHORT)
    chat.ask("One")
    before = tiny.ask("One", sampling=SHORT).text
    with pytest.raises(MediaError):
        chat.ask("Two", images=["nowhere.png"])
    second = chat.ask("Three")
    transcript = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": before},
        {"role": "user", "content": "Three"},
    ]
    assert tiny.ask(transcript, sampling=SHORT).token_ids == second.token_ids


def test_tile_batches_do_not_change_the_embeddings(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.array(tiny.encode_images([PICTURE, PICTURE.rotate(90, expand=True)]))
    monkeypatch.setattr(type(tiny.engine), "tile_batch", 2)
    parts = np.array(tiny.encode_images([PICTURE, PICTURE.rotate(90, expand=True)]))
    assert whole.shape == (10, 4, 64)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_answers_import_no_heavy_package(tiny_folder: Path) -> None:
    code = (
        "import sys, mlx_smolvlm, numpy\n"
        "lazy = {'PIL', 'av', 'jinja2', 'tokenizers', 'huggingface_hub', 'typer'}\n"
        "heavy = lazy & {*sys.modules}\n"
        "assert not heavy, heavy\n"
        f"vlm = mlx_smolvlm.load({str(tiny_folder)!r})\n"
        "heavy = {'PIL', 'av', 'huggingface_hub', 'typer'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
        "vlm.ask('Hi', max_tokens=3)\n"
        "assert 'PIL' not in sys.modules\n"
        "picture = numpy.zeros((9, 9, 3), 'uint8')\n"
        "vlm.ask('Hi', images=[picture], max_tokens=3)\n"
        "vlm.ask('Hi', max_tokens=3, temperature=0.7, top_p=0.9, top_k=9, min_p=0.1, seed=1)\n"
        "import mlx_smolvlm.train.finetune, mlx_smolvlm.train.parameters\n"
        "lazy = {'av', 'llguidance'}\n"
        "heavy = {'torch', 'transformers', 'mlx_lm', *lazy} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist() -> None:
    for name in mlx_smolvlm.__all__:
        assert getattr(mlx_smolvlm, name) is not None


@pytest.mark.parametrize(
    ("stored", "on_cpu", "expected"),
    [
        ("float16", True, "float32"),
        ("float32", True, "float32"),
        ("float32", False, "bfloat16"),
        ("float16", False, "float16"),
    ],
)
def test_usual_dtype(tiny: SmolVLM, stored: str, on_cpu: bool, expected: str) -> None:
    config = dataclasses.replace(tiny.config, dtype=stored)
    assert _choose_dtype(config, on_cpu) == expected


def test_repr_names_the_demo_and_the_folder_of_another_model(tiny: SmolVLM) -> None:
    assert repr(mlx_smolvlm.load("demo")) == "SmolVLM('demo')"
    assert repr(tiny) == f"SmolVLM('tests/tiny', path={str(tiny.path)!r})"
