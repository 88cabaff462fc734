"""Comparisons: numbers against numpy, parts that cannot be compared, reports."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_smolvlm.checkpoint.load import build_model
from mlx_smolvlm.config import Config, Quantization
from mlx_smolvlm.convert.compare import CompareOptions, Comparison, compare
from mlx_smolvlm.convert.compare.differences import pair_answers
from mlx_smolvlm.convert.compare.observe import (
    BLOCK,
    HEAD_ROWS,
    GreedyAnswer,
    Predictions,
    compare_predictions,
    compute_cosines,
    compute_frobenius_error,
    compute_relative_errors,
    record_outputs,
    split_texts,
)
from mlx_smolvlm.convert.compare.plot import HIGH, draw_plot
from mlx_smolvlm.convert.compare.report import (
    KL_EDGES_NATS,
    format_card_section,
    format_differences,
    make_summary_rows,
    summarize_tokens,
)
from mlx_smolvlm.convert.compare.samples import TEXTS, PictureQuestion, draw_pictures
from mlx_smolvlm.convert.open_model import FolderReader, Matrix, UnpackingLinear
from mlx_smolvlm.convert.options import pack
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.smolvlm import SmolVLM, load

TEXT = "The ferry leaves the island at seven, long before the shops open."
FEW = CompareOptions(texts=(TEXT,), max_tokens=3)


def folder_like(
    source: Path,
    folder: Path,
    change: Callable[[dict[str, Any]], object] = lambda values: None,
    seed: int = 2,
) -> Path:
    """A copy of the checkpoint `source` with a changed configuration and random weights."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    model, key = build_model(Config.from_dict(values)), mx.random.key(seed)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        weights[name] = mx.random.normal(value.shape, key=own) / math.sqrt(value.shape[-1])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="module")
def other_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_like(tiny_folder, tmp_path_factory.mktemp("other") / "model")


@pytest.fixture(scope="module")
def found(tiny_folder: Path, other_folder: Path) -> Comparison:
    return compare(tiny_folder, other_folder, FEW)


# Numbers


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("count", "vocabulary"), [(1, 11), (HEAD_ROWS, 11), (2 * HEAD_ROWS + 3, 11), (5, 49280)]
)
def test_predictions_are_those_of_numpy(count: int, vocabulary: int) -> None:
    rng = np.random.default_rng(count)
    logits = rng.standard_normal((2, count, vocabulary)) * 3
    targets = rng.integers(0, vocabulary, count)
    states = tuple(mx.array(one.astype(np.float32)) for one in logits)
    found = compare_predictions(states, (lambda x: x, lambda x: x), targets)
    p, q = softmax(logits[0]), softmax(logits[1])
    assert found.kl_nats == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-4, abs=1e-6)
    assert np.array_equal(found.likeliest, logits.argmax(-1))
    rows = np.arange(count)
    for number, one in enumerate((p, q)):
        assert found.nll_nats[number] == pytest.approx(-np.log(one[rows, targets]), rel=1e-4)


def test_divergence_is_of_the_second_from_the_first() -> None:
    sure, unsure = mx.array([[20.0, 0.0]]), mx.array([[0.0, 0.0]])
    heads = (lambda x: x, lambda x: x)
    one_way = compare_predictions((sure, unsure), heads, np.array([0])).kl_nats
    assert one_way == pytest.approx([math.log(2)], abs=1e-5)
    assert compare_predictions((unsure, sure), heads, np.array([0])).kl_nats[0] > 5


def test_token_loss_sums_up_all_parts() -> None:
    rng = np.random.default_rng(0)
    kl = rng.exponential(0.1, 1000)
    kl[:3] = 0, 1e-6, 50
    nll, likeliest = rng.exponential(1, (2, 1000)), rng.integers(0, 2, (2, 1000))
    cuts = (slice(0, 300), slice(300, 1000))
    parts = [Predictions(kl[cut], nll[:, cut], likeliest[:, cut]) for cut in cuts]
    loss = summarize_tokens(parts)
    assert loss is not None
    assert loss.tokens == 1000
    assert loss.kl_nats == pytest.approx(sum(kl) / 1000)
    assert loss.kl_nats_median == pytest.approx(sum(sorted(kl)[499:501]) / 2)
    assert loss.kl_nats_p99 == pytest.approx(np.percentile(kl, 99))
    assert loss.kl_nats_max == 50
    assert loss.perplexity_reference == pytest.approx(math.exp(nll[0].mean()))
    assert loss.perplexity_other == pytest.approx(math.exp(nll[1].mean()))
    assert loss.top_1_agreement == pytest.approx((likeliest[0] == likeliest[1]).mean())
    edges = [-1, *KL_EDGES_NATS, 1e9]
    counts = [sum(low <= x < high for x in kl) for low, high in itertools.pairwise(edges)]
    assert list(loss.kl_counts) == counts
    assert (counts[0], counts[-1]) == (1, 1)
    assert summarize_tokens([]) is None


