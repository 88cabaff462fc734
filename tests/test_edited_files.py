"""Datasets, settings and results that a person or a program edited: one clear line, no traceback.

Each reader gets some dozens of seeded mutations, and by name what once went past it.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.checkpoint.lora import (
    AdapterConfig,
    attach_adapter,
    list_adaptable,
    load_adapter,
    save_adapter,
)
from mlx_smolvlm.checkpoint.lora import compute_signature as signature_of
from mlx_smolvlm.convert.compare.measure import VERIFY_FILE, format_verification
from mlx_smolvlm.convert.options import read_recipe
from mlx_smolvlm.errors import CheckpointError, DatasetError, SmolVLMError, TrainingError, shorten
from mlx_smolvlm.train.dataset import read_dataset
from mlx_smolvlm.train.evaluate.cases import EvaluationOptions, read_cases
from mlx_smolvlm.train.evaluate.report import Result, ResultsFile, score_tasks
from mlx_smolvlm.train.finetune import check_folder, check_same, rewind
from mlx_smolvlm.train.loop import Loop, LoopOptions, Schedule, read_notes
from mlx_smolvlm.train.settings import read_settings
from tests.helpers import file_damage

LINE = {"image": "a.png", "question": "What?", "answers": ["Yes", "No"], "metric": "exact"}
LINE |= {"choices": ["Yes", "No"], "task": "x", "system": "Be brief."}
TURNS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A dog."},
    ],
    "images": ["a.png"],
}
SETTINGS = """model = "demo"
method = "lora"
parts = ["text"]
detail = 2
steps = 3
fps = 1.0
out = "o"
seed = 1
fuse = false
[lora]
rank = 4
scale = 2.0
[optimizer]
rate = 1e-3
schedule = "cosine"
clip = 1.0
[[data]]
path = "d"
weight = 1.0
"""
RECIPE = """bits = 4
vision_bits = 8
group_size = 64
mode = "affine"
dtype = "float16"
[overrides]
"text_model.*" = { bits = 6, group_size = 32 }
"lm_head" = { bits = 16 }
[overrides.x]
mode = "mxfp4"
bits = 4
group_size = 32
"""
HEADER: dict[str, Any] = {
    "model": {"digest": "a"},
    "data": {"digest": "b", "files": ["f"]},
    "settings": {"metric": None, "max_tokens": 6, "detail": "high"},
    "versions": {"mlx": "1"},
}
RESULT = Result("f", 1, "t", "exact", "?", ("a.png",), ("yes",), "no", 0.5, "stop", 3, 4, None)
SIDE = {"name": "a", "nbytes": 5, "bits_per_weight": 4.5}
TOKENS = dict.fromkeys(("top_1_agreement", "kl_nats", "kl_nats_median", "kl_nats_p99"), 0.5)
TOKENS |= dict.fromkeys(("kl_nats_max", "perplexity_reference", "perplexity_other"), 2.0)
FOUND: dict[str, Any] = {
    "reference": SIDE,
    "other": SIDE,
    "texts": {**TOKENS, "tokens": 3, "kl_counts": [1, 2]},
    "answers_forced": None,
    "features": [
        {"name": "patch_features", "vectors": 4, "cosine": 1.0, "cosine_least": 0.5,
         "relative_error": 0.1}
    ],
    "layers": [{"path": "text_model.layers.0", "relative_error": 0.1}],
    "matrices": [{"path": "lm_head", "bits": None, "parameters": 7, "relative_error": 0.1}],
    "answers": [
        {"question": "?", "picture": None, "reference": "a", "other": "b", "tokens": 3,
         "equal_tokens": 1}
    ],
    "surprises": [{"context": "a", "true": "b", "reference": "c", "other": "d", "kl_nats": 0.1}],
    "tasks": [
        {"task": "t", "metric": "exact", "examples": 3, "reference": 0.5, "other": 0.5,
         "same_answers": 2}
    ],
    "peak_memory_gb": 1.0,
    "kl_edges_nats": [1.0],
}  # fmt: skip
NOTES = {"settings": json.dumps({"seed": 1, "lora": {"rank": 3}}), "data": "a", "base": "b"}


def assert_read_or_refused(
    mutate: Callable[[random.Random], object], read: Callable[[], object], seeds: int
) -> None:
    """`read` works or raises one short line of ours, whatever `mutate` wrote."""
    refused = 0
    for seed in range(seeds):
        mutate(random.Random(seed))
        try:
            read()
        except SmolVLMError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 1200:
                pytest.fail(f"{seed}: {len(str(error))} characters: {error!s:.300}")
        except Exception as error:
            pytest.fail(f"{seed}: {type(error).__name__}: {error!s:.300}")
    assert seeds // 3 < refused <= seeds


def test_lines_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    file = tmp_path / "d.jsonl"

    def mutate(rng: random.Random) -> None:
        line = json.dumps(rng.choice([LINE, TURNS]))
        file.write_bytes(line.encode() + b"\n" + file_damage.damage_json(line, rng))

    assert_read_or_refused(mutate, lambda: read_cases([file], EvaluationOptions()), 150)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"image": "x" * 5000, "question": "?", "answer": "!"}, "no file 'x{100,200} in"),
        ({"image": "a\0", "question": "?", "answer": "!"}, r"'a\\x00': No file can have this name"),
        ({"image": "~no-such-user/a", "question": "?", "answer": "!"}, "No home directory"),
        ({"image": "\udcff.png", "question": "?", "answer": "!"}, "image has .* not valid Unicode"),
        ({"question": "?", "answers": ["\ud800"]}, "answers has .* not valid Unicode"),
        ({"question": "?", "answer": "!", "task": "\ud800"}, "task has .* not valid Unicode"),
        ('{"question": ' + "[" * 10**5, "nested too deeply"),
        ('{"messages": [{"role": ' + "[" * 900 + "]" * 900 + "}]}", "nested|content"),
        ({"x" * 10**5: 1}, r"unknown key 'x.{,50}; the keys are"),
    ],
)
def test_a_line_that_no_file_or_text_can_be_made_of(line: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(DatasetError, match=rf"d\.jsonl:1: .*{reason}"):
        read_dataset(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "x" * 5000, "a\0b", "\ud800"])
def test_a_dataset_that_is_no_regular_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match=r"cannot be (read|used): "):
        read_dataset(tmp_path / name)
    with pytest.raises(DatasetError, match=r"cannot be (read|used): "):
        read_cases([tmp_path / name], EvaluationOptions())


def test_settings_of_a_training(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    assert_read_or_refused(
        lambda rng: file.write_bytes(file_damage.damage_toml(SETTINGS, rng)),
        lambda: json.dumps(read_settings(file).dump_decisive()),
        120,
    )


def test_recipes(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    assert_read_or_refused(
        lambda rng: file.write_bytes(file_damage.damage_toml(RECIPE, rng)),
        lambda: read_recipe(str(file)),
        120,
    )


TOML = {
    "x = " + "[" * 5000 + "]" * 5000: "is not valid TOML: line 1 has more than 2,000 characters",
    "x = [" + "[\n" * 5000 + "]\n" * 5000 + "]": "is not valid TOML: ",
    "x = " + "9" * 5000: "is not valid TOML: line 1 has",
    "bits = 1" + "0" * 400: "whole number, not 1000|'bits' is not known",
    "bits = 0x" + "f" * 1900: "not a number of 7,600 bits|'bits' is not known",
    "seed = 9223372036854775807": "seed is 9223372036854775807; it|'model' is missing|'seed'",
    "mode = [1]": "mode must be a text|'mode' is not known",
    "[overrides]\nx = {mode = [1]}": r"mode \[1\] is none of|'overrides' is not known",
    "a." * 900 + "a = 1": "'a' is not known",
    "a." * 10**5 + "a = 1": "line 1 has more than",
    "x" * 1900 + " = 1": "the key 'x.{,50}' is not known",
}


@pytest.mark.parametrize("text", TOML, ids=range(len(TOML)))
def test_tables_that_no_program_writes(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(TrainingError, match=TOML[text]) as training:
        read_settings(file)
    with pytest.raises(CheckpointError, match=TOML[text]) as recipe:
        read_recipe(str(file))
    assert len(str(training.value)) + len(str(recipe.value)) < 2000


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("scale", "inf", "lora.scale is inf; it must be from"),
        ("scale", "-inf", "lora.scale is -inf; it must be from"),
        ("scale", "nan", "lora.scale is nan; it must be from"),
        ("scale", "1" + "0" * 400, "lora.scale must be a number, not 1000"),
        ("steps", "1" + "0" * 400, "steps must be a whole number, not 1000"),
        ("seed", "9223372036854775807", "seed is 9223372036854775807; it must be from"),
    ],
)
def test_numbers_out_of_range(key: str, value: str, reason: str, tmp_path: Path) -> None:
    (old,) = (line for line in SETTINGS.splitlines() if line.startswith(key))
    (tmp_path / "c.toml").write_text(SETTINGS.replace(old, f"{key} = {value}"))
    with pytest.raises(TrainingError, match=rf"c\.toml: {reason}"):
        read_settings(tmp_path / "c.toml")


def test_settings_that_are_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", "a\0"):
        with pytest.raises(TrainingError, match=r"cannot be (read: Not a |used: No file )"):
            read_settings(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"not a readable file: No[t ]"):
            read_recipe(str(tmp_path / name))


def write_results(path: Path) -> list[str]:
    """The lines of a results file that is written to `path`."""
    file = ResultsFile(path, HEADER, True)
    file.append(RESULT)
    file.close()
    return path.read_text().splitlines()


def read_results(path: Path) -> None:
    """Read the file at `path` and count."""
    file = ResultsFile(path, HEADER, False)
    try:
        if file.results:
            tasks, overall = score_tasks(list(file.results.values()))
            assert all(0 <= share <= 1 for one in (*tasks, overall) for share in one.interval)
    finally:
        file.close()


def test_results(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = write_results(path)

    def mutate(rng: random.Random) -> None:
        at = rng.randrange(2)
        changed = [line.encode() for line in lines]
        changed[at] = file_damage.damage_json(lines[at], rng)
        path.write_bytes(b"\n".join(changed) + b"\n")

    assert_read_or_refused(mutate, lambda: read_results(path), 200)


@pytest.mark.parametrize(
    "change",
    [
        {"line": float("inf")}, {"line": "1"}, {"line": 0}, {"line": 10**30}, {"score": 2},
        {"score": float("nan")}, {"score": -0.5}, {"score": "1"}, {"file": ["f"]}, {"task": None},
        {"expected": "yes"}, {"media": [5]}, {"finish_reason": 5}, {"error": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_of_another_type_is_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = write_results(path)
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DatasetError, match=r"r\.jsonl:2 is damaged"):
        read_results(path)


def test_results_go_to_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", "/dev/null", "a\0"):
        with pytest.raises(DatasetError, match=r"Not a regular file|No file can have this name"):
            ResultsFile(tmp_path / name, HEADER, False)


def test_a_result_may_name_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_results(path)
    file = ResultsFile(path, HEADER, False)
    strange = Result("\udcff", 2, "t", "exact", "é?", (), ("yes",), "no", 0, None, 3, 4, None)
    file.append(strange)
    file.close()
    assert b"\\udcff" in path.read_bytes()
    file = ResultsFile(path, HEADER, False)
    file.close()
    assert list(file.results.values()) == [RESULT, strange]


def test_what_a_conversion_lost(tmp_path: Path) -> None:
    path, text = tmp_path / VERIFY_FILE, json.dumps(FOUND)
    path.write_text(text)
    assert "KL" in str(format_verification(tmp_path))
    assert_read_or_refused(
        lambda rng: path.write_bytes(file_damage.damage_json(text, rng)),
        lambda: format_verification(tmp_path),
        150,
    )
    for change in (
        {"texts": {**FOUND["texts"], "perplexity_reference": 0}},
        {"matrices": [{**FOUND["matrices"][0], "parameters": 0}]},
        {"matrices": [{**FOUND["matrices"][0], "path": "nothing"}]},
        {"other": {**SIDE, "nbytes": 10**400}},
        {"features": [{**FOUND["features"][0], "name": "x"}]},
    ):
        path.write_text(json.dumps({**FOUND, **change}))
        with pytest.raises(CheckpointError, match=r"damaged.*; verify the checkpoint again"):
            format_verification(tmp_path)


def make_loop() -> Loop:
    """A loop over twelve steps that is not run."""
    options = LoopOptions(Schedule(1.0, 12))
    loss = lambda *_: (mx.array(0.0), mx.array(1.0))  # noqa: E731
    return Loop(nn.Linear(4, 3), loss, optim.AdamW(1e-3), lambda _: None, options)


def test_states_of_a_training(tmp_path: Path) -> None:
    path, log, loop = tmp_path / "state.safetensors", tmp_path / "log.jsonl", make_loop()
    loop.save(path, NOTES)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])

    def mutate(rng: random.Random) -> None:
        text = file_damage.damage_json(json.dumps(header), rng)
        if rng.random() < 0.3:
            settings = file_damage.damage_json(NOTES["settings"], rng).decode(errors="replace")
            notes = {**NOTES, "step": "0", "settings": settings}
            text = json.dumps({**header, "__metadata__": notes}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[length:])
        log.write_bytes(file_damage.damage_json('{"step": 1, "loss": 0.5}', rng))

    def read() -> None:
        rewind(log, 3)
        check_same(path, read_notes(path), NOTES)
        loop.restore(path)

    assert_read_or_refused(mutate, read, 150)


@pytest.mark.parametrize("text", ["[]", "5", "{", "[" * 10**5, "null"])
def test_a_state_whose_settings_are_none(text: str) -> None:
    with pytest.raises(TrainingError, match=r"s\.safetensors is damaged; choose another folder"):
        check_same(Path("s.safetensors"), {**NOTES, "settings": text}, NOTES)
    huge = {**NOTES, "settings": json.dumps({"seed": "x" * 10**5, "lora": {"rank": 3}})}
    with pytest.raises(TrainingError, match=r"whose seed was .{,300}, and now it is 1;"):
        check_same(Path("s.safetensors"), huge, NOTES)


def test_a_log_that_is_none(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    good = '{"step": 1}\n'
    log.write_bytes(good.encode() + b'\xff\n[]\n5\n{"step": "x"}\n{"step": null}\n' + b"[" * 10**5)
    rewind(log, 3)
    assert log.read_text() == good
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(TrainingError, match=r"log\.jsonl cannot be read: Not a regular file"):
        rewind(log, 3)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("a\0", "x" * 300, "file", "file/x"):
        with pytest.raises(TrainingError, match="choose another with --out"):
            check_folder(tmp_path / name)


def test_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_folder)
    config = AdapterConfig(
        "x", signature_of(model), 4, 2.0, 0.1, list_adaptable(model, ("text",))[:2]
    )
    attach_adapter(model, config)
    save_adapter(model, tmp_path, config)
    files = [tmp_path / "adapter_config.json", tmp_path / "adapters.safetensors"]
    contents = [file.read_bytes() for file in files]
    header = 8 + int.from_bytes(contents[1][:8], "little")

    def mutate(rng: random.Random) -> None:
        changed = list(contents)
        if rng.random() < 0.7:
            changed[0] = file_damage.damage_json(contents[0].decode(), rng)
        else:
            changed[1] = file_damage.damage_bytes(contents[1][:header], rng) + contents[1][header:]
        for file, data in zip(files, changed, strict=True):
            file.write_bytes(data)

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a base of another name
            load_adapter(load_model(tiny_folder), tmp_path, "x")

    assert_read_or_refused(mutate, read, 30)


def test_a_value_is_shown_in_some_forty_characters() -> None:
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    for value in (
        "x" * 10**6,
        "\x1b]52;\n",
        1 << 10**6,
        deep,
        {"a" * 1000: "b" * 1000},
        b"x" * 500,
    ):
        assert len(shorten(value)) < 100
        assert shorten(value).isprintable()
    while deep:  # or Python takes it apart by recursion
        (deep,) = deep