def test_vectors_are_compared_one_by_one() -> None:
    a = mx.array([[1.0, 0.0], [0.0, 100.0], [3.0, 4.0]])
    b = mx.array([[0.0, 1.0], [0.0, 50.0], [3.0, 4.0]])
    assert compute_cosines(a, b) == pytest.approx([0, 1, 1])
    assert compute_relative_errors(a, b) == pytest.approx([math.sqrt(2), 0.5, 0])
    assert compute_cosines(a, -a).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("q", [None, Quantization(4, 32, "affine"), Quantization(8, 32, "mxfp8")])
def test_matrices_are_compared_in_blocks(q: Quantization | None) -> None:
    rows = BLOCK // 1024 + 5  # more than one block
    weight = mx.random.normal((rows, 1024), key=mx.random.key(0))
    near = weight * 1.01 if q is None else mx.dequantize(*_packed(weight, q), **_how(q))
    arrays = {"weight": near} if q is None else pack(weight, q)
    error = compute_frobenius_error(Matrix({"weight": weight}, None), Matrix(arrays, q))
    one, other = np.array(weight, dtype=np.float64), np.array(near, dtype=np.float64)
    expected = np.linalg.norm(other - one) / np.linalg.norm(one)
    assert expected > 0.005
    assert error == pytest.approx(expected, rel=1e-4)


def _packed(weight: mx.array, q: Quantization) -> list[mx.array]:
    return list(mx.quantize(weight, q.group_size, q.bits, mode=q.mode))


def _how(q: Quantization) -> dict[str, Any]:
    return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode, "dtype": mx.float32}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_unpacking_changes_nothing(rows: int, bias: bool) -> None:
    packed = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=bias), 32, 4)
    if bias:
        packed.bias = mx.arange(32, dtype=mx.float32)
    x = mx.random.normal((1, rows, 64), key=mx.random.key(0))
    difference = UnpackingLinear(packed)(x) - packed(x)
    assert mx.abs(difference).max().item() < 1e-4


def test_recording_leaves_the_layers_as_they_were(tiny_in_mlx: SmolVLM) -> None:
    layers = list(tiny_in_mlx.model.text_model.layers)
    with record_outputs(tiny_in_mlx.model.text_model.layers) as states:
        tiny_in_mlx.model(tiny_in_mlx.model.embed(np.array([1, 2, 3])))
    assert [state.shape for state in states] == [(1, 3, 64), (1, 3, 64)]
    assert all(a is b for a, b in zip(layers, tiny_in_mlx.model.text_model.layers, strict=True))


def test_windows_end_where_they_should(tiny: SmolVLM) -> None:
    encode = tiny.engine.prompt_builder.tokenizer.encode
    long = " ".join(TEXTS)
    ids = encode(long).ids
    assert len(ids) > 1200
    passages = split_texts(tiny, [TEXT, long], 1200)
    assert [one.input_ids.size for one in passages[1:3]] == [512, 512]
    assert sum(one.input_ids.size for one in passages) == 1200
    assert passages[1].input_ids.tolist() == ids[:512]
    assert [one.start for one in passages] == [1] * len(passages)
    assert split_texts(tiny, ["", "a"], 100) == []  # nothing to predict


# Whole comparisons


def test_equal_checkpoints_differ_in_nothing(tiny_folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = compare(tiny_folder, tiny_folder, FEW, progress=lambda *step: steps.append(step[:2]))
    assert found.texts is not None
    assert found.answers_forced is not None
    for loss in (found.texts, found.answers_forced):
        assert (loss.kl_nats_max, loss.top_1_agreement) == (0, 1)
        assert loss.perplexity_reference == loss.perplexity_other
    assert [one.relative_error for one in (*found.layers, *found.matrices)] == [0] * (4 + 19)
    assert [one.cosine for one in found.features] == pytest.approx([1, 1])
    assert found.equal_answers == len(found.answers) == len(draw_pictures()) + 1
    assert (found.equal_share, found.surprises) == (1, ())
    assert list(format_differences(found)) == []
    assert [done for done, _ in steps] == list(range(steps[-1][1]))  # every step is told once


def test_other_weights_show_everywhere(found: Comparison, tiny: SmolVLM) -> None:
    assert found.texts is not None
    assert found.texts.kl_nats > 0.01
    assert found.texts.tokens == len(tiny.engine.prompt_builder.tokenizer.encode(TEXT).ids) - 1
    assert all(one.relative_error > 0.1 for one in (*found.layers, *found.matrices))
    assert found.reference.bits_per_weight == 32
    assert found.equal_answers < len(found.answers)
    assert found.peak_memory_gb > 0


def test_surprises_are_the_worst_tokens(
    found: Comparison, tiny: SmolVLM, other_folder: Path
) -> None:
    assert found.texts is not None
    worst = [one.kl_nats for one in found.surprises]
    assert len(worst) == 5
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(found.texts.kl_nats_max)
    tokenizer = tiny.engine.prompt_builder.tokenizer
    ids = np.array(tokenizer.encode(TEXT).ids)
    logits = [np.array(vlm.model(vlm.model.embed(ids))[0]) for vlm in (tiny, load(other_folder))]
    p, q = (softmax(one[:-1].astype(np.float64)) for one in logits)
    place = int((p * np.log(p / q)).sum(-1).argmax())
    first = found.surprises[0]
    assert first.true == tokenizer.decode([ids[place + 1]])
    assert first.context == tokenizer.decode(ids[max(0, place - 11) : place + 1])
    assert first.reference == tokenizer.decode([p[place].argmax()])
    assert first.other == tokenizer.decode([q[place].argmax()])


@pytest.mark.parametrize(
    ("one", "other", "tokens", "equal"),
    [
        ((1, 2, 3), (1, 2, 3), 3, 3),
        ((1, 2, 3), (1, 9, 3), 3, 1),  # what is the same again later does not count
        ((1, 2), (1, 2, 3), 3, 2),
        ((1, 2, 3), (1,), 3, 1),
        ((4,), (5,), 1, 0),
        ((), (), 0, 0),
    ],
)
def test_answers_are_equal_up_to_the_first_difference(
    one: tuple[int, ...], other: tuple[int, ...], tokens: int, equal: int
) -> None:
    sides: list[Any] = [
        SimpleNamespace(answers=[GreedyAnswer("text", ids)]) for ids in (one, other)
    ]
    (pair,) = pair_answers([PictureQuestion("What?", None, "name")], *sides)
    assert (pair.tokens, pair.equal_tokens, pair.picture) == (tokens, equal, "name")


def test_a_question_goes_to_each_picture_in_turn(tiny_folder: Path) -> None:
    pictures = tuple((f"picture {n}", Image.new("RGB", (20, 20))) for n in range(9))
    options = CompareOptions(
        texts=(), pictures=pictures, questions=("First?", "Second?"), max_tokens=1
    )
    found = compare(tiny_folder, tiny_folder, options)
    asked = [(one.question, one.picture) for one in found.answers]
    assert asked[:3] == [
        ("First?", "picture 0"),
        ("Second?", "picture 1"),
        ("First?", "picture 2"),
    ]
    assert len(asked) == 8 + 1
    assert asked[-1][1] is None
    assert found.features[0].vectors == 9 * 16  # all pictures are looked at, one tile each


def test_without_pictures(tiny_folder: Path, other_folder: Path) -> None:
    found = compare(tiny_folder, other_folder, CompareOptions(texts=(TEXT,), pictures=()))
    assert found.features == ()
    assert [one.path for one in found.layers] == ["text_model.layers.0", "text_model.layers.1"]
    assert len(found.answers) == 1


def test_sizes_that_differ_leave_parts_out(tiny_folder: Path, tmp_path: Path) -> None:
    def wider(values: dict[str, Any]) -> None:
        values["text"]["hidden_size"] = 32
        values["text"]["num_hidden_layers"] = 3

    found = compare(tiny_folder, folder_like(tiny_folder, tmp_path / "b", wider), FEW)
    assert found.texts is not None
    assert [one.name for one in found.features] == ["patch_features"]
    assert {one.path.split(".")[0] for one in found.layers} == {"vision_model"}
    assert {one.path.split(".")[0] for one in found.matrices} == {"vision_model"}

    def other_tiles(values: dict[str, Any]) -> None:
        values["vision"]["patch_size"] = 4

    found = compare(tiny_folder, folder_like(tiny_folder, tmp_path / "c", other_tiles), FEW)
    assert found.features == ()
    assert {one.path.split(".")[0] for one in found.layers} == {"text_model"}


def test_other_tokenizers_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    other = folder_like(tiny_folder, tmp_path / "b")
    values = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(values, indent=3))
    compare(tiny_folder, other, FEW)  # the same, only written in another way
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[f"{last}x"] = vocabulary.pop(last)
    values["model"]["merges"] = values["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"have different tokenizers"):
        compare(tiny_folder, other, FEW)

    def larger(values: dict[str, Any]) -> None:
        values["text"]["vocab_size"] += 1

    with pytest.raises(CheckpointError, match=r"have different tokenizers"):
        compare(tiny_folder, folder_like(tiny_folder, tmp_path / "c", larger), FEW)


def test_datasets_are_answered_by_both(tiny: SmolVLM, other_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    lines: list[dict[str, Any]] = [
        {"image": "red.png", "question": "What?", "task": "red"},
        {"image": "red.png", "question": "Where?", "task": "red"},
        {"question": "Why?", "task": "words"},
        {"question": "Who?", "task": "words"},
    ]
    answers = [
        tiny.ask(
            one["question"],
            images=[tmp_path / one["image"]] if "image" in one else [],
            sampling=Sampling(max_tokens=256),
        ).text
        for one in lines
    ]
    for line, answer in zip(lines, answers, strict=True):
        line |= {"answer": "x", "answers": [answer if line["question"] != "Where?" else "no"]}
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = CompareOptions(texts=(), pictures=(), data=(tmp_path,), max_tokens=1)
    steps: list[tuple[int, int]] = []
    red, words = compare(
        tiny.path, other_folder, options, progress=lambda *step: steps.append(step[:2])
    ).tasks
    assert [done for done, _ in steps] == list(range(steps[-1][1]))
    assert (red.task, red.metric, red.examples) == ("red", "exact", 2)
    assert (red.reference, red.other, red.same_answers) == (0.5, 0, 0)
    assert (words.task, words.examples, words.reference, words.other) == ("words", 2, 1, 0)
    found = compare(tiny.path, tiny.path, replace(options, data_limit=1))
    assert [(one.examples, one.same_answers) for one in found.tasks] == [(1, 1), (1, 1)]
    rows = dict(make_summary_rows(found))
    assert rows["task red"] == "100.0% -> 100.0% (exact); 1 of 1 answers the same"


@pytest.mark.parametrize("name", ["text_tokens", "max_tokens", "data_limit"])
def test_numbers_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        CompareOptions(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("text_tokens", None, "text_tokens is None; it must be a whole number"),
        ("max_tokens", 2.5, "max_tokens is 2.5; it must be a whole number"),
        ("data_limit", True, "data_limit is True; it must be a whole number"),
        ("texts", "Hello", "texts is 'Hello'; it must be a tuple"),
        ("questions", "What?", "questions is 'What?'; it must be a tuple"),
        ("data", "test.jsonl", "data is 'test.jsonl'; it must be a tuple"),
    ],
)
def test_options_of_other_types_are_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        CompareOptions(**{name: value})


def test_matrix_shapes(tiny_folder: Path) -> None:
    matrix = FolderReader(tiny_folder).read_matrix("text_model.layers.0.mlp.gate_up_proj")
    assert (matrix.shape, matrix.quantization) == ((192, 64), None)
    q = Quantization(3, 32, "affine")
    assert Matrix(pack(mx.zeros((6, 64)), q), q).shape == (6, 64)


# What is told of it


def test_summary_and_card_say_the_numbers(found: Comparison) -> None:
    assert found.texts is not None
    rows = dict(make_summary_rows(found))
    assert f"{found.texts.kl_nats:.3g} nats a token" in rows["texts, KL"]
    assert rows["texts, top-1 agreement"].startswith(f"{found.texts.top_1_agreement:.2%} of ")
    assert f"cosine {found.features[0].cosine:.6f}" in rows["pictures, after the encoder"]
    worst = max(found.matrices, key=lambda one: one.relative_error)
    card = format_card_section(found, "verify.png")
    assert card.startswith("## What the conversion lost\n")
    assert f"| `{worst.path}` | float | {worst.relative_error:.4f} |" in card
    assert card.endswith("![Errors by matrix, by layer and by token](verify.png)\n")
    assert "![" not in format_card_section(found)
    for row in [line for line in card.splitlines() if line.startswith("|")]:
        assert row.count("|") in (3, 4)


def test_a_mean_over_a_part_weighs_its_matrices(found: Comparison) -> None:
    text = [m for m in found.matrices if m.path.startswith("text_model.layers")]
    total = sum(one.parameters for one in text)
    mean = sum(one.relative_error * one.parameters for one in text) / total
    assert dict(make_summary_rows(found))["weights, text"].startswith(f"relative error {mean:.4f}")


def test_the_plot_shows_the_worst_matrix_in_red(found: Comparison, tmp_path: Path) -> None:
    draw_plot(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == HIGH).all(1).sum() >= 100
    assert (tmp_path / "plot.png").stat().st_size < 300_000


def test_drawn_pictures_are_the_same_every_time() -> None:
    one, other = draw_pictures(), draw_pictures()
    assert [a.tobytes() == other[name].tobytes() for name, a in one.items()] == [True] * 4
    assert len({a.tobytes() for a in one.values()}) == 4
